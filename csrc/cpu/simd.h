// Inner loops compiled for several instruction sets; the loader picks the best one the processor has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DK_SIMD_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DK_SIMD_CLONES
#endif
