// AMX tiles: not written yet.
#include "kernels.hpp"

namespace penstock {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace penstock
