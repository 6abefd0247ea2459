// From a checkpoint's rows [N, K] to the packed order that kernels read (kernels.hpp says which).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace penstock {

// Bytes of the packed matrix, without scales.
std::size_t packed_bytes(Format format, int n, int k);

// One block of 16 columns of the packed matrix from its `count` rows, bf16, `stride` elements apart. The rest of the block
// and of K becomes zero.
void pack_bf16(const bf16* rows, std::size_t stride, int count, int k, void* to);

// The same as BF12: no bit is lost. exponents [32] and rare as `Weight` has them.
void pack_bf12(const bf16* rows, std::size_t stride, int count, int k, void* to, bf16* exponents, std::vector<RareWeight>& rare);

// The same for 8-bit integers that are quantized already, int8 rows; sums [16] only for W8A8.
void pack_int8(Format format, const std::int8_t* rows, std::size_t stride, int count, int k, void* to, std::int32_t* sums);

// The same for 4-bit integers in [-8, 7], one per int8.
void pack_int4(Format format, const std::int8_t* rows, std::size_t stride, int count, int k, void* to);

// Whether `Kernels::rotate` can, columns of K in such blocks; and what it does, here for one row of a weight.
bool can_rotate(int k, int block);
void rotate(const bf16* row, int k, int block, bf16* to);

// Row n of a packed matrix as it is computed with, float32 [k]; one that was rotated comes back as it was before.
void unpack_row(const Weight& weight, int n, float* out);

// One row of compressed-tensors' 4-bit integers, to one per int8: element k is nibble k % 8, counted from the low end, of
// little-endian word k / 8, and stands for nibble - 8.
void unpack_nibbles(const std::uint8_t* from, int k, std::int8_t* to);

// Round to nearest: one scale per row, absmax / 127. Scales are bf16 numbers here and below: they are the same in a file.
// False where a weight is NaN or infinite.
bool quantize_int8(const bf16* rows, std::size_t stride, int n, int k, std::int8_t* to, float* scale);

// One scale per row and group of 128: the element of largest magnitude becomes -8.
bool quantize_int4(const bf16* rows, std::size_t stride, int n, int k, std::int8_t* to, float* scale);

}  // namespace penstock
