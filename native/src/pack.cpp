#include "pack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "numbers.hpp"

namespace penstock {

namespace {
constexpr std::size_t PAIRS_BYTES = 192;  // of four pairs in BF12
constexpr int ANY_EXPONENT = 15;          // the place in the table that holds zero
constexpr int INFINITE = 0x7f80;          // bits of infinity; those of NaN lie above

int k_align(Format format) { return format == Format::INT4 || format == Format::W4A8 ? GROUP : K_ALIGN; }

// The nearest bf16, ties to even: what every engine keeps of a checkpoint's scales. A NaN or an infinity stays none.
bf16 narrow(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    return static_cast<bf16>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Offset in elements of (column j of a block, k), from the start of the block.
std::size_t place(Format format, int j, int k) {
    switch (format) {
        case Format::BF16: return static_cast<std::size_t>(k / 2) * 32 + j * 2 + k % 2;
        case Format::INT8: return static_cast<std::size_t>(k / 2) * 32 + k % 2 * 16 + j;
        case Format::W8A8: return static_cast<std::size_t>(k / 4) * 64 + j * 4 + k % 4;
        // Bytes; the nibble is chosen by the caller.
        case Format::INT4: return static_cast<std::size_t>(k / 32) * 256 + k % 16 / 2 * 32 + j * 2 + k % 2;
        case Format::W4A8: return static_cast<std::size_t>(k / 8) * 64 + j * 4 + k % 4;
        // Bytes of sign and significand.
        case Format::BF12: return static_cast<std::size_t>(k / 8) * PAIRS_BYTES + k / 2 % 4 * 32 + j * 2 + k % 2;
    }
    return 0;
}

// The byte whose nibble, the low one for an even pair, says the exponent of (column j, k) of a block.
std::size_t exponent_place(int j, int k) {
    return static_cast<std::size_t>(k / 8) * PAIRS_BYTES + 128 + k / 4 % 2 * 32 + j * 2 + k % 2;
}

// A whole block of bf16, 16 rows from `rows` on, up to the last multiple of 8 in K: returns that. Pairs are transposed in
// tiles of 4 x 4 (Zen 4: 14 to 27 GB/s of one core; pair by pair 5 to 6): loading waits for this.
int pack_tiles(const bf16* rows, std::size_t stride, int k, bf16* at) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    typedef std::uint32_t Pairs __attribute__((vector_size(16)));
    int whole = k / 8 * 8;
    for (int i = 0; i < whole; i += 8)
        for (int c = 0; c < COLUMNS; c += 4) {
            Pairs r[4];
            for (int j = 0; j < 4; j++) std::memcpy(&r[j], rows + (c + j) * stride + i, sizeof(Pairs));
            Pairs a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
            Pairs d = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), e = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
            Pairs to[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                           __builtin_shufflevector(d, e, 0, 1, 4, 5), __builtin_shufflevector(d, e, 2, 3, 6, 7)};
            for (int j = 0; j < 4; j++) std::memcpy(at + place(Format::BF16, c, i + 2 * j), &to[j], sizeof(Pairs));
        }
    return whole;
#endif
#endif
    return 0;
}

template <class T>
void pack_elements(Format format, const T* rows, std::size_t stride, int count, int k, T* at) {
    if (count < COLUMNS || k % K_ALIGN) std::memset(at, 0, up(k, K_ALIGN) * COLUMNS * sizeof(T));
    int done = 0;
    if constexpr (sizeof(T) == sizeof(bf16))
        if (count == COLUMNS) done = pack_tiles(rows, stride, k, at);
    for (int c = 0; c < count; c++) {
        const T* from = rows + c * stride;
        if (format == Format::BF16) {
            int i = done;
            for (; i + 1 < k; i += 2) std::memcpy(at + place(format, c, i), from + i, 2 * sizeof(T));
            if (i < k) at[place(format, c, i)] = from[i];
        } else {
            for (int i = 0; i < k; i++) at[place(format, c, i)] = from[i];
        }
    }
}
}  // namespace

std::size_t packed_bytes(Format format, int n, int k) {
    std::size_t elements = up(n, COLUMNS) * up(k, k_align(format));
    if (format == Format::BF16) return elements * 2;
    if (format == Format::BF12) return elements / 2 * 3;
    return k_align(format) == GROUP ? elements / 2 : elements;
}

void pack_bf16(const bf16* rows, std::size_t stride, int count, int k, void* to) {
    pack_elements(Format::BF16, rows, stride, count, k, static_cast<bf16*>(to));
}

