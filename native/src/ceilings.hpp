// What the machine itself can do, measured: the yardstick of `penstock bench kernels`.
#pragma once
#include <cstddef>

#include "kernels.hpp"
#include "team.hpp"

namespace penstock {

// Bytes per second at which the team reads `bytes` of memory, each member its own part; the best of some rounds.
double read_rate(Team& team, std::size_t bytes);

// Operations per second (two per multiply-add) of a format's products with everything in the nearest cache.
double product_rate(const Kernels& kernels, Team& team, Format format);

}  // namespace penstock
