// Runs a device's body on the host as a GPU would: 32 lanes a warp, which stride over the channels, add up in a
// butterfly and have to arrive at every sum together. Slow, for tests. Each lane is a fiber of its own.
#pragma once

#if defined(__linux__)
#define DK_HAS_LOCK_STEP

#include <c10/util/Exception.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>

#include "common/launch.h"

namespace dk {

class LockStepWarp {
 public:
  static constexpr int kLanes = 32;

  // Calls lane(number) for all lanes, interleaved at their sums.
  template <typename Lane>
  void run(const Lane& lane) {
    call_ = [](LockStepWarp& warp, int number) { (*static_cast<const Lane*>(warp.lane_))(number); };
    lane_ = &lane;
    for (int number = 0; number < kLanes; ++number) {
      Fiber& fiber = fibers_[number];
      fiber = {};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.get() + number * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &caller_;
      const auto self = reinterpret_cast<uintptr_t>(this);  // makecontext passes numbers of type int
      makecontext(
          &fiber.context, reinterpret_cast<void (*)()>(&LockStepWarp::enter), 3, static_cast<unsigned>(self),
          static_cast<unsigned>(self >> 16 >> 16), number);
    }
    for (;;) {
      int done = 0;
      for (Fiber& fiber : fibers_) {
        if (!fiber.done) {
          swapcontext(&caller_, &fiber.context);
        }
        done += fiber.done;
      }
      if (done == kLanes) {
        return;
      }
      for (int number = 0; number < kLanes; ++number) {
        const Fiber &fiber = fibers_[number], &first = fibers_[0];
        TORCH_CHECK(
            !fiber.done && fiber.item == first.item && fiber.sums == first.sums && fiber.size == first.size,
            "lock step: lane ", number, " is not at the sum that lane 0 is at: item ", fiber.item, ", sum ", fiber.sums,
            " against item ", first.item, ", sum ", first.sums);
      }
    }
  }

  // Says which work item a lane is at, for the check that lanes meet.
  void begin(int number, int64_t item) { fibers_[number].item = item; }

  template <typename T>
  T sum(int number, T value) {
    static_assert(sizeof(T) <= sizeof(double));
    Fiber& fiber = fibers_[number];
    // Two sets of values in turn: lanes that have gone on to the next sum must not disturb those that still read.
    const int turn = fiber.sums++ % 2;
    fiber.size = sizeof(T);
    std::memcpy(&fiber.value[turn], &value, sizeof(T));
    swapcontext(&fiber.context, &caller_);
    T values[kLanes];
    for (int other = 0; other < kLanes; ++other) {
      std::memcpy(&values[other], &fibers_[other].value[turn], sizeof(T));
    }
    for (int step = kLanes / 2; step > 0; step /= 2) {  // as __shfl_xor_sync in launcher.cuh
      T next[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        next[lane] = values[lane] + values[lane ^ step];
      }
      std::memcpy(values, next, sizeof(values));
    }
    return values[number];
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  struct Fiber {
    ucontext_t context;
    bool done;
    int64_t item, sums;
    size_t size;
    double value[2];
  };

  static void enter(unsigned low, unsigned high, int number) {
    auto& warp = *reinterpret_cast<LockStepWarp*>(static_cast<uintptr_t>(high) << 16 << 16 | low);
    warp.call_(warp, number);
    warp.fibers_[number].done = true;
  }

  void (*call_)(LockStepWarp&, int) = nullptr;
  const void* lane_ = nullptr;
  ucontext_t caller_;
  Fiber fibers_[kLanes];
  std::unique_ptr<char[]> stacks_{new char[kLanes * kStack]};
};

struct LockStepLanes {
  LockStepWarp& warp;
  int number;

  int index() const { return number; }
  int count() const { return LockStepWarp::kLanes; }
  template <typename T>
  T sum(T value) const {
    return warp.sum(number, value);
  }
};

struct LockStepLauncher : HostLauncher {
  template <typename Body>
  static void run(int64_t items, const Body& body) {
    constexpr int64_t kWarps = 3;  // so that items are strided over as in a grid
    LockStepWarp warp;
    for (int64_t first = 0; first < std::min(kWarps, items); ++first) {
      warp.run([&](int number) {
        for (int64_t item = first; item < items; item += kWarps) {
          warp.begin(number, item);
          body(item, LockStepLanes{warp, number});
        }
      });
    }
  }
};

}  // namespace dk

#endif
