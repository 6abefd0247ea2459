// AVX2 and FMA: every x86 server and laptop since 2013.
#define PENSTOCK_ISA avx2
#include "vec.hpp"
#include "gemm_avx2.inc.hpp"
#include "attention.inc.hpp"
#include "kv_write.inc.hpp"
#include "rows.inc.hpp"
#include "table.inc.hpp"

namespace penstock {
const Kernels* avx2_kernels() { return &avx2::table; }
}  // namespace penstock
