// AVX-512 without VDPBF16PS: Skylake-X, Cascade Lake, Ice Lake.
#define PENSTOCK_ISA avx512
#include "vec.hpp"
#include "gemm_avx512.inc.hpp"
#include "attention.inc.hpp"
#include "kv_write.inc.hpp"
#include "rows.inc.hpp"
#include "table.inc.hpp"

namespace penstock {
const Kernels* avx512_kernels() { return &avx512::table; }
}  // namespace penstock
