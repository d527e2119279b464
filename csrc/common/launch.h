// One way to run a body over many work items: as a CUDA grid, or, to test the device arithmetic where no GPU is, as a
// plain loop.
//
// A body is a struct with `template <class Lanes> DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes)
// const`. The lanes of an item share its work: lane i of n takes vectors of channels i, i + n, ... What they all need,
// such as where the taps look, each of them prepares a part of, in memory that they share: a body that has a type
// `Shared` gets one with `lanes.template shared<Shared>()`. Nobody clears it. Between writing and reading by other
// lanes, and between reading and writing anew, they meet in `lanes.sync()`, all of them.
//
//   index(), count()           which of how many lanes
//   sync()                     all lanes have come this far
//   sum(value)                 the sum of all lanes' values, for all of them
//   sums(values, run, target)  four sums over runs of `run` lanes, a power of two: target[0:4] of each run, in shared
//                              memory, for those who meet later; null for a run that has no use for them
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CanUse32BitIndexMath.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "common/host_device.h"

namespace dk {

struct NothingShared {};

template <typename Body, typename = void>
struct SharedOf {
  using type = NothingShared;
};

template <typename Body>
struct SharedOf<Body, std::void_t<typename Body::Shared>> {
  using type = typename Body::Shared;
};

struct HostLanes {
  void* memory;

  DK_HOST_DEVICE int index() const { return 0; }
  DK_HOST_DEVICE int count() const { return 1; }
  DK_HOST_DEVICE void sync() const {}
  template <typename T>
  DK_HOST_DEVICE T sum(T value) const {
    return value;
  }
  template <typename T>
  DK_HOST_DEVICE void sums(const T values[4], int, T* target) const {
    for (int k = 0; target && k < 4; ++k) {
      target[k] = values[k];
    }
  }
  template <typename Shared>
  DK_HOST_DEVICE Shared& shared() const {
    return *static_cast<Shared*>(memory);
  }
};

// Bounds that tests lower, to see small tensors cut into chunks and indexed with 64 bits.
struct Limits {
  int64_t column_bytes;   // of a buffer of columns or partial sums
  int64_t contributions;  // sorted at a time: see contributions.h
  int64_t elements;       // of a tensor that is indexed with 32 bits
};

constexpr Limits kLimits = {32 << 20, 4 << 20, std::numeric_limits<int32_t>::max()};

struct HostLauncher {
  // Makes a device the current one as long as it lives.
  struct Guard {
    explicit Guard(c10::Device) {}
  };

  static constexpr int kLanes = 1;
  static inline Limits limits = kLimits;

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
    typename SharedOf<Body>::type shared;
    for (int64_t item = 0; item < items; ++item) {
      std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));  // as undefined as on a GPU: NaN
      body(item, HostLanes{&shared});
    }
  }
};

// Calls body(I{}), where I is the narrowest type that numbers the elements of the tensors, and all of `numbers`.
template <typename Launcher, typename Body>
void with_index(
    std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors,
    std::initializer_list<int64_t> numbers,
    const Body& body) {
  const int64_t limit = Launcher::limits.elements;
  const bool narrow = std::all_of(
                          tensors.begin(), tensors.end(),
                          [&](const at::Tensor& tensor) {
                            return !tensor.defined() || at::native::canUse32BitIndexMath(tensor, limit);
                          }) &&
                      std::all_of(numbers.begin(), numbers.end(), [&](int64_t number) { return number < limit; });
  if (narrow) {
    body(int32_t{});
  } else {
    body(int64_t{});
  }
}

// Items at a time, in even parts: as many as have room in the buffers of columns, `column_bytes` each in all `buffers`
// together, and among the contributions that are sorted together, `listed` each. What the buffers hold is at most half
// of all columns, unless these are small.
template <typename Launcher>
int64_t chunk_of(int64_t items, int64_t column_bytes, int64_t buffers, int64_t listed) {
  constexpr int64_t kSmall = 1 << 20;
  int64_t fit = std::max<int64_t>(items, 1);
  if (column_bytes > 0) {
    fit = std::min(
        fit,
        std::min(Launcher::limits.column_bytes, std::max(fit * column_bytes / buffers / 2, kSmall)) / column_bytes);
  }
  if (listed > 0) {
    fit = std::min(fit, Launcher::limits.contributions / listed);
  }
  fit = std::max<int64_t>(fit, 1);
  const int64_t chunks = std::max<int64_t>((items + fit - 1) / fit, 1);
  return std::max<int64_t>((items + chunks - 1) / chunks, 1);
}

// Blocks of output positions whose partial sums are added up afterwards: enough of them to fill a device with warps,
// of which each block has `warps`, as long as their sums, `bytes` each, stay small.
struct Blocks {
  int64_t size, count;
};

