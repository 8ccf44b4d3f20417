/* The kernels for processors with AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA_AVX2

#include "instructions.h"

static bool runs_here(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INSTRUCTION_SET(avx2_set, "AVX2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
