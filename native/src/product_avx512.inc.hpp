// Products of a few rows by whole blocks of 16 columns in 512-bit registers: what they are made of, the unpacking of
// weights to pairs of bf16, and the two products of attention.
//
// One accumulator register per row and block; k ascends. A weight vector is loaded once for up to six rows and never
// stored: memory-bound for few rows, bound by the multipliers for many. With VDPBF16PS where the machine has it, else
// with two float32 products per pair (bf16 is the upper half of a float32). Knows no scales.
#include "ahead.inc.hpp"

#define PENSTOCK_INLINE inline __attribute__((always_inline))
// Inlined among others, GCC 12 keeps some of the sums in memory.
#define PENSTOCK_APART __attribute__((noinline))
#define PENSTOCK_ALWAYS __attribute__((always_inline))  // of a lambda
#define PENSTOCK_UNROLL _Pragma("GCC unroll 12")

namespace penstock::PENSTOCK_ISA {

// Rows of a tile. Times four blocks: 24 sums, six activations and a weight are 31 of the 32 registers.
constexpr int TILE_ROWS = 6;
constexpr int TALL_ROWS = 12;  // times two blocks

template <int BLOCKS> constexpr int MOST_ROWS = BLOCKS <= 2 ? TALL_ROWS : TILE_ROWS;

// How many of `left` blocks m rows take at once. Rows that fit one tile need the weights only once.
static inline int blocks_at_once(int m, int left) {
    bool tall = m > TILE_ROWS && m <= TALL_ROWS;
    return left >= 4 && !tall ? 4 : left >= 2 ? 2 : 1;
}

// Consecutive blocks into L2; `data`: within the first. Not into L1: its few outstanding misses are for what is read now
// (Zen 4, one row and one thread: 27 instead of 23 GB/s of int8, no less of bf16).
constexpr int FAR = 2304;  // bytes of each of four blocks: twice as far is alike, a third misses a tenth of fast memory
template <int BLOCKS, _mm_hint HINT = _MM_HINT_T1>
static PENSTOCK_INLINE void fetch_blocks(const char* data, std::size_t block_bytes) {
    PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) _mm_prefetch(data + j * block_bytes, HINT);
}

static PENSTOCK_INLINE __m512i four_bytes(const void* at) {
    std::int32_t four;
    __builtin_memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}

static PENSTOCK_INLINE __m512 to_float(__m512i x) { return as<__m512>(floats(as<vi>(x))); }

static PENSTOCK_INLINE __m512 dot_pair(__m512 sum, __m512i a, __m512i w) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)w);
#else
    __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    sum = _mm512_fmadd_ps(as<__m512>(_mm512_slli_epi32(a, 16)), as<__m512>(_mm512_slli_epi32(w, 16)), sum);
    return _mm512_fmadd_ps(as<__m512>(_mm512_and_si512(a, high)), as<__m512>(_mm512_and_si512(w, high)), sum);
#endif
}

// The same of pairs of int16, whose exact sums are int32: their bits lie in the same registers.
static PENSTOCK_INLINE __m512 dot_words(__m512 sum, __m512i a, __m512i w) {
#ifdef __AVX512VNNI__
    return as<__m512>(_mm512_dpwssd_epi32(as<__m512i>(sum), a, w));
#else
    return as<__m512>(_mm512_add_epi32(as<__m512i>(sum), _mm512_madd_epi16(a, w)));
#endif
}

// The sums of M rows by BLOCKS blocks, in registers: every loop over them is unrolled. WORDS: of int16.
template <int M, int BLOCKS, bool WORDS = false>
struct Sums {
    __m512 of[M][BLOCKS];

    static PENSTOCK_INLINE __m512 dot(__m512 sum, __m512i a, __m512i w) {
        return WORDS ? dot_words(sum, a, w) : dot_pair(sum, a, w);
    }

