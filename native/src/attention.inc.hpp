// Attention of one piece of the batch over paged keys and values, as two small matrix products per KV block.
//
// A block's keys are packed as a weight matrix [tokens, D], its values as one [D, tokens]: the products of
// gemm_*.inc.hpp serve both. A span's scores are held at once, so its softmax needs no running maximum.
namespace penstock::PENSTOCK_ISA {

constexpr int ATTEND_ROWS = 6;  // query rows whose sums fit the registers

struct AttendScratch {
    alignas(64) float scores[ATTEND_ROWS][ATTENTION_SPAN];
    alignas(64) bf16 chances[ATTEND_ROWS][ATTENTION_SPAN];
    alignas(64) bf16 queries[ATTEND_ROWS][256 + 32];
};

// Softmax over what row `r` sees of the span: chances[r], rounded to bf16, and the sum of the unrounded ones.
static inline void soften(AttendScratch& s, int r, int first, int last, int begin, int num, float scale, float* max_out, float* sum_out) {
    float* scores = s.scores[r];
    vf most = all(-INF);
    vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < num; i += 16) {
        vi position = lane + (begin + i);
        vf x = choose((position >= first) & (position <= last), load(scores + i) * scale, all(-INF));
        store(scores + i, x);
        most = max(x, most);
    }
    float top = largest(most);
    if (top == -INF) {
        for (int i = 0; i < num; i++) s.chances[r][i] = 0;
        *max_out = -INF;
        *sum_out = 0;
        return;
    }
    vf total = all(0);
    for (int i = 0; i < num; i += 16) {
        vf p = exp2(load(scores + i) - top);
        total += p;
        store(s.chances[r] + i, p);
    }
    *max_out = top;
    *sum_out = sum(total);
}

// Ask for one head of a block, keys or values.
static inline void fetch(const char* from, int dim) {
    for (int i = 0; i < dim * KV_BLOCK * 2; i += 64) __builtin_prefetch(from + i, 0, 2);
}

static void attend(const AttendPiece& piece) {
    static thread_local AttendScratch s;
    int rows = piece.num_tokens * piece.group, dim = piece.head_dim;
    for (int r0 = 0; r0 < rows; r0 += ATTEND_ROWS) {
        int m = rows - r0 < ATTEND_ROWS ? rows - r0 : ATTEND_ROWS;
        int t0 = r0 / piece.group, t1 = (r0 + m - 1) / piece.group;
        int last = piece.position + t1;  // the furthest that any of these rows sees
        int first = piece.window ? piece.position + t0 - piece.window + 1 : 0;
        if (first < piece.span_begin) first = piece.span_begin;
        int begin = first / KV_BLOCK * KV_BLOCK;
        int end = last + 1 < piece.span_end ? last + 1 : piece.span_end;
        int num_blocks = end > begin ? (end - begin + KV_BLOCK - 1) / KV_BLOCK : 0;
        float* out = piece.out + static_cast<std::size_t>(r0) * dim;
        if (num_blocks == 0) {
            for (int r = 0; r < m; r++) { piece.max[r0 + r] = -INF; piece.sum[r0 + r] = 0; }
            for (int i = 0; i < m * dim; i++) out[i] = 0;
            continue;
        }
        for (int r = 0; r < m; r++) {
            int t = (r0 + r) / piece.group, head = (r0 + r) % piece.group;
            __builtin_memcpy(s.queries[r], piece.q + t * piece.q_stride + static_cast<std::size_t>(head) * dim, dim * sizeof(bf16));
        }
        const std::int32_t* blocks = piece.blocks + begin / KV_BLOCK;
        constexpr std::size_t Q_STRIDE = sizeof s.queries[0] / sizeof(bf16);
        for (int b = 0; b < num_blocks; b++) {
            if (r0 == 0) {  // a block is a page or less: no hardware reads ahead into the next
                if (b + 1 < num_blocks) fetch(piece.pool + blocks[b + 1] * piece.block_bytes, dim);
                fetch(piece.pool + piece.value_bytes + blocks[b] * piece.block_bytes, dim);
            }
            key_product(piece.pool + blocks[b] * piece.block_bytes, s.queries[0], Q_STRIDE, m, dim, s.scores[0] + b * KV_BLOCK, ATTENTION_SPAN);
        }
        for (int r = 0; r < m; r++) {
            int position = piece.position + (r0 + r) / piece.group;
            int from = piece.window ? position - piece.window + 1 : 0;
            soften(s, r, from, position, begin, num_blocks * KV_BLOCK, piece.scale, piece.max + r0 + r, piece.sum + r0 + r);
        }
        value_product(piece.pool + piece.value_bytes, piece.block_bytes, blocks, num_blocks, s.chances[0], ATTENTION_SPAN, m, dim, out);
    }
}

static void merge(const float* out, const float* max_of, const float* sum_of, int rows, int dim, float* to, float* to_max,
                  float* to_sum) {
    for (int r = 0; r < rows; r++) {
        float top = max_of[r] > to_max[r] ? max_of[r] : to_max[r];
        if (top == -INF) continue;
        vf keep = exp2(all(to_max[r] - top)), take = exp2(all(max_of[r] - top));
        to_sum[r] = to_sum[r] * keep[0] + sum_of[r] * take[0];
        to_max[r] = top;
        for (int i = r * dim; i < (r + 1) * dim; i += 16) store(to + i, load(to + i) * keep + load(out + i) * take);
    }
}

static void finish(const float* out, float sum_of, int dim, bf16* to) {
    float factor = 1.0f / sum_of;
    for (int i = 0; i < dim; i += 16) store(to + i, load(out + i) * factor);
}

static void write_kv(const bf16* k, const bf16* v, char* k_block, char* v_block, int offset, int dim) {
    char* keys = k_block + offset / 16 * (dim * 32) + offset % 16 * 4;
    for (int i = 0; i < dim; i += 2) __builtin_memcpy(keys + i * 32, k + i, 4);
    char* values = v_block + offset / 2 * 64 + offset % 2 * 2;  // 16 dims are 1 KiB
    for (int j = 0; j < dim; j += 16)
        for (int i = 0; i < 16; i++) __builtin_memcpy(values + j * 64 + i * 4, v + j + i, 2);
}

}  // namespace penstock::PENSTOCK_ISA
