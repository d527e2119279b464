// Where the bins of RoI pooling look: the two geometries, and what they share.
//
// A bin is cut into grid_y x grid_x samples, and a sample lies on the map if both of its coordinates do: everything but
// the final product of weights is the business of one axis at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bilinear.h"
#include "common/host_device.h"
#include "ops/roi_pool.h"

namespace dk {

// A product that is rounded before anything is added to it. Where a GPU would contract `a * b - c` into one operation
// the number of samples of a bin could differ from the CPU's.
DK_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

DK_HOST_DEVICE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// One axis of one bin.
template <typename A>
struct BinAxis {
  A origin;             // where the bin begins, moved by its offset; pixel centres are integers
  A length;             // of the bin; negative where the RoI is inverted
  A grid;               // number of samples; not an integer type, as RoIs may be of any size
  int64_t first, last;  // samples [first, last) may lie on the map, the others do not
  A count;              // what the sum over samples is divided by
  A per_unit;           // pixels that an offset of 1 moves the bin by
};

// Geometry of deform_roi_pool (mmcv's): coordinates as they are, samples in the middle of their cells; a sample off the
// map is a zero that counts. Off the map is what lies more than one pixel beyond the outermost pixel centres.
struct AlignedBins {
  template <typename A>
  static DK_HOST_DEVICE A position(const BinAxis<A>& axis, int64_t sample) {
    return axis.origin + (static_cast<A>(sample) + A(0.5)) * axis.length / axis.grid;
  }

  template <typename A, typename I>
  static DK_HOST_DEVICE bool sees(A position, I length) {
    return position >= A(-1) && position <= static_cast<A>(length);
  }

  template <typename A, typename I>
  static DK_HOST_DEVICE BinAxis<A> axis(
      A low, A high, A offset, I bin, I bins, I map_length, const RoiPoolSizesOf<I>& s) {
    const A scale = static_cast<A>(s.spatial_scale);
    const A start = rounded_product(low, scale) - A(0.5), extent = rounded_product(high, scale) - A(0.5) - start;
    BinAxis<A> axis;
    axis.per_unit = static_cast<A>(s.gamma) * extent;
    axis.length = extent / static_cast<A>(bins);
    axis.origin = start + axis.per_unit * offset + static_cast<A>(bin) * axis.length;
    axis.grid = s.samples > 0 ? static_cast<A>(s.samples) : std::ceil(axis.length);
    axis.first = axis.last = 0;
    axis.count = A(1);
    if (!(axis.grid > 0)) {
      return axis;  // an adaptive grid has no samples where the RoI is empty or inverted
    }
    axis.count = axis.grid;
    // An adaptive grid of two samples or more has them more than half a pixel apart, so at most this many lie on the
    // map. The others are skipped, not visited: work and time are bounded by the map however large the RoI.
    const int64_t on_map = 2 * static_cast<int64_t>(map_length) + 8;
    if (s.samples > 0 || axis.grid <= static_cast<A>(on_map)) {
      axis.last = static_cast<int64_t>(axis.grid);
      return axis;
    }
    // The first sample on the map, less one for rounding. NaN gives 0; the cap keeps the conversion defined.
    const A begin = std::floor((A(-1) - axis.origin) / (axis.length / axis.grid) - A(1.5));
    axis.first = begin > 0 ? static_cast<int64_t>(begin < A(1e15) ? begin : A(1e15)) : 0;
    const A end = static_cast<A>(axis.first) + static_cast<A>(on_map);
    axis.last = end < axis.grid ? axis.first + on_map : axis.first + static_cast<int64_t>(axis.grid - axis.first);
    return axis;
  }
};

// Geometry of deform_psroi_pool (that of the original): whole coordinates, the end pixel belongs to the RoI, samples at
// the left edges of their cells; the mean is over the samples on the map, which ends half a pixel beyond the outermost
// pixel centres.
struct RoundedBins {
  template <typename A>
  static DK_HOST_DEVICE A position(const BinAxis<A>& axis, int64_t sample) {
    return axis.origin + static_cast<A>(sample) * (axis.length / axis.grid);
  }

