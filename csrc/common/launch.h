// One way to run a body over many work items: as a CUDA grid, or, to test the device arithmetic where no GPU is, as a
// plain loop.
//
// A body is a struct with `template <class Lanes> DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes)
// const`. The lanes of an item share its work: lane i of n takes the channels i, i + n, ... and `lanes.sum` adds up
// what they found.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <cstdint>

#include "common/host_device.h"

namespace dk {

struct HostLanes {
  DK_HOST_DEVICE int index() const { return 0; }
  DK_HOST_DEVICE int count() const { return 1; }
  template <typename T>
  DK_HOST_DEVICE T sum(T value) const {
    return value;
  }
};

struct HostLauncher {
  // Makes a device the current one as long as it lives.
  struct Guard {
    explicit Guard(c10::Device) {}
  };

  // Whether results may be waited for: not while a CUDA graph is recorded. Tests pretend that one is.
  static bool may_wait() { return !recording; }
  static inline bool recording = false;

  // A word that bodies write and the host reads without waiting. Tests pretend that the device lags behind: what it
  // wrote arrives when they stop.
  static std::atomic<uint64_t>& report() { return reported; }
  static uint64_t* report_from_device() { return lagging ? &late : reinterpret_cast<uint64_t*>(&reported); }
  static inline std::atomic<uint64_t> reported{0};
  static inline uint64_t late = 0;
  static inline bool lagging = false;

  template <typename Body>
  static void run(int64_t items, const Body& body) {
    for (int64_t item = 0; item < items; ++item) {
      body(item, HostLanes{});
    }
  }
};

// As long as it lives, kernels run on the device of the arguments, and torch's own operators between them take data
// types as they are: where a backward runs has nothing to do with where autocast was on.
template <typename Launcher>
struct DeviceScope {
  explicit DeviceScope(c10::Device device) : guard(device) {}

  typename Launcher::Guard guard;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

template <typename T>
DK_HOST_DEVICE void add_atomically(T* target, T value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(target, value);
#else
  *target += value;
#endif
}

// `kWidth` values read and written by one instruction. Pointers must be aligned to the whole.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T value[kWidth];

  DK_HOST_DEVICE static Vector load(const T* from) { return *reinterpret_cast<const Vector*>(from); }
  DK_HOST_DEVICE void store(T* to) const { *reinterpret_cast<Vector*>(to) = *this; }
};

}  // namespace dk
