// Packed matrix products with 256-bit vectors: the same order of sums as with 512 bits, two registers per block.
#include "ahead.inc.hpp"
#include "rare.inc.hpp"

namespace penstock::PENSTOCK_ISA {

constexpr int ROWS_AT_ONCE = 48, MAX_COLUMNS = 128;

struct Sum {
    __m256 low, high;  // columns 0-7 and 8-15
};

struct Pairs {  // even and odd k of sixteen columns, as float32
    __m256 even[2], odd[2];
};

static inline __m256 to_float(__m256i x) {
    return as<__m256>(__builtin_convertvector(as<i8>(x), f8));
}

struct Bf16Pairs {
    static constexpr int PAIR_BYTES = 64;
    static inline Pairs at(const char* w, int p) {
        __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        Pairs pair;
        for (int h = 0; h < 2; h++) {
            __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + p * PAIR_BYTES) + h);
            pair.even[h] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            pair.odd[h] = _mm256_castsi256_ps(_mm256_and_si256(both, high_half));
        }
        return pair;
    }
};

struct Int8Pairs {
    static constexpr int PAIR_BYTES = 32;
    static inline __m256 eight(const char* from) {
        return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static inline Pairs at(const char* w, int p) {
        const char* from = w + p * PAIR_BYTES;
        return {{eight(from), eight(from + 8)}, {eight(from + 16), eight(from + 24)}};
    }
};

// Pairs of bf16 from twelve bits: eight numbers, a byte and a nibble each, at a time.
static inline __m256i eight_bf12(const char* rest, const char* places, int shift, const bf16* exponents) {
    __m256i bytes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rest)));
    __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
    place = _mm256_and_si256(_mm256_srl_epi32(place, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
    // Exponents rise by one from place to place, but the last, which is none.
    __m256i lowest = _mm256_set1_epi32(exponents[0]), none = _mm256_cmpeq_epi32(place, _mm256_set1_epi32(15));
    __m256i exponent = _mm256_andnot_si256(none, _mm256_add_epi32(lowest, _mm256_slli_epi32(place, 7)));
    return _mm256_or_si256(_mm256_and_si256(bytes, _mm256_set1_epi32(0x807f)), exponent);
}

// A chunk of a block of BF12 as the pairs of BF16.
static void unpack_bf12(const char* w, int num_pairs, const bf16* exponents, bf16* to) {
    for (int p = 0; p < num_pairs; p++, to += 32) {
        const char *rest = w + p / 4 * 192 + p % 4 * 32, *places = w + p / 4 * 192 + 128 + p / 2 % 2 * 32;
        for (int i = 0; i < 32; i += 16) {
            __m256i first = eight_bf12(rest + i, places + i, p % 2 * 4, exponents);
            __m256i second = eight_bf12(rest + i + 8, places + i + 8, p % 2 * 4, exponents);
            __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), both);
        }
    }
}

struct Words {  // k pairs of sixteen columns, int16
    __m256i low, high;
};

struct WordPairs {  // of int8 keys and values
    static constexpr int PAIR_BYTES = 32;
    static inline Words at(const char* w, int p) {
        const __m128i* from = reinterpret_cast<const __m128i*>(w + p * PAIR_BYTES);
        return {_mm256_cvtepi8_epi16(_mm_load_si128(from)), _mm256_cvtepi8_epi16(_mm_load_si128(from + 1))};
    }
};

struct Int4Pairs {
    static constexpr int PAIR_BYTES = 16;
    static inline __m256 nibbles(__m256i x, int shift) {
        __m256i nibble = _mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
        return to_float(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8)));
    }
    static inline Pairs at(const char* w, int p) {
        const char* from = w + p / 16 * 256 + p % 8 * 32;
        int shift = p & 8 ? 4 : 0;
        Pairs pair;
        for (int h = 0; h < 2; h++) {
            __m256i both = _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from) + h));
            pair.even[h] = nibbles(both, shift);
            pair.odd[h] = nibbles(both, shift + 8);
        }
        return pair;
    }
};