    PENSTOCK_INLINE void zero() {
        PENSTOCK_UNROLL for (int i = 0; i < M; i++)
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) of[i][j] = _mm512_setzero_ps();
    }
    PENSTOCK_INLINE void get(const float* c, std::size_t c_stride) {
        PENSTOCK_UNROLL for (int i = 0; i < M; i++)
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) of[i][j] = _mm512_loadu_ps(c + i * c_stride + j * COLUMNS);
    }
    PENSTOCK_INLINE void put(float* c, std::size_t c_stride) const {
        PENSTOCK_UNROLL for (int i = 0; i < M; i++)
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) _mm512_storeu_ps(c + i * c_stride + j * COLUMNS, of[i][j]);
    }
    // One pair of k: `a` points at the first row's, w(j) is block j's.
    template <class W>
    PENSTOCK_INLINE void add(const bf16* a, std::size_t stride, W w) {
        if constexpr (M <= TILE_ROWS) {  // what is fewer stays in registers
            __m512i pair[M];
            PENSTOCK_UNROLL for (int i = 0; i < M; i++) pair[i] = four_bytes(a + i * stride);
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) {
                __m512i weights = w(j);
                PENSTOCK_UNROLL for (int i = 0; i < M; i++) of[i][j] = dot(of[i][j], pair[i], weights);
            }
        } else {
            __m512i weights[BLOCKS];
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) weights[j] = w(j);
            PENSTOCK_UNROLL for (int i = 0; i < M; i++) {
                __m512i pair = four_bytes(a + i * stride);
                PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) of[i][j] = dot(of[i][j], pair, weights[j]);
            }
        }
    }
};

// Where the pairs of consecutive blocks come from, from some k on.
struct Bf16Pairs {
    const char* data;
    std::size_t block_bytes;
    static constexpr int PAIR_BYTES = 64, AT_ONCE = 1;
    static constexpr bool WORDS = false;

    PENSTOCK_INLINE __m512i pair(int block, int p) const {
        return _mm512_load_si512(data + block * block_bytes + p * PAIR_BYTES);
    }
    template <class S>
    PENSTOCK_INLINE void add_to(S& sums, const bf16* a, std::size_t stride, int p) const {
        sums.add(a, stride, [&](int j) { return pair(j, p); });
    }
};

// Sixteen pairs to memory.
template <class Pairs>
static PENSTOCK_INLINE void unpack_pairs(const Pairs& from, int block, int p, char* to) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 64, from.pair(block, p + i));
}

struct Bf12Pairs {
    const char* data;
    std::size_t block_bytes;
    const bf16* exponents = nullptr;  // of the first block
    static constexpr int PAIR_BYTES = 48, AT_ONCE = 4;

    // The exponent's place is five bits wide, so that what is above a low nibble needs no mask. A byte that has its sign
    // spread to the left keeps sign and significand of it, and takes the exponent from the table.
    PENSTOCK_INLINE __m512i whole(int block, const char* bytes, __m512i places) const {
        __m512i exponent = _mm512_permutexvar_epi16(places, _mm512_loadu_si512(exponents + block * 32));
        __m512i rest = _mm512_cvtepi8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)));
        return _mm512_ternarylogic_epi32(rest, _mm512_set1_epi16(static_cast<short>(0x807f)), exponent, 0xea);  // a & b | c
    }
    // Pair p + I, p a multiple of four.
    template <int I>
    PENSTOCK_INLINE __m512i pair(int block, int p) const {
        const char* four = data + block * block_bytes + p * PAIR_BYTES;
        __m512i places = _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(four + 128 + I / 2 * 32)));
        return whole(block, four + I * 32, I % 2 ? _mm512_srli_epi16(places, 4) : places);
    }
    PENSTOCK_INLINE void unpack(int block, int p, char* to) const {
        PENSTOCK_UNROLL for (int i = 0; i < 16; i += 4, to += 256) {
            _mm512_store_si512(to, pair<0>(block, p + i));
            _mm512_store_si512(to + 64, pair<1>(block, p + i));
            _mm512_store_si512(to + 128, pair<2>(block, p + i));
            _mm512_store_si512(to + 192, pair<3>(block, p + i));
        }
    }
    template <class S>
    PENSTOCK_INLINE void add_to(S& sums, const bf16* a, std::size_t stride, int p) const {
        sums.add(a, stride, [&](int j) { return pair<0>(j, p); });
        sums.add(a + 2, stride, [&](int j) { return pair<1>(j, p); });
        sums.add(a + 4, stride, [&](int j) { return pair<2>(j, p); });
        sums.add(a + 6, stride, [&](int j) { return pair<3>(j, p); });
    }
};