  template <typename A, typename I>
  static DK_HOST_DEVICE bool sees(A position, I length) {
    return position >= A(-0.5) && position <= static_cast<A>(length) - A(0.5);
  }

  template <typename A, typename I>
  static DK_HOST_DEVICE BinAxis<A> axis(
      A low, A high, A offset, I bin, I bins, I map_length, const RoiPoolSizesOf<I>& s) {
    const A scale = static_cast<A>(s.spatial_scale);
    const A start = std::round(low) * scale - A(0.5), full = (std::round(high) + A(1)) * scale - A(0.5) - start;
    const A extent = full > A(0.1) ? full : A(0.1);
    BinAxis<A> axis;
    axis.per_unit = static_cast<A>(s.gamma) * extent;
    axis.length = extent / static_cast<A>(bins);
    axis.origin = static_cast<A>(bin) * axis.length + start + axis.per_unit * offset;
    axis.grid = static_cast<A>(s.samples);
    axis.first = 0;
    axis.last = s.samples;
    I seen = 0;
    for (I i = 0; i < s.samples; ++i) {
      seen += sees(position(axis, i), map_length);
    }
    axis.count = static_cast<A>(seen > 0 ? seen : 1);
    return axis;
  }
};

// Whether a RoI names an image that there is.
template <typename A, typename I>
DK_HOST_DEVICE bool names_image(const A* roi, const RoiPoolSizesOf<I>& s) {
  return roi[0] >= 0 && roi[0] < static_cast<A>(s.batch) && roi[0] == std::floor(roi[0]);
}

// Whether it does, and both of its sides can be told in numbers of type A.
template <typename A, typename I>
DK_HOST_DEVICE bool is_valid_roi(const A* roi, const RoiPoolSizesOf<I>& s) {
  const A scale = static_cast<A>(s.spatial_scale);
  const A w = (roi[3] + 1) * scale - roi[1] * scale, h = (roi[4] + 1) * scale - roi[2] * scale;
  return names_image(roi, s) && w - w == 0 && h - h == 0;  // neither infinite nor NaN
}

template <typename A, typename I = int64_t>
struct Bin {
  I image;
  I cell;  // of the map's channels
  I part;  // number of its value in mask; in offset there are two planes of parts
  BinAxis<A> y, x;
  A mask;
  bool valid;  // if not, the bin has no samples
};

// What all kernels know about the RoIs. A is the type of positions and sums.
template <typename Rule, typename A, typename I = int64_t>
struct RoiBins {
  RoiPoolSizesOf<I> s;
  const A* rois;    // [n, 5]
  const A* offset;  // [n, classes, 2, part_h, part_w] or null; x before y
  const A* mask;    // [n, classes, part_h, part_w] or null

  // Start of the two values of a part in offset: x, and y `s.parts()` later.
  DK_HOST_DEVICE I offset_index(I part) const { return part / s.parts() * 2 * s.parts() + part % s.parts(); }

  DK_HOST_DEVICE Bin<A, I> bin(I roi, I cls, I ph, I pw) const {
    const A* box = rois + roi * 5;
    Bin<A, I> b{};
    b.valid = is_valid_roi(box, s);
    if (!b.valid) {
      return b;
    }
    b.image = static_cast<I>(box[0]);
    b.cell = s.cell(ph, pw);
    b.part = (roi * s.classes + cls) * s.parts() + s.part(ph, pw);
    const A* shift = offset ? offset + offset_index(b.part) : nullptr;
    b.x = Rule::axis(box[1], box[3], shift ? shift[0] : A(0), pw, s.pooled_w, s.width, s);
    b.y = Rule::axis(box[2], box[4], shift ? shift[s.parts()] : A(0), ph, s.pooled_h, s.height, s);
    b.mask = mask ? mask[b.part] : A(1);
    return b;
  }
};

}  // namespace dk
