// AVX-512 with VDPBF16PS and VNNI: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#define PENSTOCK_ISA avx512_bf16
#include "vec.hpp"
#include "gemm_avx512.inc.hpp"
#include "attention.inc.hpp"
#include "kv_write.inc.hpp"
#include "rows.inc.hpp"
#include "table.inc.hpp"

namespace penstock {
const Kernels* avx512_bf16_kernels() { return &avx512_bf16::table; }
}  // namespace penstock