struct Int8Pairs {
    const char* data;
    std::size_t block_bytes;
    static constexpr int PAIR_BYTES = 32, AT_ONCE = 1;

    PENSTOCK_INLINE __m512i pair(int block, int p) const {
        const char* at = data + block * block_bytes + p * PAIR_BYTES;
        __m512i even = _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
        __m512i odd = _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at + 16)));
        // Eight bits fit the significand of bf16: the lower halves of these floats are zero. Into those of the odd ones
        // go the upper halves of the even ones.
        __m512i down = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
        __m512i high = as<__m512i>(to_float(odd)), low = as<__m512i>(to_float(even));
        return _mm512_mask_shuffle_epi8(high, 0x3333333333333333, low, down);
    }
    PENSTOCK_INLINE void unpack(int block, int p, char* to) const { unpack_pairs(*this, block, p, to); }
    template <class S>
    PENSTOCK_INLINE void add_to(S& sums, const bf16* a, std::size_t stride, int p) const {
        sums.add(a, stride, [&](int j) { return pair(j, p); });
    }
};

struct Int4Pairs {
    const char* data;
    std::size_t block_bytes;
    static constexpr int PAIR_BYTES = 16, AT_ONCE = 1;

    // bf16 of -8..7 by nibble; the index is five bits wide, so that what is above a low nibble needs no mask.
    static PENSTOCK_INLINE __m512i table() {
        alignas(64) static constexpr bf16 VALUES[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        return _mm512_load_si512(VALUES);
    }
    PENSTOCK_INLINE __m512i bytes(int block, int p) const {
        const char* at = data + block * block_bytes + p / 16 * 256 + p % 8 * 32;
        return _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
    }
    PENSTOCK_INLINE __m512i low(int block, int p) const { return _mm512_permutexvar_epi16(bytes(block, p), table()); }
    PENSTOCK_INLINE __m512i high(int block, int p) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes(block, p), 4), table());
    }
    PENSTOCK_INLINE __m512i pair(int block, int p) const { return p & 8 ? high(block, p) : low(block, p); }
    PENSTOCK_INLINE void unpack(int block, int p, char* to) const { unpack_pairs(*this, block, p, to); }
    template <class S>
    PENSTOCK_INLINE void add_to(S& sums, const bf16* a, std::size_t stride, int p) const {
        if (p & 8) sums.add(a, stride, [&](int j) { return high(j, p); });
        else sums.add(a, stride, [&](int j) { return low(j, p); });
    }
};

// Of int8 keys and values, as int16.
struct WordPairs {
    const char* data;
    std::size_t block_bytes;
    static constexpr int PAIR_BYTES = 32;
    static constexpr bool WORDS = true;

    PENSTOCK_INLINE __m512i pair(int block, int p) const {
        const char* at = data + block * block_bytes + p * PAIR_BYTES;
        return _mm512_cvtepi8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
    }
};

template <int N> struct Count { static constexpr int value = N; };

// f(Count<rows>), rows in 1..MOST.
template <int MOST, class F>
static PENSTOCK_INLINE void with_rows(int rows, F f) {
    if constexpr (MOST > 1)
        if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    f(Count<MOST>{});
}

// f(Count<rows>, first row) over all of m rows, in tiles of nearly the same size.
template <class F>
static PENSTOCK_INLINE void each_tile(int m, F f) {
    for (int row = 0, tiles = (m + TILE_ROWS - 1) / TILE_ROWS; tiles; tiles--) {
        int rows = (m - row + tiles - 1) / tiles;
        with_rows<TILE_ROWS>(rows, [&](auto count) { f(count, row); });
        row += rows;
    }
}

