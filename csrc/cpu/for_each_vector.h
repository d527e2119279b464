// Includes DK_VECTOR_FILE once for every instruction set, each time in a namespace of its own: its functions are marked
// DK_TARGET, or DK_INLINE, and compute with vectors of DK_VECTOR_BYTES. GCC takes vector types apart before it clones a
// function, so target_clones cannot do this. DK_BEST(NAME) is the NAME that the processor runs fastest. What is common
// to such files is in vectors.h.
#define DK_INLINE DK_TARGET inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define DK_TARGET __attribute__((target("avx512f,fma")))
#define DK_VECTOR_BYTES 64
namespace avx512 {
#include DK_VECTOR_FILE
}  // namespace avx512
#undef DK_TARGET
#undef DK_VECTOR_BYTES
#define DK_TARGET __attribute__((target("avx2,fma")))
#define DK_VECTOR_BYTES 32
namespace avx2 {
#include DK_VECTOR_FILE
}  // namespace avx2
#undef DK_TARGET
#undef DK_VECTOR_BYTES
#endif
#define DK_TARGET
#define DK_VECTOR_BYTES 16
namespace any {
#include DK_VECTOR_FILE
}  // namespace any
#undef DK_TARGET
#undef DK_VECTOR_BYTES
#undef DK_INLINE
#undef DK_VECTOR_FILE

#ifndef DK_BEST
#if defined(__x86_64__) && defined(__GNUC__)
#define DK_BEST(...)                                                                       \
  (__builtin_cpu_supports("avx512f")                                 ? avx512::__VA_ARGS__ \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::__VA_ARGS__   \
                                                                     : any::__VA_ARGS__)
#else
#define DK_BEST(...) (any::__VA_ARGS__)
#endif
#endif
