// AMX: Sapphire Rapids and later. Packed products and attention over bf16 on tiles; what goes row by row as with AVX-512.
#define PENSTOCK_ISA amx
#include "vec.hpp"
#ifdef PENSTOCK_EMULATE_AMX
#include "emulated_amx.hpp"
#endif
#include "product_avx512.inc.hpp"
#include "rare.inc.hpp"
#include "gemm_amx.inc.hpp"
#include "attention.inc.hpp"
#include "attend_amx.inc.hpp"
#include "kv_write.inc.hpp"
#include "rows.inc.hpp"
#include "table.inc.hpp"

namespace penstock {
const Kernels* amx_kernels() {
    static const Kernels on_tiles = [] {
        Kernels kernels = amx::table;
        kernels.attend = amx::attend_on_tiles;
        kernels.query_rows = 2 * amx::TileProducts::ROWS;
        return kernels;
    }();
    return &on_tiles;
}
}  // namespace penstock
