// What host compilers and nvcc both need to read the shared bodies.
#pragma once

#if defined(__CUDACC__)
#define DK_HOST_DEVICE __host__ __device__ __forceinline__
#define DK_UNROLL _Pragma("unroll")
#define DK_NO_UNROLL _Pragma("unroll 1")
#else
#define DK_HOST_DEVICE inline
#define DK_UNROLL
#define DK_NO_UNROLL
#endif
