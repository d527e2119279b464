// What host compilers and nvcc both need to read the shared bodies.
#pragma once

#if defined(__CUDACC__)
#define DK_HOST_DEVICE __host__ __device__ __forceinline__
#define DK_UNROLL _Pragma("unroll")
#else
#define DK_HOST_DEVICE inline
#define DK_UNROLL
#endif
