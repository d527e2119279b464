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
#include <type_traits>

#include "common/launch.h"

namespace dk {

constexpr int kWarp = 32;
constexpr int kSharedBytes = 48 << 10;  // of a block, without asking for more

// Warps of a block: eight, or as many as have room for what they share.
template <typename Body>
constexpr int warps_of() {
  constexpr int fit = kSharedBytes / sizeof(typename SharedOf<Body>::type);
  return fit < 8 ? fit : 8;
}

struct WarpLanes {
  void* memory;

  __device__ __forceinline__ int index() const { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int count() const { return kWarp; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  template <typename T>
  __device__ __forceinline__ T sum(T value) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      value += shuffle(value, step);
    }
    return value;
  }

  // The first two steps halve the number of sums that a lane works on, so that four take six shuffles, not twenty.
  template <typename T>
  __device__ __forceinline__ void sums(const T values[4], int run, T* target) const {
    int step = run / 2;
    const bool upper = index() & step;
    T first = upper ? values[2] : values[0], second = upper ? values[3] : values[1];
    first += shuffle(upper ? values[0] : values[2], step);
    second += shuffle(upper ? values[1] : values[3], step);
    step /= 2;
    const bool odd = index() & step;
    T sum = odd ? second : first;
    sum += shuffle(odd ? first : second, step);
    const int which = upper * 2 + odd, others = step - 1;
    while (step /= 2) {
      sum += shuffle(sum, step);
    }
    if (target && (index() & others) == 0) {
      target[which] = sum;
    }
  }

  template <typename Shared>
  __device__ __forceinline__ Shared& shared() const {
    return *static_cast<Shared*>(memory);
  }

 private:
  template <typename T>
  static __device__ __forceinline__ T shuffle(T value, int step) {
    return __shfl_xor_sync(0xffffffffu, value, step);
  }
};

// Blocks of a multiprocessor at the least. It also keeps the compiler from spilling a few registers for the sake of
// more blocks, as it does where nothing is said.
constexpr int kBlocks = 2;

template <typename Body>
__global__ void __launch_bounds__(warps_of<Body>() * kWarp, kBlocks) run_body(int64_t items, Body body) {
  using Shared = typename SharedOf<Body>::type;
  constexpr int kWarps = warps_of<Body>();
  const int warp = threadIdx.x / kWarp;
  WarpLanes lanes{nullptr};
  if constexpr (!std::is_empty_v<Shared>) {
    __shared__ __align__(alignof(Shared)) unsigned char memory[kWarps * sizeof(Shared)];
    lanes.memory = memory + warp * sizeof(Shared);
  }
  // A grid stride in whole warps: every lane of a warp sees the same item, so the shuffles above are always complete.
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp; item < items; item += stride) {
    body(item, lanes);
  }
}

struct CudaLauncher {
  using Guard = c10::cuda::CUDAGuard;

  static constexpr int kLanes = kWarp;
  static constexpr Limits limits = kLimits;

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
    constexpr int64_t per_block = warps_of<Body>();
    const int64_t blocks = std::min<int64_t>((items + per_block - 1) / per_block, int64_t{1} << 30);
    run_body<<<static_cast<unsigned>(blocks), per_block * kWarp, 0, c10::cuda::getCurrentCUDAStream()>>>(items, body);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace dk
