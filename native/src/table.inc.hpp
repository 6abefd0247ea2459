// What an instruction set offers, once its products are defined.
#define PENSTOCK_NAME_OF(isa) #isa
#define PENSTOCK_NAME(isa) PENSTOCK_NAME_OF(isa)
namespace penstock::PENSTOCK_ISA {
static const Kernels table = {
    PENSTOCK_NAME(PENSTOCK_ISA), ROWS_AT_ONCE, MAX_COLUMNS, QUERY_ROWS, gemm, write_kv, attend, merge, finish, rms_norm, rope,
    quantize, rotate, silu_mul, add, store_rounded, best, peaks, weigh,
};
}  // namespace penstock::PENSTOCK_ISA
