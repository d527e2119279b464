// Runs the bodies of common/ on the current device and stream.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace dk {

constexpr int kWarp = 32;
constexpr int kBlock = 256;

struct WarpLanes {
  __device__ __forceinline__ int index() const { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int count() const { return kWarp; }
  template <typename T>
  __device__ __forceinline__ T sum(T value) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    return value;
  }
};

template <typename Body>
__global__ void __launch_bounds__(kBlock) run_body(int64_t items, Body body) {
  // A grid stride in whole warps: every lane of a warp sees the same item, so the shuffles above are always complete.
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp; item < items;
       item += warps) {
    body(item, WarpLanes{});
  }
}

struct CudaLauncher {
  using Guard = c10::cuda::CUDAGuard;

  static bool may_wait() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None; }

  // A word that kernels write and the host reads without waiting, one for all devices. Never freed: kernels may outlive
  // what runs at the end of a process.
  static std::atomic<uint64_t>& report() {
    static std::atomic<uint64_t>& word = []() -> std::atomic<uint64_t>& {
      const c10::cuda::CUDAStreamCaptureModeGuard while_a_graph_is_recorded(cudaStreamCaptureModeRelaxed);
      void* memory = nullptr;
      C10_CUDA_CHECK(
          cudaHostAlloc(&memory, sizeof(std::atomic<uint64_t>), cudaHostAllocPortable | cudaHostAllocMapped));
      return *new (memory) std::atomic<uint64_t>(0);
    }();
    return word;
  }
  static uint64_t* report_from_device() {
    void* pointer = nullptr;
    C10_CUDA_CHECK(cudaHostGetDevicePointer(&pointer, &report(), 0));
    return static_cast<uint64_t*>(pointer);
  }

  template <typename Body>
  static void run(int64_t items, const Body& body) {
    if (items == 0) {
      return;
    }
    constexpr int64_t per_block = kBlock / kWarp;
    const int64_t blocks = std::min<int64_t>((items + per_block - 1) / per_block, int64_t{1} << 30);
    run_body<<<static_cast<unsigned>(blocks), kBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(items, body);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace dk