static inline void dot_pair(Sum& sum, const bf16* a, const Pairs& w) {
    std::int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    __m256i both = _mm256_set1_epi32(pair);  // from memory: shifting before would take a way through other registers
    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    sum.low = _mm256_fmadd_ps(odd, w.odd[0], _mm256_fmadd_ps(even, w.even[0], sum.low));
    sum.high = _mm256_fmadd_ps(odd, w.odd[1], _mm256_fmadd_ps(even, w.even[1], sum.high));
}

// Of int16; the bits of sum are int32.
static inline void dot_pair(Sum& sum, const bf16* a, const Words& w) {
    std::int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    __m256i both = _mm256_set1_epi32(pair);
    sum.low = as<__m256>(_mm256_add_epi32(as<__m256i>(sum.low), _mm256_madd_epi16(both, w.low)));
    sum.high = as<__m256>(_mm256_add_epi32(as<__m256i>(sum.high), _mm256_madd_epi16(both, w.high)));
}

static inline void put(float* c, const Sum& sum) {
    _mm256_storeu_ps(c, sum.low);
    _mm256_storeu_ps(c + 8, sum.high);
}

// c = sum * scale, added to what is there unless this is the first.
static inline void put_scaled(float* c, const Sum& sum, const float* scale, bool first) {
    __m256 low = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c);
    __m256 high = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + 8);
    _mm256_storeu_ps(c, _mm256_fmadd_ps(sum.low, _mm256_loadu_ps(scale), low));
    _mm256_storeu_ps(c + 8, _mm256_fmadd_ps(sum.high, _mm256_loadu_ps(scale + 8), high));
}

template <int M, class W>
static inline void product(const char* w, const bf16* a, std::size_t stride, int num_pairs, float* c,
                           std::size_t c_stride, bool first = true) {
    Sum sum[M] = {};
    if (!first)
        for (int i = 0; i < M; i++) sum[i] = {_mm256_loadu_ps(c + i * c_stride), _mm256_loadu_ps(c + i * c_stride + 8)};
    for (int p = 0; p < num_pairs; p++) {
        auto pair = W::at(w, p);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) dot_pair(sum[i], a + i * stride + 2 * p, pair);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) put(c + i * c_stride, sum[i]);
}

template <int N> struct Count { static constexpr int value = N; };

constexpr int TILE_ROWS = 4;  // eight sums, two times two weights, two activations and a mask: 15 of 16 registers

// f(Count<rows>, first row) over all of m rows, in tiles of nearly the same size.
template <class F>
static inline void each_tile(int m, F f) {
    for (int row = 0, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, rows; tiles; tiles--, row += rows) {
        rows = (m - row + tiles - 1) / tiles;
        switch (rows) {
            case 4: f(Count<4>{}, row); break;
            case 3: f(Count<3>{}, row); break;
            case 2: f(Count<2>{}, row); break;
            default: f(Count<1>{}, row);
        }
    }
}

template <class W>
static void product_rows(const char* w, const bf16* a, std::size_t stride, int m, int num_pairs, float* c,
                         std::size_t c_stride, bool first = true) {
    each_tile(m, [&](auto rows, int row) {
        product<rows.value, W>(w, a + row * stride, stride, num_pairs, c + row * c_stride, c_stride, first);
    });
}

// One block, unpacked in chunks that stay in L1 while all rows pass over them.
static void product_bf12(const Weight& weight, std::size_t block, const bf16* a, std::size_t stride, int m, float* c,
                         std::size_t c_stride) {
    constexpr int CHUNK_PAIRS = 128;
    alignas(64) bf16 chunk[CHUNK_PAIRS * 32];
    const char* w = static_cast<const char*>(weight.data) + block * weight.k_pad * COLUMNS / 2 * 3;
    for (int p = 0, num; p < weight.k_pad / 2; p += num) {
        num = weight.k_pad / 2 - p < CHUNK_PAIRS ? weight.k_pad / 2 - p : CHUNK_PAIRS;
        unpack_bf12(w + p / 4 * 192, num, weight.exponents + block * 32, chunk);
        product_rows<Bf16Pairs>(reinterpret_cast<const char*>(chunk), a + 2 * p, stride, m, num, c, c_stride, p == 0);
    }
}

