// Plain arithmetic of units that are compiled for every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace penstock {

inline std::size_t up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

inline float bf16_to_float(std::uint16_t x) {
    std::uint32_t u = static_cast<std::uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

}  // namespace penstock
