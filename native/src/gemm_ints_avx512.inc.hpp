// Packed matrix products of int8 activations: int8 or 4-bit weights, sums exact in int32, scaled in float32.
//
// With VPDPBUSD where the machine has it, which wants one operand unsigned: activations plus 128, or nibbles as they
// are stored; what that adds is known from sums over K and taken off. Else with 16-bit products, exact as well.
namespace penstock::PENSTOCK_ISA {

#ifdef __AVX512VNNI__
// Four consecutive k of a row, in every lane, and how they meet four k of sixteen columns.
struct Wide {
    static constexpr int OFFSET = 128;  // what is added to an activation
    __m512i four;
    static PENSTOCK_INLINE Wide of(const void* a) {
        return {_mm512_xor_si512(four_bytes(a), _mm512_set1_epi8(static_cast<char>(0x80)))};
    }
    PENSTOCK_INLINE __m512i dot(__m512i sum, __m512i w) const { return _mm512_dpbusd_epi32(sum, four, w); }
};

static PENSTOCK_INLINE __m512i dot_nibbles(__m512i sum, __m512i nibbles, __m512i a) {
    return _mm512_dpbusd_epi32(sum, nibbles, a);
}
#else
struct Wide {
    static constexpr int OFFSET = 0;
    __m512i even, odd;  // as 16-bit numbers
    static PENSTOCK_INLINE __m512i even_of(__m512i x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
    static PENSTOCK_INLINE Wide of(const void* a) {
        __m512i four = four_bytes(a);
        return {even_of(four), _mm512_srai_epi16(four, 8)};
    }
    PENSTOCK_INLINE __m512i dot(__m512i sum, __m512i w) const {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, even_of(w)));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, _mm512_srai_epi16(w, 8)));
    }
};

// Two products of a nibble and an int8 never leave 16 bits.
static PENSTOCK_INLINE __m512i dot_nibbles(__m512i sum, __m512i nibbles, __m512i a) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(nibbles, a), _mm512_set1_epi16(1)));
}
#endif

template <int M, int BLOCKS>
struct IntSums {
    __m512i of[M][BLOCKS];

    PENSTOCK_INLINE void zero() {
        PENSTOCK_UNROLL for (int i = 0; i < M; i++)
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) of[i][j] = _mm512_setzero_si512();
    }
    // What is done with the sums takes them from memory, in another order than here: more code around them, or a copy
    // that is a memcpy, and GCC 12 keeps them in memory all the time.
    PENSTOCK_INLINE void put(__m512i (&to)[BLOCKS][M]) const {
        PENSTOCK_UNROLL for (int i = 0; i < M; i++)
            PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) to[j][i] = of[i][j];
    }
    PENSTOCK_INLINE void add(const std::int8_t* a, std::size_t stride, const char* w, std::size_t block_bytes) {
        Wide four[M];
        PENSTOCK_UNROLL for (int i = 0; i < M; i++) four[i] = Wide::of(a + i * stride);
        PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) {
            __m512i weights = _mm512_load_si512(w + j * block_bytes);
            PENSTOCK_UNROLL for (int i = 0; i < M; i++) of[i][j] = four[i].dot(of[i][j], weights);
        }
    }
    // The same for nibbles, w(j) those of block j.
    template <class W>
    PENSTOCK_INLINE void add_nibbles(const std::int8_t* a, std::size_t stride, W w) {
        __m512i four[M];
        PENSTOCK_UNROLL for (int i = 0; i < M; i++) four[i] = four_bytes(a + i * stride);
        PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) {
            __m512i nibbles = w(j);
            PENSTOCK_UNROLL for (int i = 0; i < M; i++) of[i][j] = dot_nibbles(of[i][j], nibbles, four[i]);
        }
    }
};

struct IntBlocks {  // a packed matrix from some block on
    const Weight& weight;
    int block;
    std::size_t block_bytes;
    const char* data;
    IntBlocks(const Weight& w, int b, std::size_t bytes)
        : weight(w), block(b), block_bytes(bytes), data(static_cast<const char*>(w.data) + b * bytes) {}
    // What is FAR behind `at`, in the first of BLOCKS: behind these blocks lie the next ones.
    template <int BLOCKS> PENSTOCK_INLINE void fetch_far(const char* at) const {
        std::size_t after = at + FAR < data + block_bytes ? 0 : (BLOCKS - 1) * block_bytes;
        fetch_blocks<BLOCKS>(at + FAR + after, block_bytes);
    }
};

constexpr int NEVER = 0x7fffffff;  // lines

// Which lines of the blocks that come after these a tile asks for: tiles take turns, so that memory is read all the time
// and not by the first tile alone, which waits for its own lines.
template <int BLOCKS>
struct Turns {
    static constexpr int BLOCKS_AT_ONCE = BLOCKS;
    int tiles, wait;  // lines until this tile's turn
    PENSTOCK_INLINE void fetch(const char* w, std::size_t block_bytes) {
        if (wait--) return;
        wait = tiles - 1;
        PENSTOCK_UNROLL for (int j = 0; j < BLOCKS; j++) _mm_prefetch(w + (BLOCKS + j) * block_bytes, _MM_HINT_T1);
    }
};