// As in product_avx512.inc.hpp.
template <class Of>
static void key_product(const char* keys, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                        const bf16* q, std::size_t q_stride, int m, int dim, float* scores, std::size_t stride,
                        Ahead& ahead) {
    for (int b = 0; b < num_blocks; b++)
        for (int half = 0; half < 2; half++) {
            ahead.ask(dim / 2 * Of::PAIR_BYTES / 64);
            product_rows<Of>(keys + blocks[b] * block_bytes + half * dim / 2 * Of::PAIR_BYTES, q, q_stride, m, dim / 2,
                             scores + b * KV_BLOCK + half * COLUMNS, stride);
        }
}

template <class Of>
static void value_product(const char* values, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                          const bf16* chances, std::size_t stride, int m, int dim, float* out, Ahead& ahead) {
    each_tile(m, [&](auto rows, int row) {
        for (int j = 0; j < dim / COLUMNS; j++) {
            Sum sum[rows.value] = {};
            for (int b = 0; b < num_blocks; b++) {
                ahead.ask(KV_BLOCK / 2 * Of::PAIR_BYTES / 64);
                const char* from = values + blocks[b] * block_bytes + j * (KV_BLOCK / 2 * Of::PAIR_BYTES);
                const bf16* a = chances + row * stride + b * KV_BLOCK;
                for (int p = 0; p < KV_BLOCK / 2; p++) {
                    auto pair = Of::at(from, p);
#pragma GCC unroll 4
                    for (int i = 0; i < rows.value; i++) dot_pair(sum[i], a + i * stride + 2 * p, pair);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < rows.value; i++) put(out + (row + i) * dim + j * COLUMNS, sum[i]);
        }
    });
}

// One block of 4-bit weights: each group's sums, scaled, are added in float32.
static void product_int4(const Weight& weight, std::size_t block, const bf16* a, std::size_t stride, int m,
                         float* c, std::size_t c_stride) {
    int groups = weight.k_pad / GROUP;
    // Only K is read of the activations, up to K_ALIGN: a group's padding is the weight's alone.
    int num_pairs = (weight.k + K_ALIGN - 1) / K_ALIGN * (K_ALIGN / 2);
    const char* w = static_cast<const char*>(weight.data) + block * weight.k_pad * COLUMNS / 2;
    each_tile(m, [&](auto rows, int row) {
        for (int g = 0; g < groups; g++) {
            Sum sum[rows.value] = {};
            for (int p = g * GROUP / 2; p < (g + 1) * GROUP / 2 && p < num_pairs; p++) {
                Pairs pair = Int4Pairs::at(w, p);
#pragma GCC unroll 4
                for (int i = 0; i < rows.value; i++) dot_pair(sum[i], a + (row + i) * stride + 2 * p, pair);
            }
            for (int i = 0; i < rows.value; i++)
                put_scaled(c + (row + i) * c_stride, sum[i], weight.scale + (block * groups + g) * COLUMNS, g == 0);
        }
    });
}

// Four k of sixteen columns by four of a row, exact: bytes as 16-bit numbers, even ones and odd ones.
struct Quads {
    __m256i even[2], odd[2];
    static inline __m256i even_of(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
    static inline Quads of_int8(const char* w) {
        Quads q;
        for (int h = 0; h < 2; h++) {
            __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(w) + h);
            q.even[h] = even_of(bytes), q.odd[h] = _mm256_srai_epi16(bytes, 8);
        }
        return q;
    }
    static inline Quads of_nibbles(const char* w, int shift) {
        Quads q;
        for (int h = 0; h < 2; h++) {
            __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(w) + h), mask = _mm256_set1_epi16(15);
            __m256i nibbles = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift));
            q.even[h] = _mm256_and_si256(nibbles, mask);
            q.odd[h] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 8), mask);
        }
        return q;
    }
};

struct IntSum {
    __m256i half[2];
    void add(const std::int8_t* a, const Quads& w) {
        std::int32_t four;
        __builtin_memcpy(&four, a, sizeof four);
        __m256i x = _mm256_set1_epi32(four), even = Quads::even_of(x), odd = _mm256_srai_epi16(x, 8);
        for (int h = 0; h < 2; h++) {
            half[h] = _mm256_add_epi32(half[h], _mm256_madd_epi16(even, w.even[h]));
            half[h] = _mm256_add_epi32(half[h], _mm256_madd_epi16(odd, w.odd[h]));
        }
    }
    Sum floats() const { return {to_float(half[0]), to_float(half[1])}; }
};