void pack_bf12(const bf16* rows, std::size_t stride, int count, int k, void* to, bf16* exponents, std::vector<RareWeight>& rare) {
    std::size_t num = up(k, K_ALIGN) * COLUMNS;
    std::vector<bf16> pairs(num);
    pack_bf16(rows, stride, count, k, pairs.data());
    int most = 0;
    for (bf16 x : pairs) most = std::max(most, x & 0x7f80);
    // Fifteen exponents up to the largest: of normally distributed weights all but one in six thousand.
    int lowest = std::max(1, (most >> 7) - 14);
    for (int i = 0; i < 32; i++) exponents[i] = static_cast<bf16>(i % 16 == ANY_EXPONENT ? 0 : std::min(lowest + i % 16, 255) << 7);
    rare.clear();
    std::uint8_t places[128];  // of four pairs
    for (std::size_t from = 0; from < num; from += 128) {
        const bf16* x = pairs.data() + from;
        std::uint8_t* at = static_cast<std::uint8_t*>(to) + from / 128 * PAIRS_BYTES;
        int others = 0;
        for (int i = 0; i < 128; i++) {
            int exponent = x[i] >> 7 & 255, place = exponent - lowest;
            int known = place >= 0 ? place : ANY_EXPONENT;
            places[i] = static_cast<std::uint8_t>(known);
            others |= (place < 0) & (exponent != 0);
            at[i] = static_cast<std::uint8_t>((x[i] >> 8 & 0x80) | (x[i] & 0x7f));
        }
        for (int i = 0; others && i < 128; i++) {
            int exponent = x[i] >> 7 & 255;
            if (exponent == 0 || exponent >= lowest) continue;
            int k_of = static_cast<int>(from / 32 + i / 32) * 2 + i % 2;
            rare.push_back({k_of, static_cast<std::int16_t>(i % 32 / 2), x[i]});
            at[i] = 0;
        }
        for (int i = 0; i < 64; i++) {
            int pair = i / 32 * 64 + i % 32;
            at[128 + i] = static_cast<std::uint8_t>(places[pair] | places[pair + 32] << 4);
        }
    }
}

void pack_int8(Format format, const std::int8_t* rows, std::size_t stride, int count, int k, void* to, std::int32_t* sums) {
    pack_elements(format, rows, stride, count, k, static_cast<std::int8_t*>(to));
    for (int c = 0; sums && c < COLUMNS; c++) {
        sums[c] = 0;
        for (int i = 0; c < count && i < k; i++) sums[c] += rows[c * stride + i];
    }
}

void pack_int4(Format format, const std::int8_t* rows, std::size_t stride, int count, int k, void* to) {
    std::uint8_t* at = static_cast<std::uint8_t*>(to);
    std::memset(at, 0x88, up(k, GROUP) * COLUMNS / 2);  // zeros: nibble 8
    for (int c = 0; c < count; c++) {
        const std::int8_t* from = rows + c * stride;
        for (int i = 0; i < k; i++) {
            std::uint8_t& byte = at[place(format, c, i)];
            bool high = format == Format::INT4 ? i % 32 >= 16 : i % 8 >= 4;
            int nibble = from[i] + 8;
            byte = static_cast<std::uint8_t>(high ? (byte & 0x0f) | nibble << 4 : (byte & 0xf0) | nibble);
        }
    }
}

void unpack_nibbles(const std::uint8_t* from, int k, std::int8_t* to) {
    for (int i = 0; i < k; i++) to[i] = static_cast<std::int8_t>((i % 2 ? from[i / 2] >> 4 : from[i / 2] & 15) - 8);
}

// The largest magnitude of n numbers as bf16 bits, which order as magnitudes do: not below INFINITE where one is none.
static int largest_bits(const bf16* x, int n) {
    int most = 0;
    for (int i = 0; i < n; i++) most = std::max(most, x[i] & 0x7fff);
    return most;
}

// A scale whose inverse is a number, too: weights so small that theirs is not are zero.
static float usable_scale(float x) {
    float scale = bf16_to_float(narrow(x));
    return std::fabs(scale) < std::numeric_limits<float>::min() ? 1 : scale;
}

bool quantize_int8(const bf16* rows, std::size_t stride, int n, int k, std::int8_t* to, float* scale) {
    for (int j = 0; j < n; j++, to += k) {
        const bf16* from = rows + j * stride;
        int most = largest_bits(from, k);
        if (most >= INFINITE) return false;
        scale[j] = usable_scale(bf16_to_float(static_cast<bf16>(most)) / 127);
        float inverse = 1 / scale[j];
        for (int i = 0; i < k; i++) to[i] = static_cast<std::int8_t>(std::nearbyint(bf16_to_float(from[i]) * inverse));
    }
    return true;
}

