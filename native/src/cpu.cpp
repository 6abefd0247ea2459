#include "cpu.hpp"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace penstock {

#if defined(__x86_64__)
namespace {
// Linux hands out the tile registers on request, once per process.
[[maybe_unused]] bool may_use_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
}  // namespace
#endif

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#ifdef PENSTOCK_EMULATE_AMX
    bool amx = bf16;
#else
    bool amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
               __builtin_cpu_supports("amx-int8") && may_use_tiles();
#endif
    if (amx && amx_kernels()) found.push_back(amx_kernels());
    if (bf16 && avx512_bf16_kernels()) found.push_back(avx512_bf16_kernels());
    if (avx512 && avx512_kernels()) found.push_back(avx512_kernels());
    if (avx2 && avx2_kernels()) found.push_back(avx2_kernels());
#endif
    return found;
}

}  // namespace penstock
