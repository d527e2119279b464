// Bilinear sampling and its derivatives, once for every operator and both kinds of machine.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace dk {

// The four pixels around a sampling position, in the order (top left, top right, bottom left, bottom right). `index` is
// the row-major pixel number, -1 where the pixel lies outside the map and counts as zero; `weight` are the bilinear
// weights.
template <typename T, typename I = int64_t>
struct Corners {
  I index[4];
  T weight[4];
  T fy, fx;  // distances to the top row and the left column, in [0, 1)
};

// Positions with -1 < y < height and -1 < x < width see the map. The guard is written so that NaN fails it; infinities
// and everything outside fail it too, and such a position reads nothing and gets no gradient.
template <typename T, typename I>
DK_HOST_DEVICE Corners<T, I> bilinear_corners(T y, T x, I height, I width) {
  Corners<T, I> c;
  if (!(y > T(-1) && y < T(height) && x > T(-1) && x < T(width))) {
    for (int k = 0; k < 4; ++k) {
      c.index[k] = -1;
      c.weight[k] = T(0);
    }
    c.fy = c.fx = T(0);
    return c;
  }
  const T top = std::floor(y), left = std::floor(x);
  const I y0 = static_cast<I>(top), x0 = static_cast<I>(left);
  c.fy = y - top;
  c.fx = x - left;
  const bool has_top = y0 >= 0, has_bottom = y0 + 1 < height, has_left = x0 >= 0, has_right = x0 + 1 < width;
  const I first = y0 * width + x0;
  c.index[0] = has_top && has_left ? first : -1;
  c.index[1] = has_top && has_right ? first + 1 : -1;
  c.index[2] = has_bottom && has_left ? first + width : -1;
  c.index[3] = has_bottom && has_right ? first + width + 1 : -1;
  c.weight[0] = (1 - c.fy) * (1 - c.fx);
  c.weight[1] = (1 - c.fy) * c.fx;
  c.weight[2] = c.fy * (1 - c.fx);
  c.weight[3] = c.fy * c.fx;
  return c;
}

// One axis of a sampling position, moved to the nearest pixel centre where it lies beyond the first or the last one:
// weight 1 - fraction on pixel `low`, fraction on `high`. Beyond them the sampled value does not change with the
// position: `moves` is false.
template <typename T, typename I = int64_t>
struct ClampedAxis {
  I low, high;
  T fraction;
  bool moves;
};

// `position` must not be NaN; on a pixel the derivative is the one from the right.
template <typename T, typename I>
DK_HOST_DEVICE ClampedAxis<T, I> clamp_to_map(T position, I length) {
  if (position < T(0)) {
    return {0, 0, T(0), false};
  }
  if (position >= T(length - 1)) {
    return {length - 1, length - 1, T(0), false};
  }
  const T low = std::floor(position);
  const I index = static_cast<I>(low);
  return {index, index + 1, position - low, true};
}

// The corners of a clamped position: all of them on the map, some of them possibly the same.
template <typename T, typename I>
DK_HOST_DEVICE Corners<T, I> clamped_corners(const ClampedAxis<T, I>& y, const ClampedAxis<T, I>& x, I width) {
  Corners<T, I> c;
  c.index[0] = y.low * width + x.low;
  c.index[1] = y.low * width + x.high;
  c.index[2] = y.high * width + x.low;
  c.index[3] = y.high * width + x.high;
  c.fy = y.fraction;
  c.fx = x.fraction;
  c.weight[0] = (1 - c.fy) * (1 - c.fx);
  c.weight[1] = (1 - c.fy) * c.fx;
  c.weight[2] = c.fy * (1 - c.fx);
  c.weight[3] = c.fy * c.fx;
  return c;
}

// The four pixels around a sampling position that is moved to the nearest one within [0, height - 1] x [0, width - 1].
// `free_y` and `free_x` tell whether the sampled value follows y and x at all: not beyond the bounds, where the clip
// holds it, and not along an axis of one pixel. On a bound itself the derivative is the one from inside: taps may rest
// there. NaN reads nothing.
template <typename T, typename I = int64_t>
struct ClippedCorners : Corners<T, I> {
  bool free_y, free_x;
};

template <typename T, typename I>
DK_HOST_DEVICE ClippedCorners<T, I> clipped_corners(T y, T x, I height, I width) {
  ClippedCorners<T, I> c;
  const T last_y = static_cast<T>(height - 1), last_x = static_cast<T>(width - 1);
  c.free_y = y >= 0 && y <= last_y && height > 1;
  c.free_x = x >= 0 && x <= last_x && width > 1;
  y = y < 0 ? T(0) : y > last_y ? last_y : y;
  x = x < 0 ? T(0) : x > last_x ? last_x : x;
  if (!(y >= 0 && x >= 0)) {
    for (int k = 0; k < 4; ++k) {
      c.index[k] = -1;
      c.weight[k] = T(0);
    }
    c.fy = c.fx = T(0);
    return c;
  }
  // The last pixel is the far end of the last cell, not the beginning of one that would reach outside.
  const I below = height > 1 ? height - 2 : 0, right = width > 1 ? width - 2 : 0;
  const I row = static_cast<I>(y), column = static_cast<I>(x);
  const I y0 = row < below ? row : below, x0 = column < right ? column : right;
  c.fy = y - static_cast<T>(y0);
  c.fx = x - static_cast<T>(x0);
  const I first = y0 * width + x0;
  c.index[0] = first;
  c.index[1] = width > 1 ? first + 1 : -1;
  c.index[2] = height > 1 ? first + width : -1;
  c.index[3] = height > 1 && width > 1 ? first + width + 1 : -1;
  c.weight[0] = (1 - c.fy) * (1 - c.fx);
  c.weight[1] = (1 - c.fy) * c.fx;
  c.weight[2] = c.fy * (1 - c.fx);
  c.weight[3] = c.fy * c.fx;
  return c;
}

// Derivatives of the sampled value by y and x, given the four corner values (zero outside). Linear in the values, so
// sums over channels may be put in their place. `c` is anything that has fy and fx.
template <typename C, typename T>
DK_HOST_DEVICE T bilinear_grad_y(const C& c, const T value[4]) {
  return (1 - c.fx) * (value[2] - value[0]) + c.fx * (value[3] - value[1]);
}

template <typename C, typename T>
DK_HOST_DEVICE T bilinear_grad_x(const C& c, const T value[4]) {
  return (1 - c.fy) * (value[1] - value[0]) + c.fy * (value[3] - value[2]);
}

}  // namespace dk
