// Runs a device's body on the host as a GPU would: 32 lanes a warp, which stride over the channels, add up in a
// butterfly and have to arrive at every sum and every sync together. Slow, for tests. Each lane is a fiber of its own.
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

  // Calls lane(number) for all lanes, interleaved where they meet.
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
    T values[kLanes][1];
    meet(number, &value, values);
    add(values, kLanes);
    return values[number][0];
  }

  template <typename T>
  void sums(int number, const T own[4], int run, T* target) {
    T values[kLanes][4];
    meet(number, own, values);
    add(values, run);
    if (target && number % run == 0) {
      std::memcpy(target, values[number], sizeof(values[number]));
    }
  }

  void sync(int number) {
    const char nothing = 0;
    char all[kLanes][1];
    meet(number, &nothing, all);
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  // Waits for all lanes, then reads the values of all.
  template <typename T, int kCount>
  void meet(int number, const T* own, T (&values)[kLanes][kCount]) {
    static_assert(sizeof(values[0]) <= sizeof(Fiber::value[0]));
    Fiber& fiber = fibers_[number];
    // Two sets of values in turn: lanes that have gone on to the next meeting must not disturb those that still read.
    const int turn = fiber.sums++ % 2;
    fiber.size = sizeof(values[0]);
    std::memcpy(fiber.value[turn], own, sizeof(values[0]));
    swapcontext(&fiber.context, &caller_);
    for (int other = 0; other < kLanes; ++other) {
      std::memcpy(values[other], fibers_[other].value[turn], sizeof(values[0]));
    }
  }

  // The sums over runs of lanes, in the order of launcher.cuh.
  template <typename T, int kCount>
  static void add(T (&values)[kLanes][kCount], int run) {
    for (int step = run / 2; step > 0; step /= 2) {
      T next[kLanes][kCount];
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int k = 0; k < kCount; ++k) {
          next[lane][k] = values[lane][k] + values[lane ^ step][k];
        }
      }
      std::memcpy(values, next, sizeof(values));
    }
  }

  struct Fiber {
    ucontext_t context;
    bool done;
    int64_t item, sums;
    size_t size;
    double value[2][4];
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
  void* memory;

  int index() const { return number; }
  int count() const { return LockStepWarp::kLanes; }
  template <typename T>
  T sum(T value) const {
    return warp.sum(number, value);
  }
  template <typename T>
  void sums(const T values[4], int run, T* target) const {
    warp.sums(number, values, run, target);
  }
  void sync() const { warp.sync(number); }
  template <typename Shared>
  Shared& shared() const {
    return *static_cast<Shared*>(memory);
  }
};

struct LockStepLauncher : HostLauncher {
  static constexpr int kLanes = LockStepWarp::kLanes;

  template <typename Body>
  static void run(int64_t items, const Body& body) {
    constexpr int64_t kWarps = 3;  // so that items are strided over as in a grid
    LockStepWarp warp;
    typename SharedOf<Body>::type shared;
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    for (int64_t first = 0; first < std::min(kWarps, items); ++first) {
      warp.run([&](int number) {
        for (int64_t item = first; item < items; item += kWarps) {
          warp.begin(number, item);
          body(item, LockStepLanes{warp, number, &shared});
        }
      });
    }
  }
};

}  // namespace dk

#endif