template <int M, int BLOCKS, bool FIRST>
static PENSTOCK_APART void product_w8a8(const IntBlocks& b, const Rows& rows, int row, float* c, std::size_t c_stride, Turns<BLOCKS> turns) {
    const std::int8_t* a = static_cast<const std::int8_t*>(rows.data) + row * rows.stride;
    IntSums<M, BLOCKS> sums;
    sums.zero();
    const char* w = b.data;
    for (int k = 0; k < b.weight.k_pad; k += 4, w += 64) {
        if constexpr (FIRST) b.template fetch_far<BLOCKS>(w);
        turns.fetch(w, b.block_bytes);
        sums.add(a + k, rows.stride, w, b.block_bytes);
    }
    __m512i exact[BLOCKS][M];
    sums.put(exact);
    for (int j = 0; j < BLOCKS; j++) {
        int column = (b.block + j) * COLUMNS;
        __m512i added = _mm512_mullo_epi32(_mm512_loadu_si512(b.weight.sums + column), _mm512_set1_epi32(Wide::OFFSET));
        __m512 scale = _mm512_loadu_ps(b.weight.scale + column);
        for (int i = 0; i < M; i++) {
            __m512 sum = to_float(_mm512_sub_epi32(exact[j][i], added));
            __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(rows.scale[row + i])), scale);
            _mm512_storeu_ps(c + i * c_stride + j * COLUMNS, scaled);
        }
    }
}

template <int M, int BLOCKS, bool FIRST>
static PENSTOCK_APART void product_w4a8(const IntBlocks& b, const Rows& rows, int row, float* c, std::size_t c_stride, Turns<BLOCKS> turns) {
    int groups = b.weight.k_pad / GROUP;
    __m512i mask = _mm512_set1_epi8(15);
    for (int g = 0; g < groups; g++) {
        const float* scale = b.weight.scale + (static_cast<std::size_t>(b.block) * groups + g) * COLUMNS;
        const std::int8_t* a = static_cast<const std::int8_t*>(rows.data) + row * rows.stride + g * GROUP;
        const char* w = b.data + g * GROUP * COLUMNS / 2;
        int left = b.weight.k - g * GROUP;
        IntSums<M, BLOCKS> sums;
        sums.zero();
        for (int k = 0; k < left && k < GROUP; k += 8, w += 64) {  // the low nibbles of 64 bytes, then the high ones
            if constexpr (FIRST) b.template fetch_far<BLOCKS>(w);
            turns.fetch(w, b.block_bytes);
            sums.add_nibbles(a + k, rows.stride, [&](int j) {
                return _mm512_and_si512(_mm512_load_si512(w + j * b.block_bytes), mask);
            });
            sums.add_nibbles(a + k + 4, rows.stride, [&](int j) {
                return _mm512_and_si512(_mm512_srli_epi16(_mm512_load_si512(w + j * b.block_bytes), 4), mask);
            });
        }
        __m512i exact[BLOCKS][M];
        sums.put(exact);
        for (int i = 0; i < M; i++) {
            // Nibbles are stored plus 8.
            __m512i added = _mm512_set1_epi32(8 * rows.sums[(row + i) * rows.sums_stride + g]);
            __m512 last = _mm512_set1_ps(g == groups - 1 ? rows.scale[row + i] : 1.0f);
            for (int j = 0; j < BLOCKS; j++) {
                float* to = c + i * c_stride + j * COLUMNS;
                __m512 of_block = _mm512_loadu_ps(scale + static_cast<std::size_t>(j) * groups * COLUMNS);
                __m512 before = g ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                __m512 sum = _mm512_fmadd_ps(to_float(_mm512_sub_epi32(exact[j][i], added)), of_block, before);
                _mm512_storeu_ps(to, _mm512_mul_ps(sum, last));
            }
        }
    }
}

// product(Count<rows>, Count<is first>, first row, first block, c, turns) over all of m rows and cols columns.
template <int BLOCKS, class F>
static PENSTOCK_INLINE void each_rows(int m, int block, float* c, std::size_t c_stride, F product) {
    if (m <= MOST_ROWS<BLOCKS>)
        return with_rows<MOST_ROWS<BLOCKS>>(m, [&](auto rows) {
            product(rows, Count<1>{}, 0, block, c, Turns<BLOCKS>{1, NEVER});
        });
    int tiles = (m + TILE_ROWS - 1) / TILE_ROWS, tile = 0;
    each_tile(m, [&](auto rows, int row) {
        Turns<BLOCKS> turns{tiles, tile++};
        if (row == 0) product(rows, Count<1>{}, row, block, c, turns);
        else product(rows, Count<0>{}, row, block, c + row * c_stride, turns);
    });
}

template <class F>
static PENSTOCK_INLINE void each_piece(int m, int col, int cols, float* c, std::size_t c_stride, F product) {
    for (int left = cols / COLUMNS, block = col / COLUMNS, now; left; left -= now, block += now, c += now * COLUMNS) {
        now = blocks_at_once(m, left);
        if (now == 4) each_rows<4>(m, block, c, c_stride, product);
        else if (now == 2) each_rows<2>(m, block, c, c_stride, product);
        else each_rows<1>(m, block, c, c_stride, product);
    }
}

static void gemm_w8a8(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                      std::size_t c_stride) {
    std::size_t block_bytes = static_cast<std::size_t>(weight.k_pad) * COLUMNS;
    each_piece(m, col, cols, c, c_stride, [&](auto count, auto first, int row, int block, float* to, auto turns) {
        IntBlocks from(weight, block, block_bytes);
        product_w8a8<count.value, turns.BLOCKS_AT_ONCE, first.value == 1>(from, rows, row, to, c_stride, turns);
    });
}

static void gemm_w4a8(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                      std::size_t c_stride) {
    std::size_t block_bytes = static_cast<std::size_t>(weight.k_pad) * COLUMNS / 2;
    each_piece(m, col, cols, c, c_stride, [&](auto count, auto first, int row, int block, float* to, auto turns) {
        IntBlocks from(weight, block, block_bytes);
        product_w4a8<count.value, turns.BLOCKS_AT_ONCE, first.value == 1>(from, rows, row, to, c_stride, turns);
    });
}

}  // namespace penstock::PENSTOCK_ISA
