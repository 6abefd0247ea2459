// Packed matrix products on AMX tiles: 32 rows by two blocks at a time, every weight format.
//
// A block of bf16 or int8 weights is a column of 1 KiB tiles; other formats become such tiles in L1. Activations are
// loaded from their rows. Tiles have as many rows as are left, so that nothing past the last row is read, and no tile
// state outlives a call. A tile product adds a whole tile of K to a sum at once, the same way for every row and
// column; tiles of K ascend.
namespace penstock::PENSTOCK_ISA {

// Sixteen rows to a tile, 32 to a step: above 32 rows a panel of weights is used from L1 again.
constexpr int ROWS_AT_ONCE = 256, MAX_COLUMNS = 64;

constexpr int TILE = 16;            // rows of a tile; 64 bytes each
constexpr int TILE_BYTES = 1024;
constexpr int STEP = 2 * TILE;      // rows that pass over the weights at once
constexpr int PANEL_TILES = 16;     // tiles of K of two blocks that lie in L1 (32 of 48 KiB) while all rows pass
constexpr int FAR_TILES = 8;        // fetched ahead where rows pass only once

// Tile registers: 0, 1: sums of the first sixteen rows; 2, 3: of the others; 4, 5: their activations; 6, 7: weights.
struct alignas(64) TileConfig {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
};

struct TileConfigs {
    TileConfig of[STEP + 1];  // by rows
};

constexpr TileConfigs tile_configs() {
    TileConfigs configs{};
    for (int rows = 1; rows <= STEP; rows++) {
        TileConfig& config = configs.of[rows];
        config.palette = 1;
        for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = TILE;
        int first = rows < TILE ? rows : TILE, second = rows > TILE ? rows - TILE : TILE;
        config.rows[0] = config.rows[1] = config.rows[4] = static_cast<std::uint8_t>(first);
        config.rows[2] = config.rows[3] = config.rows[5] = static_cast<std::uint8_t>(second);
    }
    return configs;
}

// In memory, whole: an instruction that reads it through a pointer tells the compiler only of the first bytes.
alignas(64) static constexpr TileConfigs TILE_CONFIGS = tile_configs();

// Tile loads do not tell the compiler what they read.
static PENSTOCK_INLINE void tiles_written() { asm volatile("" ::: "memory"); }

// ---- where the tiles of two consecutive blocks come from ----

struct StoredTiles {  // bf16, W8A8, and what is unpacked already
    static constexpr int STORED_BYTES = TILE_BYTES;
    const char* data;
    std::size_t block_bytes;
    PENSTOCK_INLINE const char* tile(int block, int t, char*) const {
        return data + block * block_bytes + t * TILE_BYTES;
    }
};

template <class Pairs>
struct PairTiles : Pairs {  // BF12, INT8, INT4: a tile is 16 pairs of k
    static constexpr int STORED_BYTES = TILE * Pairs::PAIR_BYTES;
    PENSTOCK_INLINE const char* tile(int block, int t, char* to) const {
        this->unpack(block, t * TILE, to);
        tiles_written();
        return to;
    }
};

struct NibbleTiles {  // W4A8: a tile is 16 quads of k, two to 64 bytes
    static constexpr int STORED_BYTES = TILE_BYTES / 2;
    const char* data;
    std::size_t block_bytes;
    PENSTOCK_INLINE const char* tile(int block, int t, char* to) const {
        const char* from = data + block * block_bytes + t * STORED_BYTES;
        __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
        for (int i = 0; i < TILE / 2; i++) {
            __m512i both = _mm512_load_si512(from + i * 64);
            __m512i low = _mm512_and_si512(both, mask), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            _mm512_store_si512(to + i * 128, _mm512_sub_epi8(low, eight));
            _mm512_store_si512(to + i * 128 + 64, _mm512_sub_epi8(high, eight));
        }
        tiles_written();
        return to;
    }
};

// ---- products ----

struct TileRows {  // rows of activations; a tile of K is 64 bytes of each
    const char* data;
    std::size_t bytes;  // from row to row
    int num;            // all with the loaded configuration: a multiple of STEP, or fewer than STEP
};

// What the sums begin with.
enum class Begin { ZERO, C };

// Up to 32 rows by one or two blocks over `num` tiles of K, into c, whose elements are float32, or int32 if INTS.
// PASSES: rows come by again and again, and weights should not leave L1 for activations.
template <bool INTS, int ROW_TILES, int BLOCKS, bool PASSES, class Tiles>
static PENSTOCK_INLINE void tile_product(const Tiles& w, const char* a, std::size_t a_bytes, int num,
                                         Begin begin, void* c,
                                         std::size_t c_bytes) {
    // Unpacked tiles are written some products before they are written again.
    alignas(64) char unpacked[Tiles::STORED_BYTES == TILE_BYTES ? 64 : 4 * 2 * TILE_BYTES];
    char* c1 = static_cast<char*>(c) + TILE * c_bytes;
    char* c0 = static_cast<char*>(c);
    if (begin == Begin::ZERO) {
        _tile_zero(0);
        if constexpr (BLOCKS == 2) _tile_zero(1);
        if constexpr (ROW_TILES == 2) _tile_zero(2);
        if constexpr (ROW_TILES == 2 && BLOCKS == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, c0, c_bytes);
        if constexpr (BLOCKS == 2) _tile_loadd(1, c0 + 64, c_bytes);
        if constexpr (ROW_TILES == 2) _tile_loadd(2, c1, c_bytes);
        if constexpr (ROW_TILES == 2 && BLOCKS == 2) _tile_loadd(3, c1 + 64, c_bytes);
    }
    for (int t = 0; t < num; t++, a += 64) {
        char* slots = unpacked + (Tiles::STORED_BYTES == TILE_BYTES ? 0 : t % 4 * 2 * TILE_BYTES);
        if constexpr (!PASSES)
            for (int line = 0; line < Tiles::STORED_BYTES; line += 64)
                fetch_blocks<BLOCKS, _MM_HINT_T0>(w.data + (t + FAR_TILES) * Tiles::STORED_BYTES + line, w.block_bytes);
        const char* w0 = w.tile(0, t, slots);
        if constexpr (PASSES) _tile_stream_loadd(4, a, a_bytes);
        else _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, w0, 64);
        if constexpr (INTS) _tile_dpbssd(0, 4, 6);
        else _tile_dpbf16ps(0, 4, 6);
        if constexpr (BLOCKS == 2) {
            const char* w1 = w.tile(1, t, slots + TILE_BYTES);
            _tile_loadd(7, w1, 64);
            if constexpr (INTS) _tile_dpbssd(1, 4, 7);
            else _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROW_TILES == 2) {
            if constexpr (PASSES) _tile_stream_loadd(5, a + TILE * a_bytes, a_bytes);
            else _tile_loadd(5, a + TILE * a_bytes, a_bytes);
            if constexpr (INTS) _tile_dpbssd(2, 5, 6);
            else _tile_dpbf16ps(2, 5, 6);
            if constexpr (BLOCKS == 2 && INTS) _tile_dpbssd(3, 5, 7);
            if constexpr (BLOCKS == 2 && !INTS) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c0, c_bytes);
    if constexpr (BLOCKS == 2) _tile_stored(1, c0 + 64, c_bytes);
    if constexpr (ROW_TILES == 2) _tile_stored(2, c1, c_bytes);
    if constexpr (ROW_TILES == 2 && BLOCKS == 2) _tile_stored(3, c1 + 64, c_bytes);
}

// All rows over a stretch of K. each(first row, rows, product): `product(begin, c, c_bytes)` computes these rows.
template <bool INTS, int BLOCKS, class Tiles, class Each>
static PENSTOCK_INLINE void pass_rows(const Tiles& w, const TileRows& rows, int first_tile, int num, Each each) {
    Tiles from = w;
    from.data += first_tile * Tiles::STORED_BYTES;
    const char* a = rows.data + first_tile * 64;
    if (rows.num <= TILE) {
        each(0, rows.num, [&](Begin begin, void* c, std::size_t c_bytes) {
            tile_product<INTS, 1, BLOCKS, false>(from, a, rows.bytes, num, begin, c, c_bytes);
        });
    } else if (rows.num <= STEP) {
        each(0, rows.num, [&](Begin begin, void* c, std::size_t c_bytes) {
            tile_product<INTS, 2, BLOCKS, false>(from, a, rows.bytes, num, begin, c, c_bytes);
        });
    } else {
        alignas(64) char panel[Tiles::STORED_BYTES == TILE_BYTES ? 64 : BLOCKS * PANEL_TILES * TILE_BYTES];
        StoredTiles ready{from.data, from.block_bytes};
        if constexpr (Tiles::STORED_BYTES != TILE_BYTES) {
            ready = {panel, PANEL_TILES * TILE_BYTES};
            for (int j = 0; j < BLOCKS; j++)
                for (int t = 0; t < num; t++) from.tile(j, t, panel + (j * PANEL_TILES + t) * TILE_BYTES);
        }
        for (int row = 0; row < rows.num; row += STEP)
            each(row, STEP, [&](Begin begin, void* c, std::size_t c_bytes) {
                tile_product<INTS, 2, BLOCKS, true>(ready, a + row * rows.bytes, rows.bytes, num, begin, c, c_bytes);
            });
    }
}

// Sums over all of K, in c; int32 if INTS.
template <bool INTS, int BLOCKS, class Tiles>
static void sum_tiles(const Tiles& w, const TileRows& rows, int num_tiles, float* c, std::size_t c_stride) {
    int step = rows.num > STEP ? PANEL_TILES : num_tiles;
    for (int t = 0; t < num_tiles; t += step) {
        int num = num_tiles - t < step ? num_tiles - t : step;
        pass_rows<INTS, BLOCKS>(w, rows, t, num, [&](int row, int, auto product) {
            product(t ? Begin::C : Begin::ZERO, c + row * c_stride, c_stride * sizeof(float));
        });
    }
}

// The sums of each quantization group, scaled, are added in float32. A group is two or four tiles.
template <bool INTS, int BLOCKS, class Tiles>
static void sum_groups(const Tiles& w, const TileRows& rows, int num_tiles, const float* scale,
                       std::size_t scale_stride,
                       float* c, std::size_t c_stride) {
    constexpr int GROUP_TILES = INTS ? GROUP / 64 : GROUP / 32;
    alignas(64) float sums[STEP][BLOCKS * COLUMNS];
    for (int t = 0; t < num_tiles; t += GROUP_TILES) {
        int num = num_tiles - t < GROUP_TILES ? num_tiles - t : GROUP_TILES;
        const float* factor = scale + t / GROUP_TILES * COLUMNS;
        pass_rows<INTS, BLOCKS>(w, rows, t, num, [&](int row, int now, auto product) {
            product(Begin::ZERO, sums, sizeof sums[0]);
            for (int j = 0; j < BLOCKS; j++) {
                __m512 of_block = _mm512_loadu_ps(factor + j * scale_stride);
                for (int i = 0; i < now; i++) {
                    float* to = c + (row + i) * c_stride + j * COLUMNS;
                    __m512 sum = _mm512_load_ps(&sums[i][j * COLUMNS]);
                    if constexpr (INTS) sum = to_float(_mm512_castps_si512(sum));
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, of_block, t ? _mm512_loadu_ps(to) : _mm512_setzero_ps()));
                }
            }
        });
    }
}

