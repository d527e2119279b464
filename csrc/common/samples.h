// Samples of a channels-last map as the lanes of a warp take them: where one is and what it weighs is computed once,
// by one lane, and lies in memory that all of them share.
#pragma once

#include "common/bilinear.h"
#include "common/launch.h"

namespace dk {

constexpr int kTable = 16;  // samples prepared at a time

template <typename A, typename I>
struct alignas(16) Sample {
  I pixel[4];   // of each corner the first channel's number in the map, -1 where it is off the map
  A weight[4];  // bilinear, times mask; zero off the map, so that sums need not ask
  A fy, fx, mask;

  Sample() = default;

  // `first` is the number of the image's first pixel.
  DK_HOST_DEVICE Sample(const Corners<A, I>& corners, A mask, I first, I channels)
      : fy(corners.fy), fx(corners.fx), mask(mask) {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      pixel[k] = corners.index[k] < 0 ? -1 : (first + corners.index[k]) * channels;
      weight[k] = corners.index[k] < 0 ? A(0) : corners.weight[k] * mask;
    }
  }

  DK_HOST_DEVICE bool on_map() const { return pixel[0] >= 0 || pixel[1] >= 0 || pixel[2] >= 0 || pixel[3] >= 0; }

  // The corners' values from channel `map[0]` on; zero off the map.
  template <typename T, int kWidth>
  DK_HOST_DEVICE void load(const T* map, Vector<T, kWidth> (&value)[4]) const {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      value[k] = Vector<T, kWidth>::load_if(pixel[k] >= 0, map + pixel[k]);
    }
  }

  // The sampled, modulated values.
  template <typename T, int kWidth>
  DK_HOST_DEVICE void weigh(const Vector<T, kWidth> (&value)[4], A (&sum)[kWidth]) const {
    DK_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = 0;
    }
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        sum[i] += weight[k] * static_cast<A>(value[k].value[i]);
      }
    }
  }

  // dot[k] += the products of grad with corner k's values, summed.
  template <typename T, int kWidth>
  DK_HOST_DEVICE void add_dots(const A (&grad)[kWidth], const Vector<T, kWidth> (&value)[4], A (&dot)[4]) const {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        dot[k] += grad[i] * static_cast<A>(value[k].value[i]);
      }
    }
  }

  // The gradient of the mask, given sums of the corners' values times the gradient of the sampled value.
  DK_HOST_DEVICE A by_mask(const A dot[4]) const {
    return (1 - fy) * ((1 - fx) * dot[0] + fx * dot[1]) + fy * ((1 - fx) * dot[2] + fx * dot[3]);
  }
};

// For every tap and corner of a position the pixel it touches, numbered within planes of `plane` pixels, and its
// weight. `first` is the number of the position's first contribution, `image` and `map` are the numbers of its image
// and its plane, and make(tap) is the tap's sample.
template <typename A, typename I, typename Lanes, typename Make>
DK_HOST_DEVICE void list_corners(
    int64_t first,
    I taps,
    I image,
    I map,
    I plane,
    I channels,
    int64_t* pixels,
    A* weights,
    const Lanes& lanes,
    const Make& make) {
  for (I tap = lanes.index(); tap < taps; tap += lanes.count()) {
    const Sample<A, I> sample = make(tap);
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (sample.pixel[k] >= 0) {
        pixels[first + tap * 4 + k] = (map - image) * static_cast<int64_t>(plane) + sample.pixel[k] / channels;
        weights[first + tap * 4 + k] = sample.weight[k];
      }
    }
  }
}

// Adds a sample's gradient, `kWidth` channels a lane, to the four corners with atomics. Lanes of a row have channels
// from `begin` on, up to `end`. An instruction adds to neighbouring addresses from all lanes, so values change lanes on
// the way unless one instruction adds all that a lane has.
template <typename A, int kWidth>
struct Scatter {
  alignas(sizeof(A) * kWidth) A staged[32 * kWidth];

  // All lanes come here, those of rows without a sample with `active` false.
  template <typename I, typename Lanes>
  DK_HOST_DEVICE void operator()(
      const A (&grad)[kWidth],
      const Sample<A, I>& sample,
      bool active,
      I begin,
      I end,
      const Rows& rows,
      A* target,
      const Lanes& lanes) {
    constexpr int kAtOnce = atomic_width<A, kWidth>();
    const int lane = rows.lane(lanes), row = rows.lanes_of_a_row();
    if constexpr (kAtOnce == kWidth) {
      add(grad, sample, active, begin + lane * kWidth, end, target);
    } else {
      A* own = staged + lanes.index() * kWidth;
      Vector<A, kWidth> values;
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        values.value[i] = grad[i];
      }
      lanes.sync();
      values.store(own);
      lanes.sync();
      const A* theirs = staged + (lanes.index() - lane) * kWidth;
      DK_UNROLL
      for (int part = 0; part < kWidth / kAtOnce; ++part) {
        const int c = (part * row + lane) * kAtOnce;
        const auto some = Vector<A, kAtOnce>::load(theirs + c);
        add(some.value, sample, active, begin + c, end, target);
      }
    }
  }

 private:
  template <typename I, int kAtOnce>
  DK_HOST_DEVICE static void add(
      const A (&values)[kAtOnce], const Sample<A, I>& sample, bool active, I c, I end, A* target) {
    if (active && c < end) {
      DK_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (sample.pixel[k] >= 0) {
          add_atomically<kAtOnce>(target + sample.pixel[k] + c, sample.weight[k], values);
        }
      }
    }
  }
};

}  // namespace dk
