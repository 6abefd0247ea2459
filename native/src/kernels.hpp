// The contract between the program (which knows order, threads and buffers) and the kernels of one instruction set.
//
// Every instruction set is one translation unit that fills one `Kernels` table; all of them read the same packed
// weights and the same KV blocks, so that a table can be swapped at run time. Kernels know no threads: they compute
// the piece they are told to.
//
// Batch invariance: a row's result is a function of that row, the weights and absolute positions. Sums over K run in
// ascending k with one accumulator per output; sums over the context are cut every ATTENTION_SPAN positions counted
// from position 0 and merged in ascending order. How work is cut into pieces never changes a bit.
#pragma once
#include <cstddef>
#include <cstdint>

namespace penstock {

using bf16 = std::uint16_t;

constexpr int COLUMNS = 16;         // output columns of a packed block
constexpr int K_ALIGN = 64;         // K of a weight is padded with zeros to a multiple of this; that of rows, of GROUP
constexpr int GROUP = 128;          // K elements that share a scale in int4 weights
constexpr int KV_BLOCK = 32;        // tokens of a KV block
constexpr int NOISE_GROUP = 128;    // neighbouring token ids that share a first arrival when one is sampled
constexpr int ATTENTION_SPAN = 512; // positions whose softmax is summed on its own, then merged

// What a packed matrix [N, K] holds. n_pad = N up to a multiple of 16, k_pad = K up to a multiple of 64; what is added
// is zero. Block b holds columns [16 b, 16 b + 16); blocks lie one behind the other, each k_pad * 16 elements.
enum class Format : int {
    BF16 = 0,  // [k_pad/2][16][2] bf16: AMX tiles and vdpbf16ps operands
    INT8 = 1,  // [k_pad/2][2][16] int8, scale[n]: weight = q * scale, products in bf16
    W8A8 = 2,  // [k_pad/4][16][4] int8, scale[n], sums[n]: AMX tiles and vpdpbusd operands
    INT4 = 3,  // [k_pad/32][8][16][2] bytes: low nibble k-pair p, high nibble k-pair p + 8 of 16; value = nibble - 8;
               // scale[k_pad/128 groups][16] per block: products in bf16
    W4A8 = 4,  // [k_pad/8][16][4] bytes: low nibble k-quad q, high nibble quad q + 1; as INT4, products in integers
    BF12 = 5,  // every bf16 number, in 12 bits: four k-pairs at a time, [4][16][2] bytes of sign and seven bits of
               // significand, then [2][16][2] bytes of exponents: low nibble k-pair p, high nibble p + 1, places in the
               // block's table. What has another exponent is zero there and one of the block's `rare` weights.
};

struct RareWeight {
    std::int32_t k;
    std::int16_t column;  // of the block
    bf16 value;
};

struct RareWeights {
    const RareWeight* data;
    int num;
};

struct Weight {
    Format format;
    int n, k, n_pad, k_pad;
    const void* data;          // 64-byte aligned
    const float* scale;        // INT8, W8A8: [n_pad]; INT4, W4A8: [n_pad/16][k_pad/128][16]; else null
    const std::int32_t* sums;  // W8A8: [n_pad], sum over k of q (vpdpbusd needs unsigned activations); else null
    const float* bias;         // [n_pad] or null
    const bf16* exponents = nullptr;    // BF12: [n_pad/16][32]: 15 rising ones in place and zero, twice; else null
    const RareWeights* rare = nullptr;  // BF12: [n_pad/16]; else null
    int rotation = 0;  // W8A8, W4A8: what `Kernels::rotate` did to blocks of so many columns of K before they were rounded,
                       // and does to rows; 0: nothing
};

// What the place of one KV head in a block holds, keys or values: packed so that the products of attention read it in
// order, whole cache lines.
enum class KVFormat : int {
    BF16 = 0,  // K as [D/2][16][2] per 16 tokens, V as [D/16][16 token pairs][16][2]
    INT8 = 1,  // int8 in the same order, then bf16 [32], a scale per token: element = int8 * scale
};

static inline constexpr std::size_t kv_head_bytes(KVFormat format, int head_dim) {
    return static_cast<std::size_t>(KV_BLOCK) * (format == KVFormat::BF16 ? 2 * head_dim : head_dim + 2);
}

// Rows of activations. BF16, BF12, INT8, INT4 weights read bf16, W8A8 and W4A8 read int8 with a scale per row.
// Rows are `stride` elements apart; elements between K and k_pad are zero.
struct Rows {
    const void* data;
    std::size_t stride;
    const float* scale;           // int8: [rows]; else null
    const std::int32_t* sums;     // W4A8: [rows][k_pad/128] sums of each group; else null
    std::size_t sums_stride;
};

// One piece of attention: `num_tokens` consecutive queries of one request, the query heads of one KV head, and the
// span [span_begin, span_end) of the context, span_begin a multiple of ATTENTION_SPAN. Query t stands at position
// `position + t` and sees keys (p - window, p]; window 0: all up to p.
// Results, per row r = t * group + head: out [D] (sum of exp2(score - max) * v), max and sum. Rows that see nothing in
// the span get max = -inf, sum = 0, out = 0.
struct AttendPiece {
    const bf16* q;  // [num_tokens] rows q_stride apart, the group's heads [group][D] contiguous
    std::size_t q_stride;
    int num_tokens, group, head_dim, position, window;
    int span_begin, span_end;
    const std::int32_t* blocks;  // block table of the request
    const char* pool;            // this layer's pool at (K, this KV head)
    std::size_t block_bytes;     // from block to block in the pool
    std::size_t value_bytes;     // from K to V of a head
    KVFormat format;
    float scale;                 // 1 / sqrt(head_dim), times log2(e)
    const char* const* ahead;    // keys or values of this head dimension that are read some time after these, a head of
    int num_ahead;               // a block each: asked for while these are computed with
    float* out;                  // [num_tokens * group][D]
    float* max;
    float* sum;
};

struct Kernels {
    const char* name;
    int rows_at_once, max_columns;  // the piece of a product whose float32 results stay near: what to ask gemm for
    int query_rows;                 // of a piece of attention: keys and values come from L2 once for all of them

