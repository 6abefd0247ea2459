// Attention of one piece of the batch over paged keys and values, as two small matrix products per KV block.
//
// A block's keys are packed as a weight matrix [tokens, D], its values as one [D, tokens]: what computes with weights
// computes with both. A span's scores are held at once, so its softmax needs no running maximum.
//
// Over int8 the products are of integers: queries and probabilities become int16, one scale per row (and span), and the
// sums of a span are exact in int32. Scores then take the scale of their key; probabilities have taken that of their
// value.
namespace penstock::PENSTOCK_ISA {

constexpr int QUERY_ROWS = 48;  // six at a time
constexpr float WORD_MAX = 32767.0f;
static_assert(32767LL * 127 * ATTENTION_SPAN < 1LL << 31, "a span's sums of int16 times int8 fit int32");

// The products of attention in vector registers. Pairs: how keys and values are unpacked; WORDS: they are int8.
template <class Pairs_, bool WORDS_>
struct VectorProducts {
    static constexpr int ROWS = 6;  // query rows whose sums fit the registers
    static constexpr bool WORDS = WORDS_;
    static constexpr int SCORES = ATTENTION_SPAN, CHANCES = ATTENTION_SPAN;  // elements from row to row

    static inline void begin(int) {}
    template <class... Args> static inline void keys(Args&&... args) {
        key_product<Pairs_>(static_cast<Args&&>(args)...);
    }
    template <class... Args> static inline void values(Args&&... args) {
        value_product<Pairs_>(static_cast<Args&&>(args)...);
    }
};

template <class Products>
struct AttendScratch {
    static constexpr int ROWS = Products::ROWS;
    alignas(64) float scores[ROWS][Products::SCORES];
    alignas(64) bf16 chances[ROWS][Products::CHANCES];
    alignas(64) bf16 queries[ROWS][256 + 32];
    float query_scales[ROWS];
    alignas(64) float key_scales[ATTENTION_SPAN];
    alignas(64) float value_scales[ATTENTION_SPAN];
};

// The scales of `num` blocks of int8, of keys or values, float32 [num * 32].
static inline void load_scales(const char* heads, std::size_t block_bytes, const std::int32_t* blocks, int num, int dim,
                               float* to) {
    for (int b = 0; b < num; b++) {
        const bf16* scales = reinterpret_cast<const bf16*>(heads + blocks[b] * block_bytes + KV_BLOCK * dim);
        for (int i = 0; i < KV_BLOCK; i += 16) store(to + b * KV_BLOCK + i, load(scales + i));
    }
}

static inline void store_words(bf16* to, vf x) {
    put(to, low_halves(as<vu>(nearest(x))));
}

constexpr float LEAST_SCALE = 0x1p-100f;  // that of zeros: its inverse is still a number

// A query as int16; returns its scale. One that is no number gets zeros and a NaN.
static inline float to_words(const bf16* x, int dim, bf16* out) {
    float scale = magnitude(x, dim) / WORD_MAX;
    scale = scale < LEAST_SCALE ? LEAST_SCALE : scale;
    bool is_number = scale == scale;
    for (int i = 0; i < dim; i += 16) store_words(out + i, is_number ? load(x + i) * (1.0f / scale) : all(0));
    return scale;
}

// What row `r` may see of the span, positions first..last: -inf elsewhere. Over int8 the scores become float32, times
// `scale` and that of their key. Returns the largest score.
template <bool WORDS, class Scratch>
static inline float mask(Scratch& s, int r, int first, int last, int begin, int num, float scale) {
    float* scores = s.scores[r];
    vf most = all(-INF), factor = all(WORDS ? s.query_scales[r] * scale : 1.0f);
    auto see = [&](int i, auto some) {
        vf x = load(scores + i);
        if constexpr (WORDS) x = floats(as<vi>(x)) * factor * load(s.key_scales + i);
        if constexpr (some.value) {
            vi position = as<vi>(LANES) + (begin + i);
            x = choose((position >= first) & (position <= last), x, all(-INF));
        }
        if (WORDS || some.value) store(scores + i, x);
        most = max(x, most);
    };
    int from = first > begin ? (first - begin + 15) / 16 * 16 : 0, to = last - begin >= 15 ? (last - begin + 1) / 16 * 16 : 0;
    if (to > num) to = num;
    if (from > to) from = to;
    for (int i = 0; i < from; i += 16) see(i, Count<1>{});
    for (int i = from; i < to; i += 16) see(i, Count<0>{});
    for (int i = to; i < num; i += 16) see(i, Count<1>{});
    return largest(most);
}

// Softmax over scores times `scale`: chances[r], rounded to bf16, and the sum of the unrounded ones. top: the largest
// score, taken off before the scale is put on, so that its own probability is 1 however large it is.
template <class Scratch>
static inline float soften(Scratch& s, int r, int num, float scale, float top) {
    vf total = all(0);
    for (int i = 0; i < num; i += 16) {
        vf p = exp2((load(s.scores[r] + i) - top) * scale);
        total += p;
        store(s.chances[r] + i, p);
    }
    return sum(total);
}

// The same over int8: chances[r] are int16, of the probability times its value's scale, and `unit` is what 1 stands
// for. Below 1 / 65534 of the span's largest they are zero. A value without a number for its scale makes the unit NaN.
template <class Scratch>
static inline float soften_words(Scratch& s, int r, int num, float top, float* unit) {
    vf total = all(0), most = all(0);
    vi broken = {};
    for (int i = 0; i < num; i += 16) {
        vf p = exp2(load(s.scores[r] + i) - top);
        total += p;
        vf scaled = choose(p > 0.0f, p * load(s.value_scales + i), all(0));  // what is not seen may be no number
        store(s.scores[r] + i, scaled);
        broken |= scaled != scaled;
        most = max(scaled, most);
    }
    float largest_chance = any(broken) ? __builtin_nanf("") : largest(most);
    float inverse = largest_chance > 0 ? WORD_MAX / largest_chance : 0;
    for (int i = 0; i < num; i += 16) store_words(s.chances[r] + i, load(s.scores[r] + i) * inverse);
    *unit = largest_chance / WORD_MAX;
    return sum(total);
}

template <class Products>
static inline void attend_as(const AttendPiece& piece, AttendScratch<Products>& s) {
    constexpr bool WORDS = Products::WORDS;
    constexpr int ROWS = Products::ROWS;
    int rows = piece.num_tokens * piece.group, dim = piece.head_dim;
    std::size_t block_bytes = piece.block_bytes, head_bytes = kv_head_bytes(piece.format, dim);
    const char *keys = piece.pool, *values = piece.pool + piece.value_bytes;
    bool asked = false;  // for what comes after this piece: by the first rows that see something
    for (int r0 = 0; r0 < rows; r0 += ROWS) {
        int m = rows - r0 < ROWS ? rows - r0 : ROWS;
        int t0 = r0 / piece.group, t1 = (r0 + m - 1) / piece.group;
        int last = piece.position + t1;  // the furthest that any of these rows sees
        int first = piece.window ? piece.position + t0 - piece.window + 1 : 0;
        if (first < piece.span_begin) first = piece.span_begin;
        int begin = first / KV_BLOCK * KV_BLOCK;
        int end = last + 1 < piece.span_end ? last + 1 : piece.span_end;
        int num_blocks = end > begin ? (end - begin + KV_BLOCK - 1) / KV_BLOCK : 0, num = num_blocks * KV_BLOCK;
        float* out = piece.out + static_cast<std::size_t>(r0) * dim;
        if (num_blocks == 0) {
            for (int r = 0; r < m; r++) { piece.max[r0 + r] = -INF; piece.sum[r0 + r] = 0; }
            for (int i = 0; i < m * dim; i++) out[i] = 0;
            continue;
        }
        for (int r = 0; r < m; r++) {
            int t = (r0 + r) / piece.group, head = (r0 + r) % piece.group;
            const bf16* q = piece.q + t * piece.q_stride + static_cast<std::size_t>(head) * dim;
            if constexpr (WORDS) s.query_scales[r] = to_words(q, dim, s.queries[r]);
            else __builtin_memcpy(s.queries[r], q, dim * sizeof(bf16));
        }
        const std::int32_t* blocks = piece.blocks + begin / KV_BLOCK;
        constexpr std::size_t Q_STRIDE = sizeof s.queries[0] / sizeof(bf16);
        int pace = (piece.num_ahead + 2 * num_blocks - 1) / (2 * num_blocks);
        Ahead ahead = asked ? Ahead() : Ahead(piece.ahead, piece.num_ahead, head_bytes, pace);
        asked = true;
        Products::begin(m);
        Products::keys(keys, block_bytes, blocks, num_blocks, s.queries[0], Q_STRIDE, m, dim, s.scores[0],
                       Products::SCORES, ahead);
        if constexpr (WORDS) {
            load_scales(keys, block_bytes, blocks, num_blocks, dim, s.key_scales);
            load_scales(values, block_bytes, blocks, num_blocks, dim, s.value_scales);
        }
        float unit[ROWS] = {};
        for (int r = 0; r < m; r++) {
            int position = piece.position + (r0 + r) / piece.group;
            int from = piece.window ? position - piece.window + 1 : 0;
            ahead.ask(num / 16);  // a softmax lasts about as long as reading so many lines
            float top = mask<WORDS>(s, r, from, position, begin, num, piece.scale);
            piece.max[r0 + r] = WORDS ? top : top * piece.scale, piece.sum[r0 + r] = 0;
            if (top == -INF) {
                bool sees = (from > begin ? from : begin) < (position + 1 < end ? position + 1 : end);
                if (sees) piece.max[r0 + r] = INF, piece.sum[r0 + r] = __builtin_nanf("");  // but nothing that is a number
                for (int i = 0; i < num; i++) s.chances[r][i] = 0;
                continue;
            }
            piece.sum[r0 + r] = WORDS ? soften_words(s, r, num, top, unit + r) : soften(s, r, num, piece.scale, top);
        }
        Products::values(values, block_bytes, blocks, num_blocks, s.chances[0], Products::CHANCES, m, dim, out, ahead);
        if constexpr (WORDS)
            for (int r = 0; r < m; r++)
                for (int i = r * dim; i < (r + 1) * dim; i += 16)
                    store(out + i, floats(as<vi>(load(out + i))) * unit[r]);
    }
}

template <class Products>
static inline void attend_with(const AttendPiece& piece) {
    static thread_local AttendScratch<Products> of_thread;
    AttendScratch<Products>* s = &of_thread;
    asm("" : "+r"(s));  // an address like any other, or loops would ask for the thread's own each time around
    attend_as(piece, *s);
}

static void attend(const AttendPiece& piece) {
    if (piece.format == KVFormat::INT8) attend_with<VectorProducts<WordPairs, true>>(piece);
    else attend_with<VectorProducts<Bf16Pairs, false>>(piece);
}

static void merge(const float* out, const float* max_of, const float* sum_of, int rows, int dim, float* to, float* to_max,
                  float* to_sum) {
    for (int r = 0; r < rows; r++) {
        float top = max_of[r] > to_max[r] ? max_of[r] : to_max[r];
        if (top == -INF) continue;
        float keep = exp2(to_max[r] - top), take = exp2(max_of[r] - top);
        to_sum[r] = to_sum[r] * keep + sum_of[r] * take;
        to_max[r] = top;
        for (int i = r * dim; i < (r + 1) * dim; i += 16) store(to + i, load(to + i) * keep + load(out + i) * take);
    }
}

static void finish(const float* out, float sum_of, int dim, bf16* to) {
    float factor = 1.0f / sum_of;
    for (int i = 0; i < dim; i += 16) store(to + i, load(out + i) * factor);
}

}  // namespace penstock::PENSTOCK_ISA