// ---- formats ----

template <class Tiles, bool INTS, bool GROUPS>
static void gemm_tiles(const Weight& weight, const TileRows& rows, int col, int cols, float* c, std::size_t c_stride) {
    constexpr int TILE_K = INTS ? 64 : 32;
    // Only K is read of the activations, up to K_ALIGN: a group's padding is the weight's alone.
    int num_tiles = (weight.k + K_ALIGN - 1) / K_ALIGN * (K_ALIGN / TILE_K);
    std::size_t block_bytes = static_cast<std::size_t>(weight.k_pad) / TILE_K * Tiles::STORED_BYTES;
    std::size_t scale_stride = static_cast<std::size_t>(weight.k_pad) / GROUP * COLUMNS;
    for (int left = cols / COLUMNS, block = col / COLUMNS, now; left; left -= now, block += now, c += now * COLUMNS) {
        now = left >= 2 ? 2 : 1;
        Tiles w{};
        w.data = static_cast<const char*>(weight.data) + block * block_bytes, w.block_bytes = block_bytes;
        if constexpr (requires { w.exponents; }) w.exponents = weight.exponents + block * 32;
        if constexpr (GROUPS) {
            const float* scale = weight.scale + block * scale_stride;
            if (now == 2) sum_groups<INTS, 2>(w, rows, num_tiles, scale, scale_stride, c, c_stride);
            else sum_groups<INTS, 1>(w, rows, num_tiles, scale, scale_stride, c, c_stride);
        } else {
            if (now == 2) sum_tiles<INTS, 2>(w, rows, num_tiles, c, c_stride);
            else sum_tiles<INTS, 1>(w, rows, num_tiles, c, c_stride);
        }
    }
}

