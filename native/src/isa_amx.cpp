// AMX: Sapphire Rapids and later. Packed products on tiles; attention and what goes row by row as with AVX-512.
#define PENSTOCK_ISA amx
#include "vec.hpp"
#include "product_avx512.inc.hpp"
#include "gemm_amx.inc.hpp"
#include "attention.inc.hpp"
#include "kv_write.inc.hpp"
#include "rows.inc.hpp"
#include "table.inc.hpp"

namespace penstock {
const Kernels* amx_kernels() { return &amx::table; }
}  // namespace penstock
