// Packed matrix products with 512-bit vectors: `m` rows by whole blocks of 16 columns, every weight format.
//
// Rows that fit one tile read the weights once, straight into registers. More rows go through K in chunks of one
// quantization group: four blocks' chunk lies in L1, unpacked to bf16 if it has to be, while all rows pass over it; the
// sums rest in `c` between chunks, which changes no bit. Formats with int8 activations: gemm_ints_avx512.inc.hpp.
#include "product_avx512.inc.hpp"
#include "rare.inc.hpp"
#include "gemm_ints_avx512.inc.hpp"

namespace penstock::PENSTOCK_ISA {

constexpr int ROWS_AT_ONCE = 48, MAX_COLUMNS = 128;

constexpr int CHUNK_PAIRS = GROUP / 2;
template <class Pairs> constexpr int LINE_PAIRS = 64 / Pairs::PAIR_BYTES;

// What becomes of the sums of a chunk.
struct Continued {  // c goes on
    bool begins;
    template <class S> PENSTOCK_INLINE void start(S& sums, const float* c, std::size_t c_stride) const {
        if (begins) sums.zero();
        else sums.get(c, c_stride);
    }
    template <class S> PENSTOCK_INLINE void end(const S& sums, float* c, std::size_t c_stride) const {
        sums.put(c, c_stride);
    }
};

struct Scaled {  // c += sums * scale
    bool begins;
    const float* scale;         // of the first block's group
    std::size_t scale_stride;  // from block to block
    template <class S> PENSTOCK_INLINE void start(S& sums, const float*, std::size_t) const { sums.zero(); }
    template <int M, int BLOCKS>
    PENSTOCK_INLINE void end(Sums<M, BLOCKS>& sums, float* c, std::size_t c_stride) const {
        PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) {
            __m512 factor = _mm512_loadu_ps(scale + j * scale_stride);
            PENSTOCK_UNROLL for (int i = 0; i < M; i++) {
                float* to = c + i * c_stride + j * COLUMNS;
                __m512 before = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sums.of[i][j], factor, before));
            }
        }
    }
};

// M rows by BLOCKS blocks over a chunk of K; fetch(p) asks for what is needed later, and must be inlined: GCC takes what
// does nothing but ask for a function without effects, and drops the call.
template <int M, int BLOCKS, class Pairs, class Chunk, class Fetch>
static PENSTOCK_APART void product(const Pairs& w, const Chunk& chunk, const bf16* a, std::size_t stride, int num_pairs, float* c,
                    std::size_t c_stride, Fetch fetch) {
    Sums<M, BLOCKS> sums;
    chunk.start(sums, c, c_stride);
    for (int p = 0; p < num_pairs; p += Pairs::AT_ONCE) {
        fetch(p);
        w.add_to(sums, a + 2 * p, stride, p);
    }
    chunk.end(sums, c, c_stride);
}

// A packed matrix of pairs and its scales, from some block on.
template <class Pairs, bool GROUPS>
struct Blocks {
    Pairs w;
    int num_pairs;
    const float* scale;
    std::size_t scale_stride;

    auto chunk(int p) const {
        if constexpr (GROUPS) return Scaled{p == 0, scale + p / CHUNK_PAIRS * COLUMNS, scale_stride};
        else return Continued{p == 0};
    }
    Pairs from(int p) const {
        Pairs pairs = w;
        pairs.data += p * Pairs::PAIR_BYTES;
        return pairs;
    }
};

// Few rows: weights go straight from memory into registers.
template <int BLOCKS, class Pairs, bool GROUPS>
static void stream_blocks(const Blocks<Pairs, GROUPS>& b, const bf16* a, std::size_t stride, int m, float* c,
                          std::size_t c_stride) {
    constexpr int FAR_PAIRS = FAR / Pairs::PAIR_BYTES, LINES = Pairs::AT_ONCE * Pairs::PAIR_BYTES / 64;
    int step = GROUPS ? CHUNK_PAIRS : b.num_pairs;
    for (int p = 0; p < b.num_pairs; p += step) {
        int num = b.num_pairs - p < step ? b.num_pairs - p : step;
        Pairs from = b.from(p);
        // Behind these blocks lie the next ones.
        std::size_t after = p + num < b.num_pairs ? 0 : (BLOCKS - 1) * b.w.block_bytes;
        auto fetch = [&](int q) PENSTOCK_ALWAYS {
            if (q % LINE_PAIRS<Pairs>) return;
            const char* far = from.data + q * Pairs::PAIR_BYTES + FAR + (q + FAR_PAIRS < num ? 0 : after);
            PENSTOCK_UNROLL for (int i = 0; i < (LINES ? LINES : 1); i++) fetch_blocks<BLOCKS>(far + i * 64, from.block_bytes);
        };
        with_rows<MOST_ROWS<BLOCKS>>(m, [&](auto rows) {
            product<rows.value, BLOCKS>(from, b.chunk(p), a + 2 * p, stride, num, c, c_stride, fetch);
        });
    }
}

