// What lets plain loops run at the width of the processor they meet.
#pragma once

// GCC compiles a function marked ORPO_CLONES once per instruction set and picks one at load time
// (x86-64-v4: AVX-512, v3: AVX2 + FMA). Older GCC does not know these names, other compilers and
// systems have no ifunc: they get the one plain version, vectorised for the baseline (NEON, SSE2).
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && \
    defined(__GNUC__) && __GNUC__ >= 12
    #define ORPO_CLONES \
        __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
    #define ORPO_CLONES
#endif

// Whatever a marked function calls must be inlined: a call would leave its instruction set.
#if defined(__GNUC__)
    #define ORPO_INLINE inline __attribute__((always_inline))
    #define ORPO_INLINE_LAMBDA __attribute__((always_inline))
#else
    #define ORPO_INLINE inline
    #define ORPO_INLINE_LAMBDA
#endif
