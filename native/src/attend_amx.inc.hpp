// The two products of attention on AMX tiles, for bf16 keys and values and heads of a multiple of 32.
//
// As they lie in a block, 32 dimensions of 16 tokens' keys are a tile, and 16 dimensions of 32 tokens' values. Up to 32
// query rows pass over a tile at once, so that a prompt's attention is bound by softmax rather than products; a few
// rows of a decode take tiles of as many rows, and memory's time. Everything else is computed with vectors.
namespace penstock::PENSTOCK_ISA {

// Sums of up to 32 rows by two tiles of columns, in tile registers 0 to 3, as tile_configs() has them.
template <int ROW_TILES>
struct TileSums {
    PENSTOCK_INLINE void zero() {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (ROW_TILES == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    // 32 of K: a row's are 64 bytes of `a`; `first`, `second`: their tiles of columns.
    PENSTOCK_INLINE void add(const bf16* a, std::size_t stride, const char* first, const char* second) {
        _tile_loadd(4, a, stride * sizeof(bf16));
        _tile_loadd(6, first, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (ROW_TILES == 2) {
            _tile_loadd(5, a + TILE * stride, stride * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    PENSTOCK_INLINE void put(float* c, std::size_t stride) const {
        _tile_stored(0, c, stride * sizeof(float));
        _tile_stored(1, c + TILE, stride * sizeof(float));
        if constexpr (ROW_TILES == 2) {
            c += TILE * stride;
            _tile_stored(2, c, stride * sizeof(float));
            _tile_stored(3, c + TILE, stride * sizeof(float));
        }
    }
};

struct TileProducts {
    static constexpr int ROWS = STEP;
    static constexpr bool WORDS = false;
    // One more cache line from row to row: sixteen rows of a tile do not fall into a few sets.
    static constexpr int SCORES = ATTENTION_SPAN + 16, CHANCES = ATTENTION_SPAN + 32;
    static constexpr int PAIR_LINES = 2 * TILE_BYTES / 64;  // of two tiles

    static void begin(int m) { _tile_loadconfig(&TILE_CONFIGS.of[m]); }

    template <int ROW_TILES>
    static PENSTOCK_APART void key_tiles(const char* keys, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                                         const bf16* q, std::size_t q_stride, int dim, float* scores,
                                         std::size_t stride, Ahead& ahead) {
        for (int b = 0; b < num_blocks; b++) {
            const char* first = keys + blocks[b] * block_bytes;
            const char* second = first + dim / 32 * TILE_BYTES;
            TileSums<ROW_TILES> sums;
            sums.zero();
            for (int t = 0; t < dim / 32; t++) {
                ahead.ask(PAIR_LINES);
                sums.add(q + t * 32, q_stride, first + t * TILE_BYTES, second + t * TILE_BYTES);
            }
            sums.put(scores + b * KV_BLOCK, stride);
        }
    }

    template <int ROW_TILES>
    static PENSTOCK_APART void value_tiles(const char* values, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                                           const bf16* chances, std::size_t stride, int dim, float* out, Ahead& ahead) {
        for (int j = 0; j < dim / TILE; j += 2) {
            TileSums<ROW_TILES> sums;
            sums.zero();
            for (int b = 0; b < num_blocks; b++) {
                const char* first = values + blocks[b] * block_bytes + j * TILE_BYTES;
                ahead.ask(PAIR_LINES);
                sums.add(chances + b * KV_BLOCK, stride, first, first + TILE_BYTES);
            }
            sums.put(out + j * TILE, dim);
        }
    }

    // As key_product and value_product.
    static void keys(const char* keys, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks, const bf16* q,
                     std::size_t q_stride, int m, int dim, float* scores, std::size_t stride, Ahead& ahead) {
        tiles_written();
        if (m <= TILE) key_tiles<1>(keys, block_bytes, blocks, num_blocks, q, q_stride, dim, scores, stride, ahead);
        else key_tiles<2>(keys, block_bytes, blocks, num_blocks, q, q_stride, dim, scores, stride, ahead);
        tiles_written();
    }
    static void values(const char* values, std::size_t block_bytes, const std::int32_t* blocks, int num_blocks,
                       const bf16* chances, std::size_t stride, int m, int dim, float* out, Ahead& ahead) {
        tiles_written();
        if (m <= TILE) value_tiles<1>(values, block_bytes, blocks, num_blocks, chances, stride, dim, out, ahead);
        else value_tiles<2>(values, block_bytes, blocks, num_blocks, chances, stride, dim, out, ahead);
        tiles_written();
    }
};

static void attend_on_tiles(const AttendPiece& piece) {
    if (piece.format != KVFormat::BF16 || piece.head_dim % 32) return attend(piece);
    attend_with<TileProducts>(piece);
    _tile_release();
}

}  // namespace penstock::PENSTOCK_ISA
