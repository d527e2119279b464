// Inner loops compiled for several instruction sets; the loader picks the best one the processor has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DK_SIMD_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DK_SIMD_CLONES
#endif

// GCC takes vector types apart before it clones a function, for the poorest instruction set. A function that computes
// with them is therefore written as a macro of (name, attributes, bytes of a vector), and made for each set by this
// one; NAME<T>(...) then is the best that the processor has.
#if defined(__x86_64__) && defined(__GNUC__)
#define DK_FOR_EACH_VECTOR(MACRO, NAME)                                                                  \
  MACRO(NAME##_avx512, __attribute__((target("avx512f,fma"))), 64)                                       \
  MACRO(NAME##_avx2, __attribute__((target("avx2,fma"))), 32)                                            \
  MACRO(NAME##_any, , 16)                                                                                \
  template <typename T>                                                                                  \
  const auto NAME = __builtin_cpu_supports("avx512f")                                 ? NAME##_avx512<T> \
                    : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? NAME##_avx2<T>   \
                                                                                      : NAME##_any<T>;
#else
#define DK_FOR_EACH_VECTOR(MACRO, NAME) \
  MACRO(NAME##_any, , 16)               \
  template <typename T>                 \
  const auto NAME = NAME##_any<T>;
#endif