// In the order of the kernels, whose sums these are to the bit.
template <int BLOCK> static void rotate_one(float* x) {
    for (int h = 1; h < BLOCK; h *= 2)
        for (int i = 0; i < BLOCK; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b, x[j + h] = a - b;
            }
    const float factor = 1.0f / std::sqrt(static_cast<float>(BLOCK));
    for (int i = 0; i < BLOCK; i++) x[i] *= factor;
}

static void rotate_block(float* x, int block) {
    if (block == 128) rotate_one<128>(x);
    else if (block == 64) rotate_one<64>(x);
    else if (block == 32) rotate_one<32>(x);
    else rotate_one<16>(x);
}

bool can_rotate(int k, int block) { return (block == 16 || block == 32 || block == 64 || block == 128) && k % block == 0; }

void rotate(const bf16* row, int k, int block, bf16* to) {
    float x[128];
    for (int i = 0; i < k; i += block) {
        for (int j = 0; j < block; j++) x[j] = bf16_to_float(row[i + j]);
        rotate_block(x, block);
        for (int j = 0; j < block; j++) to[i + j] = narrow(x[j]);
    }
}

// Rounds to nearest, ties to even, within +-2^22; unlike nearbyint it becomes vector code everywhere.
static float round_whole(float x) {
    constexpr float MAGIC = 12582912.0f;
    return (x + MAGIC) - MAGIC;
}

bool quantize_int4(const bf16* rows, std::size_t stride, int n, int k, std::int8_t* to, float* scale) {
    int groups = (k + GROUP - 1) / GROUP;
    for (int j = 0; j < n; j++)
        for (int g = 0; g < groups; g++) {
            int begin = g * GROUP, num = std::min(k, begin + GROUP) - begin;
            if (largest_bits(rows + j * stride + begin, num) >= INFINITE) return false;
            float x[GROUP], extreme = 0;
            for (int i = 0; i < num; i++) {
                x[i] = bf16_to_float(rows[j * stride + begin + i]);
                if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
            }
            float step = usable_scale(extreme / -8);  // cutting the extreme for less squared error gains nothing
            scale[static_cast<std::size_t>(j) * groups + g] = step;
            float inverse = 1 / step;
            std::int8_t* out = to + static_cast<std::size_t>(j) * k + begin;
            for (int i = 0; i < num; i++)
                out[i] = static_cast<std::int8_t>(std::min(std::max(round_whole(x[i] * inverse), -8.0f), 7.0f));
        }
    return true;
}

void unpack_row(const Weight& w, int n, float* out) {
    std::size_t block = n / COLUMNS, elements = static_cast<std::size_t>(w.k_pad) * COLUMNS;
    int column = n % COLUMNS;
    for (int k = 0; k < w.k; k++) {
        std::size_t at = place(w.format, column, k);
        switch (w.format) {
            case Format::BF16:
                out[k] = bf16_to_float(static_cast<const bf16*>(w.data)[block * elements + at]);
                break;
            case Format::BF12: {
                const std::uint8_t* of_block = static_cast<const std::uint8_t*>(w.data) + block * elements / 2 * 3;
                int places = of_block[exponent_place(column, k)], x = of_block[at];
                int exponent = w.exponents[block * 32 + (k / 2 % 2 ? places >> 4 : places & 15)];
                out[k] = bf16_to_float(static_cast<bf16>((x & 0x80) << 8 | exponent | (x & 0x7f)));
                break;
            }
            case Format::INT8:
            case Format::W8A8:
                out[k] = static_cast<float>(static_cast<const std::int8_t*>(w.data)[block * elements + at]) * w.scale[n];
                break;
            case Format::INT4:
            case Format::W4A8: {
                bool high = w.format == Format::INT4 ? k % 32 >= 16 : k % 8 >= 4;
                int byte = static_cast<const std::uint8_t*>(w.data)[block * elements / 2 + at];
                int nibble = high ? byte >> 4 : byte & 15;
                out[k] = static_cast<float>(nibble - 8) * w.scale[(block * (w.k_pad / GROUP) + k / GROUP) * COLUMNS + column];
                break;
            }
        }
    }
    if (w.format == Format::BF12)
        for (int i = 0; i < w.rare[block].num; i++)
            if (const RareWeight& rare = w.rare[block].data[i]; rare.column == column) out[rare.k] = bf16_to_float(rare.value);
    for (int k = 0; w.rotation && k < w.k; k += w.rotation) rotate_block(out + k, w.rotation);
}

}  // namespace penstock