static void gemm_rows(const Weight& weight, const TileRows& rows, int col, int cols, float* c, std::size_t c_stride) {
    switch (weight.format) {
        case Format::BF16: return gemm_tiles<StoredTiles, false, false>(weight, rows, col, cols, c, c_stride);
        case Format::INT8: return gemm_tiles<PairTiles<Int8Pairs>, false, false>(weight, rows, col, cols, c, c_stride);
        case Format::W8A8: return gemm_tiles<StoredTiles, true, false>(weight, rows, col, cols, c, c_stride);
        case Format::INT4: return gemm_tiles<PairTiles<Int4Pairs>, false, true>(weight, rows, col, cols, c, c_stride);
        case Format::BF12: return gemm_tiles<PairTiles<Bf12Pairs>, false, false>(weight, rows, col, cols, c, c_stride);
        case Format::W4A8: return gemm_tiles<NibbleTiles, true, true>(weight, rows, col, cols, c, c_stride);
    }
}

static void scale_results(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c,
                          std::size_t c_stride) {
    if (weight.format == Format::BF16 || weight.format == Format::BF12 || weight.format == Format::INT4) return;
    for (int i = 0; i < m; i++) {
        vf of_row = all(rows.scale ? rows.scale[i] : 1.0f);
        for (int j = 0; j < cols; j += COLUMNS) {
            float* to = c + i * c_stride + j;
            vf sum = load(to);
            if (weight.format == Format::W8A8) sum = as<vf>(to_float(as<__m512i>(sum)));  // c held integers
            if (rows.scale) sum = sum * of_row;
            store(to, weight.format == Format::W4A8 ? sum : sum * load(weight.scale + col + j));
        }
    }
}

static void gemm(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c, std::size_t c_stride) {
    std::size_t element = rows.scale ? 1 : 2;
    TileRows tiles{static_cast<const char*>(rows.data), rows.stride * element, m / STEP * STEP};
    int rest = m - tiles.num;
    if (tiles.num) {
        _tile_loadconfig(&TILE_CONFIGS.of[STEP]);
        gemm_rows(weight, tiles, col, cols, c, c_stride);
    }
    if (rest) {
        _tile_loadconfig(&TILE_CONFIGS.of[rest]);
        TileRows last{tiles.data + tiles.num * tiles.bytes, tiles.bytes, rest};
        gemm_rows(weight, last, col, cols, c + tiles.num * c_stride, c_stride);
    }
    _tile_release();
    if (weight.format == Format::BF12) add_rare(weight, rows, m, col, cols, c, c_stride);
    scale_results(weight, rows, m, col, cols, c, c_stride);
}

}  // namespace penstock::PENSTOCK_ISA