static void product_w8a8(const Weight& weight, std::size_t block, const Rows& rows, int m, float* c,
                         std::size_t c_stride) {
    const char* w = static_cast<const char*>(weight.data) + block * weight.k_pad * COLUMNS;
    each_tile(m, [&](auto count, int row) {
        const std::int8_t* a = static_cast<const std::int8_t*>(rows.data) + row * rows.stride;
        IntSum sum[count.value] = {};
        for (int k = 0; k < weight.k_pad; k += 4) {
            Quads quads = Quads::of_int8(w + k * COLUMNS);
#pragma GCC unroll 4
            for (int i = 0; i < count.value; i++) sum[i].add(a + i * rows.stride + k, quads);
        }
        for (int i = 0; i < count.value; i++) {
            float* to = c + (row + i) * c_stride;
            put(to, sum[i].floats());
            store(to, load(to) * rows.scale[row + i] * load(weight.scale + block * COLUMNS));
        }
    });
}

static void product_w4a8(const Weight& weight, std::size_t block, const Rows& rows, int m, float* c,
                         std::size_t c_stride) {
    const char* w = static_cast<const char*>(weight.data) + block * weight.k_pad * COLUMNS / 2;
    int groups = weight.k_pad / GROUP;
    each_tile(m, [&](auto count, int row) {
        const std::int8_t* a = static_cast<const std::int8_t*>(rows.data) + row * rows.stride;
        for (int g = 0; g < groups; g++) {
            const float* scale = weight.scale + (block * groups + g) * COLUMNS;
            IntSum sum[count.value];
            for (int i = 0; i < count.value; i++) {
                // Nibbles are stored plus 8.
                __m256i added = _mm256_set1_epi32(-8 * rows.sums[(row + i) * rows.sums_stride + g]);
                sum[i].half[0] = sum[i].half[1] = added;
            }
            for (int k = g * GROUP; k < (g + 1) * GROUP; k += 4) {
                Quads quads = Quads::of_nibbles(w + k / 8 * 64, k % 8);
#pragma GCC unroll 4
                for (int i = 0; i < count.value; i++) sum[i].add(a + i * rows.stride + k, quads);
            }
            for (int i = 0; i < count.value; i++)
                put_scaled(c + (row + i) * c_stride, sum[i].floats(), scale, g == 0);
        }
        for (int i = 0; i < count.value; i++) {
            float* to = c + (row + i) * c_stride;
            store(to, load(to) * rows.scale[row + i]);
        }
    });
}

static void gemm(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c, std::size_t c_stride) {
    const bf16* a = static_cast<const bf16*>(rows.data);
    const char* w = static_cast<const char*>(weight.data);
    std::size_t block_elements = static_cast<std::size_t>(weight.k_pad) * COLUMNS;
    int num_pairs = weight.k_pad / 2;
    for (int j = 0; j < cols; j += COLUMNS) {
        std::size_t block = (col + j) / COLUMNS;
        switch (weight.format) {
            case Format::BF16:
                product_rows<Bf16Pairs>(w + block * block_elements * 2, a, rows.stride, m, num_pairs, c + j, c_stride);
                break;
            case Format::INT8:
                product_rows<Int8Pairs>(w + block * block_elements, a, rows.stride, m, num_pairs, c + j, c_stride);
                for (int i = 0; i < m; i++)
                    store(c + i * c_stride + j, load(c + i * c_stride + j) * load(weight.scale + col + j));
                break;
            case Format::W8A8: product_w8a8(weight, block, rows, m, c + j, c_stride); break;
            case Format::INT4: product_int4(weight, block, a, rows.stride, m, c + j, c_stride); break;
            case Format::W4A8: product_w4a8(weight, block, rows, m, c + j, c_stride); break;
            case Format::BF12: product_bf12(weight, block, a, rows.stride, m, c + j, c_stride); break;
        }
    }
    if (weight.format == Format::BF12) add_rare(weight, rows, m, col, cols, c, c_stride);
}

}  // namespace penstock::PENSTOCK_ISA
