// Sixteen floats at a time, for every instruction set: one zmm or two ymm, as GCC's vector types.
//
// Included once per instruction set, inside its own namespace and with its own compiler flags, and free of the
// standard library: an inline function that two translation units share would be compiled for one of them and run
// on the other's machine.
#include <cstddef>
#include <cstdint>
#include <immintrin.h>

#include "kernels.hpp"
#ifndef __AVX512F__
#include "two.hpp"
#endif

namespace penstock::PENSTOCK_ISA {

#ifdef __AVX512F__
typedef float vf __attribute__((vector_size(64)));
typedef std::int32_t vi __attribute__((vector_size(64)));
typedef std::uint32_t vu __attribute__((vector_size(64)));
#else
typedef float f8 __attribute__((vector_size(32)));
typedef std::int32_t i8 __attribute__((vector_size(32)));
typedef std::uint32_t u8 __attribute__((vector_size(32)));
typedef Two<f8> vf;
typedef Two<i8> vi;
typedef Two<u8> vu;
#endif
typedef std::uint16_t vh __attribute__((vector_size(32)));  // sixteen bf16
typedef std::int8_t vb __attribute__((vector_size(16)));
typedef std::uint8_t vub __attribute__((vector_size(16)));

constexpr float INF = __builtin_inff();

template <class To, class From> static inline To as(From x) {
    static_assert(sizeof(To) == sizeof(From));
#ifndef __AVX512F__
    if constexpr (is_two<To> && is_two<From>) {
        To to;
        __builtin_memcpy(&to.low, &x.low, sizeof to.low);
        __builtin_memcpy(&to.high, &x.high, sizeof to.high);
        return to;
    } else
#endif
    {
        To to;
        __builtin_memcpy(&to, &x, sizeof to);
        return to;
    }
}

// Half by half: what is copied as a whole goes through memory once more.
template <class V> static inline V get(const void* p) {
    V x;
#ifndef __AVX512F__
    if constexpr (is_two<V>) {
        __builtin_memcpy(&x.low, p, sizeof x.low);
        __builtin_memcpy(&x.high, static_cast<const char*>(p) + sizeof x.low, sizeof x.high);
        return x;
    }
#endif
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
template <class V> static inline void put(void* p, V x) {
#ifndef __AVX512F__
    if constexpr (is_two<V>) {
        __builtin_memcpy(p, &x.low, sizeof x.low);
        __builtin_memcpy(static_cast<char*>(p) + sizeof x.low, &x.high, sizeof x.high);
        return;
    }
#endif
    __builtin_memcpy(p, &x, sizeof x);
}

static inline vf load(const float* p) { return get<vf>(p); }
static inline void store(float* p, vf x) { put(p, x); }
static inline vf all(float x) { return vf{} + x; }
static inline vi all_int(std::int32_t x) { return vi{} + x; }

// Element by element; ints: towards zero; low_halves, low_bytes: of each lane.
#ifdef __AVX512F__
static inline vu wide(vh x) { return __builtin_convertvector(x, vu); }
static inline vf floats(vi x) { return __builtin_convertvector(x, vf); }
static inline vi ints(vf x) { return __builtin_convertvector(x, vi); }
static inline vh low_halves(vu x) { return __builtin_convertvector(x, vh); }
static inline vb low_bytes(vi x) { return __builtin_convertvector(x, vb); }
#else
static inline vu wide(vh x) {
    struct Halves { __m128i low, high; } of = as<Halves>(x);
    return {as<u8>(_mm256_cvtepu16_epi32(of.low)), as<u8>(_mm256_cvtepu16_epi32(of.high))};
}
static inline vf floats(vi x) { return {__builtin_convertvector(x.low, f8), __builtin_convertvector(x.high, f8)}; }
static inline vi ints(vf x) { return {__builtin_convertvector(x.low, i8), __builtin_convertvector(x.high, i8)}; }
static inline vh low_halves(vu x) {
    x = x & 0xffffu;
    return as<vh>(_mm256_permute4x64_epi64(_mm256_packus_epi32(as<__m256i>(x.low), as<__m256i>(x.high)), 0xd8));
}
static inline vb low_bytes(vi x) {
    struct Halves { __m128i low, high; } of = as<Halves>(low_halves(as<vu>(x & 0xff)));
    return as<vb>(_mm_packus_epi16(of.low, of.high));
}
#endif
static inline vh wide(vub x) { return as<vh>(_mm256_cvtepu8_epi16(as<__m128i>(x))); }
static inline vf widen(vh x) { return as<vf>(wide(x) << 16); }
static inline vf load(const bf16* p) { return widen(get<vh>(p)); }

// To nearest, ties to even; a NaN stays one.
static inline vh narrow(vf x) {
#ifdef __AVX512BF16__
    return as<vh>(_mm512_cvtneps_pbh(as<__m512>(x)));
#else
    vu u = as<vu>(x);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vi is_number = x == x;
    vu chosen = (as<vu>(is_number) & rounded) | (~as<vu>(is_number) & 0x7fc0u);
    return low_halves(chosen);
#endif
}
static inline void store(bf16* p, vf x) { put(p, narrow(x)); }
static inline float widen(bf16 x) { return as<float>(static_cast<std::uint32_t>(x) << 16); }
static inline bf16 narrow(float x) {
    std::uint32_t u = as<std::uint32_t>(x);
    return x == x ? static_cast<bf16>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : bf16{0x7fc0};
}

#ifdef __AVX512F__
static inline vf choose(vi mask, vf yes, vf no) { return mask ? yes : no; }
static inline vf max(vf a, vf b) { return as<vf>(_mm512_max_ps(as<__m512>(a), as<__m512>(b))); }
#else
static inline vf choose(vi mask, vf yes, vf no) {
    return {mask.low ? yes.low : no.low, mask.high ? yes.high : no.high};
}
static inline vf max(vf a, vf b) { return choose(a > b, a, b); }  // b where one is no number
#endif

// Both halves joined, then theirs, down to one: always the same tree.
template <class Lane, class V, class Join>
static inline Lane fold(V x, Join join) {
    if constexpr (sizeof x == 2 * sizeof(Lane)) {
        return join(x[0], x[1]);
    } else {
        typedef Lane Half __attribute__((vector_size(sizeof(V) / 2)));
        struct Halves { Half low, high; } of = as<Halves>(x);
        return fold<Lane>(join(of.low, of.high), join);
    }
}
static inline float sum(vf x) { return fold<float>(x, [](auto a, auto b) { return a + b; }); }
static inline std::int32_t sum(vi x) { return fold<std::int32_t>(x, [](auto a, auto b) { return a + b; }); }
static inline float largest(vf x) { return fold<float>(x, [](auto a, auto b) { return a > b ? a : b; }); }

// The largest magnitude of n numbers; NaN where one is a NaN or an infinity.
static inline float magnitude(const bf16* x, int n) {
    typedef std::int16_t Bits __attribute__((vector_size(32)));  // which order as magnitudes do: numbers, infinity, NaNs
    Bits most = {};
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        Bits bits;
        __builtin_memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fff;
        most = bits > most ? bits : most;
    }
    std::int16_t top = fold<std::int16_t>(most, [](auto a, auto b) { return a > b ? a : b; });
    for (; i < n; i++) {
        std::int16_t bits = static_cast<std::int16_t>(x[i] & 0x7fff);
        top = bits > top ? bits : top;
    }
    return top < 0x7f80 ? widen(static_cast<bf16>(top)) : __builtin_nanf("");
}

// a * b + c, rounded once.
static inline vf fused(vf a, vf b, vf c) {
#ifdef __AVX512F__
    return as<vf>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#else
    struct Halves { __m256 low, high; };
    Halves x = as<Halves>(a), y = as<Halves>(b), z = as<Halves>(c);
    return as<vf>(Halves{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
#endif
}

// Lanes i and i + H of every pair whose numbers differ in bit H: their sum and their difference.
template <int H> static inline vf butterfly(vf x) {
    alignas(64) static constexpr struct Signs {
        float of[16];
        constexpr Signs() : of{} { for (int i = 0; i < 16; i++) of[i] = i & H ? -1.0f : 1.0f; }
    } SIGNS;
#ifdef __AVX512F__
    __m512 v = as<__m512>(x), other;
    if constexpr (H == 1) other = _mm512_permute_ps(v, 0xb1);
    else if constexpr (H == 2) other = _mm512_permute_ps(v, 0x4e);
    else if constexpr (H == 4) other = _mm512_shuffle_f32x4(v, v, 0xb1);
    else other = _mm512_shuffle_f32x4(v, v, 0x4e);
    return fused(x, load(SIGNS.of), as<vf>(other));
#else
    if constexpr (H == 8) return {x.low + x.high, x.low - x.high};
    auto swapped = [](f8 of) {
        __m256 v = as<__m256>(of);
        if constexpr (H == 1) return as<f8>(_mm256_permute_ps(v, 0xb1));
        else if constexpr (H == 2) return as<f8>(_mm256_permute_ps(v, 0x4e));
        else return as<f8>(_mm256_permute2f128_ps(v, v, 1));
    };
    return fused(x, load(SIGNS.of), vf{swapped(x.low), swapped(x.high)});
#endif
}

static inline bool any(vi mask) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask(as<__m512i>(mask), as<__m512i>(mask)) != 0;
#else
    struct Halves { __m256i low, high; } of = as<Halves>(mask);
    __m256i either = _mm256_or_si256(of.low, of.high);
    return !_mm256_testz_si256(either, either);
#endif
}

// To the nearest whole number, ties to even, for magnitudes below 2^22.
static inline vi nearest(vf x) {
#ifdef __AVX512F__
    return as<vi>(_mm512_cvtps_epi32(as<__m512>(x)));
#else
    vf magic = all(12582912.0f);
    return ints((x + magic) - magic);
#endif
}

// 2^x with a relative error below 2e-7 for x in [-126, 127], exact for whole numbers; 0 below, as for -inf.
static inline vf exp2(vf x) {
#ifdef __AVX512F__
    vf whole = as<vf>(_mm512_roundscale_ps(as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    vf r = x - whole;
#else
    vi tiny = x < -126.0f;
    vf bounded = choose(tiny, all(-126.0f), x);
    bounded = choose(bounded > 127.0f, all(127.0f), bounded);
    vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    vf whole = (bounded + magic) - magic;
    vf r = bounded - whole;
#endif
    // 2^r in [-1/2, 1/2] by 1 + r times the polynomial of degree 4 with the least largest relative error.
    vf p = fused(all(0.00132647017f), r, all(0.00967150461f));
    p = fused(p, r, all(0.0555073358f));
    p = fused(p, r, all(0.240222424f));
    p = fused(p, r, all(0.693147004f));
    p = fused(p, r, all(1.0f));
#ifdef __AVX512F__
    __mmask16 counts = _mm512_cmp_ps_mask(as<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // a NaN does
    return as<vf>(_mm512_maskz_scalef_ps(counts, as<__m512>(p), as<__m512>(whole)));
#else
    vf scaled = as<vf>(as<vi>(p) + (ints(whole) << 23));
    return choose(tiny, all(0.0f), scaled);
#endif
}

static inline float exp2(float x) {
    float of[16];
    store(of, exp2(all(x)));
    return of[0];
}

constexpr float LOG2_E = 1.44269504088896f;

struct LaneNumbers { std::int32_t of[16]; };
constexpr LaneNumbers LANES = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

// Sixteen columns of tail: lanes [0, n).
static inline vi lanes_below(int n) { return as<vi>(LANES) < n; }
static inline vf load_part(const float* p, int n) {
    float part[16] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load(part);
}

}  // namespace penstock::PENSTOCK_ISA