template <typename Launcher>
Blocks blocks_of(int64_t positions, int64_t warps, int64_t bytes) {
  constexpr int64_t kWarps = 4096, kLeast = 32;
  const int64_t most = std::max<int64_t>(Launcher::limits.column_bytes / bytes, 1);
  const int64_t wanted = std::min({(kWarps + warps - 1) / warps, (positions + kLeast - 1) / kLeast, most});
  const int64_t size = std::max<int64_t>((positions + wanted - 1) / std::max<int64_t>(wanted, 1), 1);
  return {size, (positions + size - 1) / size};
}

// How the lanes of a warp are dealt out where few of them have all channels: runs of 2^shift lanes take a row each.
struct Rows {
  int shift;

  template <typename Lanes>
  DK_HOST_DEVICE int lane(const Lanes& lanes) const {
    return lanes.index() & (lanes_of_a_row() - 1);
  }
  template <typename Lanes>
  DK_HOST_DEVICE int number(const Lanes& lanes) const {
    return lanes.index() >> shift;
  }
  template <typename Lanes>
  DK_HOST_DEVICE int at_once(const Lanes& lanes) const {
    return lanes.count() >> shift;
  }
  DK_HOST_DEVICE int lanes_of_a_row() const { return 1 << shift; }
};

// Rows of `vectors` vectors. Four lanes have one at least: `sums` wants as many.
template <typename Launcher>
Rows rows_of(int64_t vectors) {
  int shift = Launcher::kLanes > 1 ? 2 : 0;
  while (1 << shift < Launcher::kLanes && 1 << shift < vectors) {
    ++shift;
  }
  return {shift};
}

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

// Bytes read by one instruction, whatever they are.
template <int kBytes>
struct alignas(kBytes) [[gnu::may_alias]] Words {
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;
  Word word[kBytes / sizeof(Word)];
};

// `kWidth` values read and written by one instruction. Pointers must be aligned to the whole. (That of ATen is for CUDA
// compilers only.)
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T value[kWidth];

  DK_HOST_DEVICE static Vector load(const T* from) { return *reinterpret_cast<const Vector*>(from); }

  // Zeros unless `wanted`. In words, as halves of them would each be chosen by an instruction of its own.
  DK_HOST_DEVICE static Vector load_if(bool wanted, const T* from) {
    Words<sizeof(Vector)> words = {};
    if (wanted) {
      words = *reinterpret_cast<const Words<sizeof(Vector)>*>(from);
    }
    Vector vector;
    std::memcpy(&vector, &words, sizeof(Vector));
    return vector;
  }
  DK_HOST_DEVICE void store(T* to) const { *reinterpret_cast<Vector*>(to) = *this; }
};

template <int kWidth, typename T, typename A>
DK_HOST_DEVICE void widen(const Vector<T, kWidth>& narrow, A (&wide)[kWidth]) {
  DK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    wide[i] = static_cast<A>(narrow.value[i]);
  }
}

template <int kWidth, typename T, typename A>
DK_HOST_DEVICE void store_narrow(const A (&wide)[kWidth], T* to) {
  Vector<T, kWidth> narrow;
  DK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    narrow.value[i] = static_cast<T>(wide[i]);
  }
  narrow.store(to);
}

// Values that one atomic instruction adds.
template <typename T, int kWidth>
DK_HOST_DEVICE constexpr int atomic_width() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return std::is_same_v<T, float> && kWidth % 4 == 0 ? 4 : 1;
#else
  return 1;
#endif
}

// target[0:kWidth] += factor * values.
template <int kWidth, typename T>
DK_HOST_DEVICE void add_atomically(T* target, T factor, const T* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<T, float> && kWidth == 4) {
    atomicAdd(
        reinterpret_cast<float4*>(target),
        make_float4(factor * values[0], factor * values[1], factor * values[2], factor * values[3]));
  } else
#endif
  {
    for (int i = 0; i < kWidth; ++i) {
      add_atomically(target + i, factor * values[i]);
    }
  }
}

// How many of a type's values are read at a time, sixteen bytes, where `counts` of channels and all of the tensors
// allow it: calls body(std::integral_constant<int, width>{}).
template <typename T, int kWide = 16 / sizeof(T), typename Body>
void with_width(
    std::initializer_list<int64_t> counts,
    std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors,
    const Body& body) {
  const bool fits = std::all_of(counts.begin(), counts.end(), [](int64_t count) { return count % kWide == 0; }) &&
                    std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
                      return !tensor.defined() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
                    });
  if (fits) {
    body(std::integral_constant<int, kWide>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace dk
