// Keys and values into their KV block, in the order in which attention reads them.
//
// A line of values holds two tokens: one that comes alone leaves the other as it is.
namespace penstock::PENSTOCK_ISA {

// A head as int8; returns its scale, absmax / 127 up to the next bf16. One that is no number gets zeros and a NaN.
static inline bf16 to_bytes(const bf16* x, int dim, std::int8_t* out) {
    float exact = magnitude(x, dim) / 127.0f;
    if (exact != exact) {
        for (int i = 0; i < dim; i++) out[i] = 0;
        return 0x7fc0;
    }
    bf16 scale = static_cast<bf16>((as<std::uint32_t>(exact > LEAST_SCALE ? exact : LEAST_SCALE) + 0xffffu) >> 16);
    float inverse = 1.0f / widen(scale);
    for (int i = 0; i < dim; i += 16) put(out + i, low_bytes(nearest(load(x + i) * inverse)));
    return scale;
}

template <class Element> struct Paired;  // sixteen of an element, and sixteen pairs
template <> struct Paired<bf16> { using Half = vh; using Line = vu; static constexpr int BITS = 16; };
template <> struct Paired<std::int8_t> { using Half = vub; using Line = vh; static constexpr int BITS = 8; };

// Keys lie in pairs of dimensions, of 16 tokens.
template <class Element>
static inline void write_keys(const Element* k, std::size_t stride, int count, char* to, int offset, int dim) {
    constexpr int PAIR = 2 * sizeof(Element), LINE = 16 * PAIR;
    for (int t = 0; t < count; t++, offset++, k += stride) {
        char* at = to + offset / 16 * (dim / 2 * LINE) + offset % 16 * PAIR;
        for (int i = 0; i < dim; i += 2) __builtin_memcpy(at + i / 2 * LINE, k + i, PAIR);
    }
}

// Values lie in pairs of tokens, of 16 dimensions.
template <class Element>
static inline void write_values(const Element* v, std::size_t stride, int count, char* to, int offset, int dim) {
    using Half = typename Paired<Element>::Half;
    using Line = typename Paired<Element>::Line;
    constexpr int BITS = Paired<Element>::BITS, LINE = sizeof(Line);
    auto sixteen = [](const Element* from) -> Line { return wide(get<Half>(from)); };
    for (int t = 0; t < count;) {
        char* at = to + (offset + t) / 2 * LINE;
        const Element* from = v + t * stride;
        bool second = (offset + t) % 2;
        if (!second && t + 1 < count) {
            for (int j = 0; j < dim; j += 16)
                put(at + j * LINE, sixteen(from + j) | sixteen(from + stride + j) << BITS);
            t += 2;
            continue;
        }
        for (int j = 0; j < dim; j += 16) {
            Line line = get<Line>(at + j * LINE), mine = sixteen(from + j);
            put(at + j * LINE, second ? line << BITS >> BITS | mine << BITS : line >> BITS << BITS | mine);
        }
        t++;
    }
}

static void write_kv(KVFormat format, const bf16* k, const bf16* v, std::size_t stride, int count, char* k_block,
                     char* v_block, int offset, int dim) {
    if (format == KVFormat::BF16) {
        write_keys(k, stride, count, k_block, offset, dim);
        return write_values(v, stride, count, v_block, offset, dim);
    }
    alignas(64) std::int8_t keys[KV_BLOCK * 256], values[KV_BLOCK * 256];
    for (int t = 0; t < count; t++) {
        bf16 scales[2] = {to_bytes(k + t * stride, dim, keys + t * dim), to_bytes(v + t * stride, dim, values + t * dim)};
        std::size_t at = KV_BLOCK * dim + (offset + t) * 2;
        __builtin_memcpy(k_block + at, scales, 2);
        __builtin_memcpy(v_block + at, scales + 1, 2);
    }
    write_keys(keys, dim, count, k_block, offset, dim);
    write_values(values, dim, count, v_block, offset, dim);
}

}  // namespace penstock::PENSTOCK_ISA
