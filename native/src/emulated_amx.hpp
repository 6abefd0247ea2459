// AMX in software, so that kernels on tiles are tested on any machine with AVX-512: what Intel's manual says of each
// instruction, and an end of the process where the hardware would fault or a product's shapes do not fit. Only for
// tests (-DEMULATE_AMX=ON): a tile product takes about a microsecond.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace penstock::emulated_amx {

struct Tile {
    int rows = 0, row_bytes = 0;  // 0: not configured
    alignas(64) char data[16][64];
};

inline thread_local Tile tiles[8];

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

inline Tile& configured(int tile) {
    if (!tiles[tile].rows) fail("a tile that is not configured");
    return tiles[tile];
}

inline void load_config(const void* from) {
    unsigned char bytes[64];
    std::memcpy(bytes, from, sizeof bytes);
    if (bytes[0] != 1) fail("no such palette");
    for (int i = 1; i < 16; i++)
        if (bytes[i]) fail("reserved bytes of a configuration are not zero");
    for (int i = 0; i < 16; i++) {
        std::uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        int rows = bytes[48 + i];
        if (row_bytes > 64 || row_bytes % 4 || rows > 16 || !rows != !row_bytes || (i >= 8 && rows)) fail("a tile of no such size");
        if (i < 8) tiles[i].rows = rows, tiles[i].row_bytes = row_bytes, std::memset(tiles[i].data, 0, sizeof tiles[i].data);
    }
}

inline void release() {
    for (Tile& tile : tiles) tile.rows = tile.row_bytes = 0;
}

inline void zero(int tile) { std::memset(configured(tile).data, 0, sizeof tiles[tile].data); }

inline void load(int tile, const void* from, std::size_t stride) {
    Tile& to = configured(tile);
    std::memset(to.data, 0, sizeof to.data);
    for (int r = 0; r < to.rows; r++) std::memcpy(to.data[r], static_cast<const char*>(from) + r * stride, to.row_bytes);
}

inline void store(int tile, void* to, std::size_t stride) {
    const Tile& from = configured(tile);
    for (int r = 0; r < from.rows; r++) std::memcpy(static_cast<char*>(to) + r * stride, from.data[r], from.row_bytes);
}

inline void check_shapes(const Tile& c, const Tile& a, const Tile& b) {
    if (&c == &a || &c == &b || &a == &b) fail("a product of a tile with itself");
    if (c.rows != a.rows || a.row_bytes != 4 * b.rows || c.row_bytes != b.row_bytes) fail("shapes of a product do not fit");
}

// Elements 2 i and 2 i + 1 of pairs of bf16 as float32; subnormal ones are zero, as the instruction takes them.
inline __m512 even_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd_half(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))); }
inline __m512 without_subnormals(__m512 x) {
    __mmask16 tiny = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(x, tiny, _mm512_setzero_ps());
}

// c += a b of bf16, even and odd elements of K summed apart.
inline void dot_bf16(int c_tile, int a_tile, int b_tile) {
    Tile &c = configured(c_tile), &a = configured(a_tile), &b = configured(b_tile);
    check_shapes(c, a, b);
    for (int m = 0; m < c.rows; m++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < b.rows; k++) {
            std::int32_t pair;
            std::memcpy(&pair, a.data[m] + 4 * k, 4);
            __m512i of_a = _mm512_set1_epi32(pair), of_b = _mm512_load_si512(b.data[k]);
            even = _mm512_fmadd_ps(without_subnormals(even_half(of_a)), without_subnormals(even_half(of_b)), even);
            odd = _mm512_fmadd_ps(without_subnormals(odd_half(of_a)), without_subnormals(odd_half(of_b)), odd);
        }
        __m512 sum = _mm512_add_ps(_mm512_load_ps(c.data[m]), _mm512_add_ps(even, odd));
        _mm512_store_ps(c.data[m], without_subnormals(sum));
    }
}

// c += a b of int8, exact.
inline void dot_int8(int c_tile, int a_tile, int b_tile) {
    Tile &c = configured(c_tile), &a = configured(a_tile), &b = configured(b_tile);
    check_shapes(c, a, b);
    for (int m = 0; m < c.rows; m++) {
        __m512i sum = _mm512_load_si512(c.data[m]);
        for (int k = 0; k < b.rows; k++) {
            __m512i of_b = _mm512_load_si512(b.data[k]);
            for (int i = 0; i < 4; i++) {
                auto of_a = static_cast<signed char>(a.data[m][4 * k + i]);
                __m512i element = _mm512_srai_epi32(_mm512_slli_epi32(of_b, 24 - 8 * i), 24);
                sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(element, _mm512_set1_epi32(of_a)));
            }
        }
        _mm512_store_si512(c.data[m], sum);
    }
}

}  // namespace penstock::emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig penstock::emulated_amx::load_config
#define _tile_release penstock::emulated_amx::release
#define _tile_zero penstock::emulated_amx::zero
#define _tile_loadd penstock::emulated_amx::load
#define _tile_stream_loadd penstock::emulated_amx::load
#define _tile_stored penstock::emulated_amx::store
#define _tile_dpbf16ps penstock::emulated_amx::dot_bf16
#define _tile_dpbssd penstock::emulated_amx::dot_int8