// Scores of KV_BLOCKS blocks of keys, each two blocks of 16 columns.
template <class Pairs, int M, int KV_BLOCKS>
static PENSTOCK_APART void key_rows(const char* keys, std::size_t block_bytes, const std::int32_t* blocks,
                                    const bf16* q, std::size_t q_stride, int dim, float* scores, std::size_t stride,
                                    Ahead& ahead) {
    Pairs from[KV_BLOCKS];
    PENSTOCK_UNROLL for (int b = 0; b < KV_BLOCKS; b++)
        from[b] = {keys + blocks[b] * block_bytes, static_cast<std::size_t>(dim) / 2 * Pairs::PAIR_BYTES};
    Sums<M, 2 * KV_BLOCKS, Pairs::WORDS> sums;
    sums.zero();
    for (int p = 0; p < dim / 2; p++) {
        ahead.ask(2 * KV_BLOCKS * Pairs::PAIR_BYTES / 64);
        sums.add(q + 2 * p, q_stride, [&](int j) { return from[j / 2].pair(j % 2, p); });
    }
    sums.put(scores, stride);
}

// scores[m][num_blocks * 32] = queries [m][dim] times the keys of these blocks. WordPairs: both are int16, the scores
// int32.
template <class Pairs>
static void key_product(const char* keys, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                        const bf16* q, std::size_t q_stride, int m, int dim, float* scores, std::size_t stride,
                        Ahead& ahead) {
    each_tile(m, [&](auto rows, int row) {
        const bf16* from = q + row * q_stride;
        float* to = scores + row * stride;
        int b = 0;  // two at once: more sums that do not wait for each other
        for (; b + 2 <= num_blocks; b += 2, to += 2 * KV_BLOCK)
            key_rows<Pairs, rows.value, 2>(keys, block_bytes, blocks + b, from, q_stride, dim, to, stride, ahead);
        if (b < num_blocks)
            key_rows<Pairs, rows.value, 1>(keys, block_bytes, blocks + b, from, q_stride, dim, to, stride, ahead);
    });
}

// BLOCKS times 16 dimensions of values.
template <class Pairs, int M, int BLOCKS>
static PENSTOCK_APART void value_columns(const char* values, std::size_t block_bytes, const std::int32_t* blocks,
                                         int num_blocks, const bf16* chances, std::size_t stride, float* out, int dim,
                                         Ahead& ahead) {
    Sums<M, BLOCKS, Pairs::WORDS> sums;
    sums.zero();
    for (int b = 0; b < num_blocks; b++) {
        Pairs from{values + blocks[b] * block_bytes, KV_BLOCK / 2 * Pairs::PAIR_BYTES};
        const bf16* a = chances + b * KV_BLOCK;
        constexpr int LINES = BLOCKS * Pairs::PAIR_BYTES / 64;  // of a pair; 0: half a one
        if constexpr (LINES == 0) ahead.ask(KV_BLOCK / 2 * BLOCKS * Pairs::PAIR_BYTES / 64);
        for (int p = 0; p < KV_BLOCK / 2; p++) {
            if constexpr (LINES > 0) ahead.ask(LINES);
            sums.add(a + 2 * p, stride, [&](int j) { return from.pair(j, p); });
        }
    }
    sums.put(out, dim);
}

// out[m][dim] = chances [m][num_blocks * 32] times the values of these blocks, tokens in ascending order.
template <class Pairs>
static void value_product(const char* values, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                          const bf16* chances, std::size_t stride, int m, int dim, float* out, Ahead& ahead) {
    each_tile(m, [&](auto rows, int row) {
        const bf16* from = chances + row * stride;
        float* to = out + static_cast<std::size_t>(row) * dim;
        auto columns = [&](auto count, int j) {
            value_columns<Pairs, rows.value, count.value>(values + j * (KV_BLOCK / 2 * Pairs::PAIR_BYTES), block_bytes,
                                                          blocks, num_blocks, from, stride, to + j * COLUMNS, dim, ahead);
        };
        int j = 0;
        if constexpr (rows.value <= TILE_ROWS / 2)
            for (; j + 8 <= dim / COLUMNS; j += 8) columns(Count<8>{}, j);
        for (; j + 4 <= dim / COLUMNS; j += 4) columns(Count<4>{}, j);
        for (; j < dim / COLUMNS; j++) columns(Count<1>{}, j);
    });
}

}  // namespace penstock::PENSTOCK_ISA