// Many rows: all of them pass over a chunk of weights that lies in L1, and fetch the next one into L2 on the way.
template <int BLOCKS, class Pairs, bool GROUPS>
static void reuse_blocks(const Blocks<Pairs, GROUPS>& b, const bf16* a, std::size_t stride, int m, float* c,
                         std::size_t c_stride) {
    constexpr bool UNPACK = Pairs::PAIR_BYTES != Bf16Pairs::PAIR_BYTES;
    alignas(64) char panel[UNPACK ? BLOCKS * CHUNK_PAIRS * 64 : 64];
    int tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
    for (int p = 0; p < b.num_pairs; p += CHUNK_PAIRS) {
        int num = b.num_pairs - p < CHUNK_PAIRS ? b.num_pairs - p : CHUNK_PAIRS;
        Pairs from = b.from(p);
        if constexpr (UNPACK)
            for (int j = 0; j < BLOCKS; j++)
                for (int q = 0; q < num; q += 16) from.unpack(j, q, panel + (j * CHUNK_PAIRS + q) * 64);
        auto source = [&] {
            if constexpr (UNPACK) return Bf16Pairs{panel, CHUNK_PAIRS * 64};
            else return from;
        }();
        std::size_t next = num * Pairs::PAIR_BYTES + (p + num < b.num_pairs ? 0 : (BLOCKS - 1) * b.w.block_bytes);
        int tile = 0;
        each_tile(m, [&](auto rows, int row) {
            int wait = tile++;  // tiles take turns: every line once
            auto fetch = [&](int q) PENSTOCK_ALWAYS {
                if (q % LINE_PAIRS<Pairs>) return;
                if (wait--) return;
                wait = tiles - 1;
                fetch_blocks<BLOCKS>(from.data + q * Pairs::PAIR_BYTES + next, from.block_bytes);
            };
            product<rows.value, BLOCKS>(source, b.chunk(p), a + row * stride + 2 * p, stride, num, c + row * c_stride,
                                        c_stride, fetch);
        });
    }
}

template <int BLOCKS, class B>
static void any_rows(const B& b, const bf16* a, std::size_t stride, int m, float* c, std::size_t c_stride) {
    if (m <= MOST_ROWS<BLOCKS>) stream_blocks<BLOCKS>(b, a, stride, m, c, c_stride);
    else reuse_blocks<BLOCKS>(b, a, stride, m, c, c_stride);
}

template <class Pairs, bool GROUPS = false>
static void gemm_pairs(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                       std::size_t c_stride) {
    // Only K is read of the activations, up to K_ALIGN: a group's padding is the weight's alone.
    int num_pairs = (weight.k + K_ALIGN - 1) / K_ALIGN * (K_ALIGN / 2);
    std::size_t block_bytes = static_cast<std::size_t>(weight.k_pad) / 2 * Pairs::PAIR_BYTES;
    std::size_t scale_stride = static_cast<std::size_t>(weight.k_pad) / GROUP * COLUMNS;
    const bf16* a = static_cast<const bf16*>(rows.data);
    for (int left = cols / COLUMNS, block = col / COLUMNS, now; left; left -= now, block += now, c += now * COLUMNS) {
        Blocks<Pairs, GROUPS> b{{static_cast<const char*>(weight.data) + block * block_bytes, block_bytes}, num_pairs,
                                weight.scale + block * scale_stride, scale_stride};
        if constexpr (requires { b.w.exponents; }) b.w.exponents = weight.exponents + block * 32;
        now = blocks_at_once(m, left);
        if (now == 4) any_rows<4>(b, a, rows.stride, m, c, c_stride);
        else if (now == 2) any_rows<2>(b, a, rows.stride, m, c, c_stride);
        else any_rows<1>(b, a, rows.stride, m, c, c_stride);
    }
}

static void gemm_int8(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                      std::size_t c_stride) {
    gemm_pairs<Int8Pairs>(weight, rows, m, col, cols, c, c_stride);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < cols; j += COLUMNS)
            store(c + i * c_stride + j, load(c + i * c_stride + j) * load(weight.scale + col + j));
}

static void gemm_bf12(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                      std::size_t c_stride) {
    gemm_pairs<Bf12Pairs>(weight, rows, m, col, cols, c, c_stride);
    add_rare(weight, rows, m, col, cols, c, c_stride);
}

static void gemm(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c, std::size_t c_stride) {
    switch (weight.format) {
        case Format::BF16: return gemm_pairs<Bf16Pairs>(weight, rows, m, col, cols, c, c_stride);
        case Format::INT8: return gemm_int8(weight, rows, m, col, cols, c, c_stride);
        case Format::W8A8: return gemm_w8a8(weight, rows, m, col, cols, c, c_stride);
        case Format::INT4: return gemm_pairs<Int4Pairs, true>(weight, rows, m, col, cols, c, c_stride);
        case Format::W4A8: return gemm_w4a8(weight, rows, m, col, cols, c, c_stride);
        case Format::BF12: return gemm_bf12(weight, rows, m, col, cols, c, c_stride);
    }
}

}  // namespace penstock::PENSTOCK_ISA
