// What is done row by row between the products: norms, rope, activation, rounding, quantization; and what choosing a token
// needs of a row of scores.
namespace penstock::PENSTOCK_ISA {

static void rms_norm(const float* x, const float* weight, int n, float eps, bf16* out) {
    vf squares = all(0);
    int whole = n / 16 * 16;
    for (int i = 0; i < whole; i += 16) { vf v = load(x + i); squares += v * v; }
    if (whole < n) { vf v = load_part(x + whole, n - whole); squares += v * v; }
    float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
    for (int i = 0; i < whole; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
    for (int i = whole; i < n; i++) out[i] = narrow(x[i] * factor * weight[i]);
}

static void rope(bf16* x, const float* weight, float eps, const float* cos, const float* sin, int dim, int rotary) {
    alignas(64) float y[256];
    float factor = 1.0f;
    vf squares = all(0);
    for (int i = 0; i < dim; i += 16) { vf v = load(x + i); store(y + i, v); squares += v * v; }
    if (weight) {
        factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
        for (int i = 0; i < dim; i += 16) store(y + i, load(y + i) * factor * load(weight + i));
    }
    int half = rotary / 2, whole = half / 16 * 16;
    for (int i = 0; i < whole; i += 16) {
        vf a = load(y + i), b = load(y + half + i), c = load(cos + i), s = load(sin + i);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (int i = whole; i < half; i++) {
        float a = y[i], b = y[half + i];
        y[i] = a * cos[i] - b * sin[i];
        y[half + i] = b * cos[i] + a * sin[i];
    }
    for (int i = 0; i < dim; i += 16) store(x + i, load(y + i));
}

static float quantize(const bf16* x, int n, std::int8_t* out, std::int32_t* sums) {
    float top = magnitude(x, n);
    if (top != top) {  // no integer says so, but the scale does
        for (int i = 0; i < n; i++) out[i] = 0;
        for (int g = 0; sums && g * GROUP < n; g++) sums[g] = 0;
        return top;
    }
    float scale = top > 1e-12f ? top / 127.0f : 1e-12f / 127.0f, inverse = 1.0f / scale;
    for (int g = 0; g * GROUP < n; g++) {
        int i = g * GROUP, end = n < i + GROUP ? n : i + GROUP;
        vi total = {};
        for (; i + 16 <= end; i += 16) {
            vi numbers = nearest(load(x + i) * inverse);
            total += numbers;
            put(out + i, low_bytes(numbers));
        }
        std::int32_t rest = 0;
        for (; i < end; i++) rest += out[i] = static_cast<std::int8_t>(__builtin_rintf(widen(x[i]) * inverse));
        if (sums) sums[g] = sum(total) + rest;
    }
    return scale;
}

template <int VECTORS> static void rotate_blocks(const bf16* x, int n, bf16* out) {
    const float factor = 1.0f / __builtin_sqrtf(VECTORS * 16.0f);
    for (int i = 0; i < n; i += VECTORS * 16) {
        vf v[VECTORS];
        for (int j = 0; j < VECTORS; j++) v[j] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i + 16 * j)))));
        for (int h = 1; h < VECTORS; h *= 2)
            for (int j = 0; j < VECTORS; j++)
                if (!(j & h)) {
                    vf a = v[j], b = v[j + h];
                    v[j] = a + b, v[j + h] = a - b;
                }
        for (int j = 0; j < VECTORS; j++) store(out + i + 16 * j, v[j] * factor);
    }
}

static void rotate(const bf16* x, int n, int block, bf16* out) {
    if (block == 128) rotate_blocks<8>(x, n, out);
    else if (block == 64) rotate_blocks<4>(x, n, out);
    else if (block == 32) rotate_blocks<2>(x, n, out);
    else rotate_blocks<1>(x, n, out);
}

static void silu_mul(const float* gate, const float* up, int cols, bf16* out) {
    for (int i = 0; i < cols; i += 16) {
        vf g = load(gate + i);
        store(out + i, g / (1.0f + exp2(g * -LOG2_E)) * load(up + i));
    }
}

static void add(float* x, const float* c, const float* bias, int cols) {
    for (int i = 0; i < cols; i += 16) {
        vf y = load(c + i);
        if (bias) y += load(bias + i);
        store(x + i, load(x + i) + y);
    }
}

static void store_rounded(bf16* out, const float* c, const float* bias, int cols) {
    for (int i = 0; i < cols; i += 16) {
        vf y = load(c + i);
        if (bias) y += load(bias + i);
        store(out + i, y);
    }
}

static void best(const float* c, int cols, int column, float* largest_so_far, std::int32_t* at) {
    vf top = load(largest_so_far);
    vi where = get<vi>(at);
    for (int i = 0; i < cols; i += 16) {
        vi here = as<vi>(LANES) + (column + i);
        vf x = i + 16 <= cols ? load(c + i) : choose(lanes_below(cols - i), load_part(c + i, cols - i), all(-INF));
        if (!any(~(x < top))) continue;  // as nearly always
        vi better = (x > top) | (x != x) | ((x == top) & (here < where));
        top = choose(better, x, top);
        where = (better & here) | (~better & where);
    }
    store(largest_so_far, top);
    put(at, where);
}

static bool peaks(const float* scores, int groups, float* out) {
    vi broken = all_int(0);
    for (int g = 0; g < groups; g++) {
        vf top = all(-INF);
        for (int i = 0; i < NOISE_GROUP; i += 16) {
            vf x = load(scores + g * NOISE_GROUP + i);
            broken |= x != x;
            top = max(x, top);
        }
        out[g] = largest(top);
    }
    return any(broken);
}

static double weigh(const float* scores, int groups, float best_score, float inverse_temperature, float* out) {
    double total = 0;
    for (int g = 0; g < groups; g++) {
        vf mass = all(0);
        for (int i = 0; i < NOISE_GROUP; i += 16) {
            vf weight = exp2((load(scores + g * NOISE_GROUP + i) - best_score) * (inverse_temperature * LOG2_E));
            store(out + g * NOISE_GROUP + i, weight);
            mass += weight;
        }
        total += sum(mass);
    }
    return total;
}

}  // namespace penstock::PENSTOCK_ISA
