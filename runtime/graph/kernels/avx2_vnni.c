/* The kernels for processors with AVX2 and its VNNI. */
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define ISA_AVX2
#define ISA_AVX_VNNI

#include "instructions.h"

static bool runs_here(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avxvnni");
}

INSTRUCTION_SET(avx2_vnni_set, "AVX2 VNNI");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