    // c[m][cols] = rows x columns [col, col + cols) of the weight, float32, without bias. col and cols multiples of 16.
    void (*gemm)(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c, std::size_t c_stride);

    // Keys and values of `count` tokens and one KV head, k and v [D] bf16 in rows `stride` apart, into their places of a
    // block, from `offset` on. INT8: scale = absmax / 127, up to the next bf16, and nearest steps of it; what holds a
    // NaN or an infinity gets a NaN for its scale.
    void (*write_kv)(KVFormat format, const bf16* k, const bf16* v, std::size_t stride, int count, char* k_block,
                     char* v_block, int offset, int head_dim);

    void (*attend)(const AttendPiece& piece);

    // Join a span's results (rows of [D], max, sum) to those of the spans before it. Start with to = 0, max = -inf.
    void (*merge)(const float* out, const float* max, const float* sum, int rows, int head_dim, float* to,
                  float* to_max, float* to_sum);

    // to[i] = bf16(out[i] / sum)
    void (*finish)(const float* out, float sum, int head_dim, bf16* to);

    // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i], n elements, rounded to bf16.
    void (*rms_norm)(const float* x, const float* weight, int n, float eps, bf16* out);

    // x[i] = bf16 head of D: optional norm, then rope (half-split) with cos, sin [rotary/2]; in place. weight may be null.
    void (*rope)(bf16* x, const float* weight, float eps, const float* cos, const float* sin, int head_dim, int rotary);

    // int8 of a bf16 row with one scale (absmax / 127): returns it, NaN for a row that holds a NaN or an infinity. sums,
    // if not null: per GROUP.
    float (*quantize)(const bf16* x, int n, std::int8_t* out, std::int32_t* sums);

    // Each block of `block` neighbours times the Hadamard matrix of that size over its root, which is its own inverse: an
    // outlier becomes a little of all of them. block: 16, 32, 64 or 128, divides n. Results rounded to bf16.
    void (*rotate)(const bf16* x, int n, int block, bf16* out);

    // out[j] = silu(gate[j]) * up[j] as bf16; gate and up float32, `cols` of each.
    void (*silu_mul)(const float* gate, const float* up, int cols, bf16* out);

    // x[j] += c[j] (+ bias[j])
    void (*add)(float* x, const float* c, const float* bias, int cols);

    // out[j] = bf16(c[j] (+ bias[j]))
    void (*store)(bf16* out, const float* c, const float* bias, int cols);

    // Lane j of best and at [16]: the largest score so far of columns j, j + 16, ... and the lowest of them that has
    // it. Takes in c [cols], columns `column` onwards, a multiple of 16. NaN is larger than all and stays.
    void (*best)(const float* c, int cols, int column, float* best, std::int32_t* at);

    // The largest of each NOISE_GROUP scores; whether one of the scores is NaN.
    bool (*peaks)(const float* scores, int groups, float* out);

    // out[i] = exp((scores[i] - best) * inverse_temperature), of groups of NOISE_GROUP; returns their sum.
    double (*weigh)(const float* scores, int groups, float best, float inverse_temperature, float* out);
};

// nullptr where this build or this machine lacks the instruction set.
const Kernels* amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();

}  // namespace penstock
