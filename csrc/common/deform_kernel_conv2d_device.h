// deform_kernel_conv2d for devices: bodies of the kernels, and the order they run in, written over a launcher
// (launch.h).
//
// A warp takes an output position, in one segment of the channels: its lanes first prepare a tap each (where it looks,
// and which cells of the scope it takes its value from), then read neighbouring channels of all taps. A depthwise
// filter is applied as it is resampled, without columns. Any other is turned around (see
// cpu/deform_kernel_conv2d_kernel.cpp): the taps are scattered into one column per cell of the scope, for a chunk of
// output positions at a time, and the filter follows as a matrix product. From the gradient of these columns on, the
// backward is the same for both; a depthwise filter makes that gradient on the spot.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <numeric>

#include "common/contributions.h"
#include "common/launch.h"
#include "common/samples.h"
#include "ops/deform_kernel_conv2d.h"

namespace dk {

// Cells a lane sums up at a time, in memory of its own among that of the warp; more of them are more work items.
constexpr int kCellTile = 16;

// Where a tap takes its value from.
template <typename A, typename I>
struct alignas(16) Resampling {
  I cell[4];  // -1 where there is none
  A weight[4];
  A fy, fx;
  bool free_y, free_x;

  Resampling() = default;

  DK_HOST_DEVICE explicit Resampling(const ClippedCorners<A, I>& corners)
      : fy(corners.fy), fx(corners.fx), free_y(corners.free_y), free_x(corners.free_x) {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      cell[k] = corners.index[k];
      weight[k] = corners.weight[k];
    }
  }
};

// What all bodies know. T is the data type, A the wider type of positions and sums, I the type of indices.
template <typename T, typename A, typename I>
struct DeformKernelConv2dDevice {
  DeformKernelConv2dSizesOf<I> s;
  I taps, positions, cells, group_in;
  I data_channels, scope_channels;  // of a data offset group, of a kernel offset group
  I segment;                        // channels of a segment: they share both of these groups
  const T* input;                   // [N, H, W, C]
  const A* kernel_offset;           // [N, G, K, 2, P]
  const A* offset;                  // [N, D, K, 2, P] or null
  const A* mask;                    // [N, D, K, P] or null
  I first;                          // the chunk: output positions [first, first + count) of the N * P
  I count;

  struct Place {
    I local, n, index, oh, ow;  // number in the chunk, image, position in its map, row and column
  };

  DK_HOST_DEVICE I segments() const { return s.in_channels / segment; }
  DK_HOST_DEVICE I cell_tiles() const { return (cells + kCellTile - 1) / kCellTile; }

  DK_HOST_DEVICE Place place(I local) const {
    const I n = (first + local) / positions, index = (first + local) - n * positions, oh = index / s.out_w;
    return {local, n, index, oh, index - oh * s.out_w};
  }

  // Number of the (tap, data offset group)'s plane in offset (two each) and mask.
  DK_HOST_DEVICE I data_plane(const Place& at, I tap, I d) const { return (at.n * s.offset_groups + d) * taps + tap; }

  // Number of the (tap, kernel offset group)'s pair of planes in kernel_offset.
  DK_HOST_DEVICE I scope_plane(const Place& at, I tap, I g) const {
    return (at.n * s.kernel_offset_groups + g) * taps + tap;
  }

  DK_HOST_DEVICE A mask_of(const Place& at, I tap, I d) const {
    return mask ? mask[data_plane(at, tap, d) * positions + at.index] : A(1);
  }

  DK_HOST_DEVICE Sample<A, I> look(const Place& at, I tap, I d) const {
    const A* shift = offset ? offset + data_plane(at, tap, d) * 2 * positions + at.index : nullptr;
    return {
        data_corners(s, at.oh, at.ow, tap, shift, shift ? shift + positions : nullptr), mask_of(at, tap, d),
        at.n * s.height * s.width, s.in_channels};
  }

  DK_HOST_DEVICE Resampling<A, I> scope(const Place& at, I tap, I g) const {
    const A* shift = kernel_offset + scope_plane(at, tap, g) * 2 * positions + at.index;
    return Resampling<A, I>(scope_corners(s, tap, shift[0], shift[positions]));
  }

  struct Tap {
    Sample<A, I> look;
    Resampling<A, I> scope;
  };

  // The tap of a position for the channels from `start` on.
  DK_HOST_DEVICE Tap tap(const Place& at, I number, I start) const {
    return {look(at, number, start / data_channels), scope(at, number, start / scope_channels)};
  }

  // Prepares taps [begin, end) of a position.
  template <typename Lanes>
  DK_HOST_DEVICE void prepare(
      const Place& at, I start, I begin, I end, Tap (&table)[kTable], const Lanes& lanes) const {
    lanes.sync();
    for (I number = begin + lanes.index(); number < end; number += lanes.count()) {
      table[number - begin] = tap(at, number, start);
    }
    lanes.sync();
  }

  DK_HOST_DEVICE I batch_end(I begin) const { return begin + kTable < taps ? begin + kTable : taps; }

  // The sampled, modulated input from channel c on. Without data offsets it is one pixel.
  template <int kWidth>
  DK_HOST_DEVICE void sample(const Sample<A, I>& look, I c, A (&sum)[kWidth]) const {
    if (offset) {
      Vector<T, kWidth> value[4];
      look.load(input + c, value);
      look.weigh(value, sum);
    } else {
      widen(Vector<T, kWidth>::load(input + c + look.pixel[0]), sum);
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        sum[i] *= look.weight[0];
      }
    }
  }

  // Columns are [groups, count, cells, C / groups]: one matrix per weight group. Channel c of the first cell:
  DK_HOST_DEVICE I column(I local, I c) const {
    const I group = s.groups == 1 ? 0 : c / group_in;
    return (group * count + local) * cells * group_in + c - group * group_in;
  }
};

// Depthwise forward. Work items are (position, segment), the segment fastest.
template <typename T, typename A, typename I, int kWidth>
struct DepthwiseForward {
  using Device = DeformKernelConv2dDevice<T, A, I>;

  Device p;
  const T* filter;  // [cells, C]
  T* output;        // [N, P, C]

  struct Shared {
    typename Device::Tap table[kTable];
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& table = lanes.template shared<Shared>().table;
    const I local = static_cast<I>(item) / p.segments();
    const I start = (static_cast<I>(item) - local * p.segments()) * p.segment, stop = start + p.segment;
    const auto at = p.place(local);
    for (I base = start; base < stop; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      A sum[kWidth] = {};
      for (I begin = 0; begin < p.taps; begin += kTable) {
        const I end = p.batch_end(begin);
        if (base == start || p.taps > kTable) {
          p.prepare(at, start, begin, end, table, lanes);
        }
        DK_NO_UNROLL
        for (I number = begin; c < stop && number < end; ++number) {
          const auto tap = table[number - begin];
          if (!tap.look.on_map()) {
            continue;
          }
          A value[kWidth], resampled[kWidth] = {};
          p.template sample<kWidth>(tap.look, c, value);
          DK_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (tap.scope.cell[k] >= 0) {
              const auto cell = Vector<T, kWidth>::load(filter + tap.scope.cell[k] * p.s.in_channels + c);
              DK_UNROLL
              for (int i = 0; i < kWidth; ++i) {
                resampled[i] += tap.scope.weight[k] * static_cast<A>(cell.value[i]);
              }
            }
          }
          DK_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            sum[i] += value[i] * resampled[i];
          }
        }
      }
      if (c < stop) {
        store_narrow<kWidth>(sum, output + (p.first + local) * p.s.in_channels + c);
      }
    }
  }
};

// Sums of a tile of cells, each lane's own channels.
template <typename A, int kWidth>
struct CellSums {
  static constexpr int kRow = 32 * kWidth;

  alignas(sizeof(A) * kWidth) A sum[kCellTile][kRow];

  DK_HOST_DEVICE void clear(int lane) {
    for (int cell = 0; cell < kCellTile; ++cell) {
      Vector<A, kWidth>{}.store(sum[cell] + lane * kWidth);
    }
  }

  // Adds a tap's values to the cells, of which the tile begins with number `low`.
  template <typename I>
  DK_HOST_DEVICE void add(const Resampling<A, I>& scope, I low, const A (&value)[kWidth], int lane) {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      const I cell = scope.cell[k] - low;
      if (scope.cell[k] >= 0 && cell >= 0 && cell < kCellTile) {
        A* place = sum[cell] + lane * kWidth;
        auto all = Vector<A, kWidth>::load(place);
        DK_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          all.value[i] += scope.weight[k] * value[i];
        }
        all.store(place);
      }
    }
  }

  DK_HOST_DEVICE void read(int cell, int lane, A (&value)[kWidth]) const {
    widen(Vector<A, kWidth>::load(sum[cell] + lane * kWidth), value);
  }
};

// columns = the taps' values, spread over the cells. Work items are (position, tile of cells, segment), the segment
// fastest.
template <typename T, typename A, typename I, int kWidth>
struct ScatterColumns {
  using Device = DeformKernelConv2dDevice<T, A, I>;

  Device p;
  T* columns;

  struct Shared {
    typename Device::Tap table[kTable];
    CellSums<A, kWidth> cells;
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& shared = lanes.template shared<Shared>();
    const I rest = static_cast<I>(item) / p.segments(), local = rest / p.cell_tiles();
    const I start = (static_cast<I>(item) - rest * p.segments()) * p.segment, stop = start + p.segment;
    const I low = (rest - local * p.cell_tiles()) * kCellTile;
    const I high = low + kCellTile < p.cells ? low + kCellTile : p.cells;
    const auto at = p.place(local);
    for (I base = start; base < stop; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      shared.cells.clear(lanes.index());
      for (I begin = 0; begin < p.taps; begin += kTable) {
        const I end = p.batch_end(begin);
        if (base == start || p.taps > kTable) {
          p.prepare(at, start, begin, end, shared.table, lanes);
        }
        DK_NO_UNROLL
        for (I number = begin; c < stop && number < end; ++number) {
          const auto& tap = shared.table[number - begin];
          if (tap.look.on_map()) {
            A value[kWidth];
            p.template sample<kWidth>(tap.look, c, value);
            shared.cells.add(tap.scope, low, value, lanes.index());
          }
        }
      }
      if (c < stop) {
        T* column = columns + p.column(local, c);
        DK_NO_UNROLL
        for (I cell = low; cell < high; ++cell) {
          A value[kWidth];
          shared.cells.read(cell - low, lanes.index(), value);
          store_narrow<kWidth>(value, column + cell * p.group_in);
        }
      }
    }
  }
};

// The gradient of the columns, from a matrix product ...
template <typename T, typename I>
struct KernelColumnGradient {
  static constexpr bool kScaled = false;

  const T* grad_columns;

  // Where the cells' values for channel c lie, and how far apart.
  template <typename Device>
  DK_HOST_DEVICE const T* cells(const Device& p, I local, I c) const {
    return grad_columns + p.column(local, c);
  }
  template <typename Device>
  DK_HOST_DEVICE I stride(const Device& p) const {
    return p.group_in;
  }
};

// ... or, depthwise, the filter times the gradient of the output.
template <typename T, typename I>
struct KernelDepthwiseGradient {
  static constexpr bool kScaled = true;

  const T* filter;       // [cells, C]
  const T* grad_output;  // [N, P, C]

  template <typename Device>
  DK_HOST_DEVICE const T* cells(const Device&, I, I c) const {
    return filter + c;
  }
  template <typename Device>
  DK_HOST_DEVICE I stride(const Device& p) const {
    return p.s.in_channels;
  }
  template <typename Device>
  DK_HOST_DEVICE const T* factor(const Device& p, I local, I c) const {
    return grad_output + (p.first + local) * p.s.in_channels + c;
  }
};

// grad = the gradient of a tap's value. Where that `value` is given, dot[k] += the products with the gradient of cell
// k.
template <int kWidth, typename T, typename A, typename I, typename Columns>
DK_HOST_DEVICE void value_gradient(
    const DeformKernelConv2dDevice<T, A, I>& p,
    const Columns& columns,
    I local,
    const Resampling<A, I>& scope,
    I c,
    A (&grad)[kWidth],
    const A* value = nullptr,
    A* dot = nullptr) {
  const T* cells = columns.cells(p, local, c);
  const I stride = columns.stride(p);
  A factor[kWidth];
  if constexpr (Columns::kScaled) {
    widen(Vector<T, kWidth>::load(columns.factor(p, local, c)), factor);
  }
  DK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    grad[i] = 0;
  }
  DK_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (scope.cell[k] >= 0) {
      const auto row = Vector<T, kWidth>::load(cells + scope.cell[k] * stride);
      DK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        A cell = static_cast<A>(row.value[i]);
        if constexpr (Columns::kScaled) {
          cell *= factor[i];
        }
        grad[i] += scope.weight[k] * cell;
        if (value) {
          dot[k] += cell * value[i];
        }
      }
    }
  }
}

// All gradients that follow from that of the columns, but for the input's where nothing moves the taps; see
// PullInputGradient. The input's is scattered with atomics: fast, the order of the sums is left to chance. Work items
// are positions: the sums of a group of offsets go over several segments.
template <typename T, typename A, typename I, int kWidth, typename Columns>
struct TapGradients {
  using Device = DeformKernelConv2dDevice<T, A, I>;

  Device p;
  Columns columns;
  Rows rows;
  A* grad_input;          // [N, H, W, C] or null
  A* grad_kernel_offset;  // [N, G, K, 2, P] or null
  A* grad_offset;         // [N, D, K, 2, P] or null
  A* grad_mask;           // [N, D, K, P] or null

  struct Shared {
    typename Device::Tap table[kTable];
    A scope_dots[kTable][4], data_dots[kTable][4];      // of a segment
    A scope_totals[kTable][4], data_totals[kTable][4];  // of a group
    Scatter<A, kWidth> scatter;
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& shared = lanes.template shared<Shared>();
    const I local = static_cast<I>(item);
    const auto at = p.place(local);
    for (I begin = 0; begin < p.taps; begin += kTable) {
      const I end = p.batch_end(begin);
      for (I start = 0; start < p.s.in_channels; start += p.segment) {
        p.prepare(at, start, begin, end, shared.table, lanes);
        add_segment(shared, local, start, begin, end, lanes);
        lanes.sync();
        finish(shared, at, start, begin, end, lanes);
      }
    }
  }

  template <typename Lanes>
  DK_HOST_DEVICE void add_segment(Shared& shared, I local, I start, I begin, I end, const Lanes& lanes) const {
    const int row = rows.number(lanes), at_once = rows.at_once(lanes), run = rows.lanes_of_a_row();
    const I stop = start + p.segment;
    const bool moves = grad_offset || grad_mask;
    DK_NO_UNROLL
    for (I some = begin; some < end; some += at_once) {
      const I number = some + row;
      const bool active = number < end;
      const auto& tap = shared.table[active ? number - begin : 0];
      const Sample<A, I> look = tap.look;
      const Resampling<A, I> scope = tap.scope;
      const bool on_map = active && look.on_map();
      A scope_dot[4] = {}, data_dot[4] = {};
      DK_NO_UNROLL
      for (I base = start; base < stop; base += run * kWidth) {
        const I c = base + rows.lane(lanes) * kWidth;
        A grad[kWidth] = {};
        if (on_map && c < stop) {
          if (grad_kernel_offset || moves) {
            Vector<T, kWidth> corner[4] = {};
            A value[kWidth];
            if (p.offset) {
              look.load(p.input + c, corner);
              look.weigh(corner, value);
            } else {
              corner[0] = Vector<T, kWidth>::load(p.input + c + look.pixel[0]);
              widen(corner[0], value);
              DK_UNROLL
              for (int i = 0; i < kWidth; ++i) {
                value[i] *= look.weight[0];
              }
            }
            value_gradient<kWidth>(p, columns, local, scope, c, grad, value, scope_dot);
            if (moves) {
              look.add_dots(grad, corner, data_dot);
            }
          } else {
            value_gradient<kWidth>(p, columns, local, scope, c, grad);
          }
        }
        if (grad_input) {
          shared.scatter(grad, look, on_map, base, stop, rows, grad_input, lanes);
        }
      }
      if (grad_kernel_offset) {
        lanes.sums(scope_dot, run, active ? shared.scope_dots[number - begin] : nullptr);
      }
      if (moves) {
        lanes.sums(data_dot, run, active ? shared.data_dots[number - begin] : nullptr);
      }
    }
  }

  // Adds a segment's sums to those of its groups, and writes these at their last segment. A lane has taps of its own.
  template <typename Lanes>
  DK_HOST_DEVICE void finish(
      Shared& shared, const typename Device::Place& at, I start, I begin, I end, const Lanes& lanes) const {
    const I stop = start + p.segment;
    for (I number = begin + lanes.index(); number < end; number += lanes.count()) {
      const auto& tap = shared.table[number - begin];
      if (grad_kernel_offset) {
        const I group = start / p.scope_channels;
        A* dot = total(
            shared.scope_totals[number - begin], shared.scope_dots[number - begin], start == group * p.scope_channels);
        if (stop == (group + 1) * p.scope_channels) {
          A* shift = grad_kernel_offset + p.scope_plane(at, number, group) * 2 * p.positions + at.index;
          shift[0] = tap.scope.free_y ? bilinear_grad_y(tap.scope, dot) : A(0);
          shift[p.positions] = tap.scope.free_x ? bilinear_grad_x(tap.scope, dot) : A(0);
        }
      }
      if (grad_offset || grad_mask) {
        const I group = start / p.data_channels, plane = p.data_plane(at, number, group);
        A* dot = total(
            shared.data_totals[number - begin], shared.data_dots[number - begin], start == group * p.data_channels);
        if (stop == (group + 1) * p.data_channels && grad_offset) {
          A* shift = grad_offset + plane * 2 * p.positions + at.index;
          shift[0] = tap.look.mask * bilinear_grad_y(tap.look, dot);
          shift[p.positions] = tap.look.mask * bilinear_grad_x(tap.look, dot);
        }
        if (stop == (group + 1) * p.data_channels && grad_mask) {
          grad_mask[plane * p.positions + at.index] = tap.look.by_mask(dot);
        }
      }
    }
  }

  DK_HOST_DEVICE static A* total(A (&total)[4], const A (&dot)[4], bool begins) {
    DK_UNROLL
    for (int k = 0; k < 4; ++k) {
      total[k] = begins ? dot[k] : total[k] + dot[k];
    }
    return total;
  }
};

// Gradient of the input where no data offset moves the taps: each pixel knows the output positions that look at it.
// Work items are (pixel, segment) of the images from `first_image` on, the segment fastest.
template <typename T, typename A, typename I, int kWidth, typename Columns>
struct PullInputGradient {
  using Device = DeformKernelConv2dDevice<T, A, I>;

  Device p;
  Columns columns;
  I first_image;
  A* grad_input;  // [N, H, W, C], added to

  struct Look {
    I local;  // the output position that looks here by this tap, -1 if there is none
    A mask;
    Resampling<A, I> scope;
  };

  struct Shared {
    Look table[kTable];
  };

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& table = lanes.template shared<Shared>().table;
    const I number = static_cast<I>(item) / p.segments();
    const I start = (static_cast<I>(item) - number * p.segments()) * p.segment, stop = start + p.segment;
    const I plane = p.s.height * p.s.width, image = number / plane, pixel = number - image * plane;
    A* row = grad_input + ((first_image + image) * plane + pixel) * p.s.in_channels;
    for (I begin = 0; begin < p.taps; begin += kTable) {
      const I end = p.batch_end(begin);
      lanes.sync();
      for (I tap = begin + lanes.index(); tap < end; tap += lanes.count()) {
        table[tap - begin] = look(first_image + image, pixel, tap, start);
      }
      lanes.sync();
      for (I c = start + lanes.index() * kWidth; c < stop; c += lanes.count() * kWidth) {
        A sum[kWidth];
        widen(Vector<A, kWidth>::load(row + c), sum);
        DK_NO_UNROLL
        for (I tap = begin; tap < end; ++tap) {
          const Look at = table[tap - begin];
          if (at.local >= 0) {
            A grad[kWidth];
            value_gradient<kWidth>(p, columns, at.local, at.scope, c, grad);
            DK_UNROLL
            for (int i = 0; i < kWidth; ++i) {
              sum[i] += at.mask * grad[i];
            }
          }
        }
        store_narrow<kWidth>(sum, row + c);
      }
    }
  }

  DK_HOST_DEVICE Look look(I n, I pixel, I tap, I start) const {
    const auto& s = p.s;
    const I y = pixel / s.width, x = pixel - y * s.width, i = tap / s.kernel_w;
    const I down = y + s.padding_h - i * s.dilation_h, across = x + s.padding_w - (tap - i * s.kernel_w) * s.dilation_w;
    Look found;
    found.local = -1;
    const I oh = down / s.stride_h, ow = across / s.stride_w;
    if (down >= 0 && across >= 0 && oh * s.stride_h == down && ow * s.stride_w == across && oh < s.out_h &&
        ow < s.out_w) {
      const I local = n * p.positions + oh * s.out_w + ow - p.first;
      if (local >= 0 && local < p.count) {
        const auto at = p.place(local);
        found.local = local;
        found.mask = p.mask_of(at, tap, start / p.data_channels);
        found.scope = p.scope(at, tap, start / p.scope_channels);
      }
    }
    return found;
  }
};

// The deterministic way to the input's gradient under data offsets. First, for every (position, data offset group, tap,
// corner) the pixel it touches, numbered within (image, group) planes. Work items are (position, group).
template <typename T, typename A, typename I>
struct ListTouched {
  DeformKernelConv2dDevice<T, A, I> p;
  int64_t* pixels;  // [items, taps, 4]
  A* weights;       // [items, taps, 4]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const I local = static_cast<I>(item) / p.s.offset_groups, d = static_cast<I>(item) - local * p.s.offset_groups;
    const auto at = p.place(local);
    list_corners(
        item * p.taps * 4, p.taps, at.n, at.n * p.s.offset_groups + d, p.s.height * p.s.width, p.s.in_channels, pixels,
        weights, lanes, [&](I tap) { return p.look(at, tap, d); });
  }
};

// Then each pixel gathers its contributions.
template <typename T, typename A, typename I, typename Columns>
struct TouchedContributions {
  DeformKernelConv2dDevice<T, A, I> p;
  Columns columns;
  A* grad_input;  // [N, H, W, C]

  struct Row {
    I tap, start;
    typename DeformKernelConv2dDevice<T, A, I>::Place at;
  };

  DK_HOST_DEVICE Target<A> target(int64_t pixel) const {
    const I plane = p.s.height * p.s.width, map = static_cast<I>(pixel) / plane, n = map / p.s.offset_groups;
    const I start = (map - n * p.s.offset_groups) * p.data_channels;
    return {grad_input + (n * plane + static_cast<I>(pixel) - map * plane) * p.s.in_channels + start, p.data_channels};
  }

  DK_HOST_DEVICE Row row(int64_t number) const {
    const I all = static_cast<I>(number) / 4, item = all / p.taps, local = item / p.s.offset_groups;
    return {all - item * p.taps, (item - local * p.s.offset_groups) * p.data_channels, p.place(local)};
  }

  template <int kWidth>
  DK_HOST_DEVICE void load(const Row& row, int64_t c, A (&value)[kWidth]) const {
    const I channel = row.start + static_cast<I>(c);
    const auto scope = p.scope(row.at, row.tap, channel / p.scope_channels);
    value_gradient<kWidth>(p, columns, row.at.local, scope, channel, value);
  }
};

// Gradient of a depthwise filter: a warp sums up a block of output positions for a tile of the cells and as many
// channels as its lanes take at once; the blocks are added afterwards. Work items are (block, tile, slice of channels),
// the slice fastest.
template <typename T, typename A, typename I, int kWidth>
struct KernelFilterGradient {
  using Device = DeformKernelConv2dDevice<T, A, I>;

  Device p;
  const T* grad_output;  // [N, P, C]
  I block;               // positions of a block
  A* partial;            // [blocks, cells, C]

  static constexpr int kSlice = 32 * kWidth;

  struct Shared {
    typename Device::Tap table[kTable];
    CellSums<A, kWidth> cells;
  };

  DK_HOST_DEVICE I slices_of_a_segment() const { return (p.segment + kSlice - 1) / kSlice; }
  DK_HOST_DEVICE I slices() const { return p.segments() * slices_of_a_segment(); }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    auto& shared = lanes.template shared<Shared>();
    const I rest = static_cast<I>(item) / slices(), slice = static_cast<I>(item) - rest * slices();
    const I number = rest / p.cell_tiles(), low = (rest - number * p.cell_tiles()) * kCellTile;
    const I high = low + kCellTile < p.cells ? low + kCellTile : p.cells;
    const I segment = slice / slices_of_a_segment(), segment_end = (segment + 1) * p.segment;
    const I start = segment * p.segment + (slice - segment * slices_of_a_segment()) * kSlice;
    const I stop = start + kSlice < segment_end ? start + kSlice : segment_end;
    const I last = ((number + 1) * block < p.count ? (number + 1) * block : p.count) * p.taps;
    for (I base = start; base < stop; base += lanes.count() * kWidth) {
      const I c = base + lanes.index() * kWidth;
      shared.cells.clear(lanes.index());
      for (I begin = number * block * p.taps; begin < last; begin += kTable) {
        const I end = begin + kTable < last ? begin + kTable : last;
        lanes.sync();
        for (I one = begin + lanes.index(); one < end; one += lanes.count()) {
          const I local = one / p.taps;
          shared.table[one - begin] = p.tap(p.place(local), one - local * p.taps, start);
        }
        lanes.sync();
        I local = begin / p.taps, tap = begin - local * p.taps;
        DK_NO_UNROLL
        for (I one = begin; one < end; ++one) {
          const auto& prepared = shared.table[one - begin];
          if (c < stop && prepared.look.on_map()) {
            A value[kWidth], grad[kWidth];
            p.template sample<kWidth>(prepared.look, c, value);
            widen(Vector<T, kWidth>::load(grad_output + (p.first + local) * p.s.in_channels + c), grad);
            DK_UNROLL
            for (int i = 0; i < kWidth; ++i) {
              value[i] *= grad[i];
            }
            shared.cells.add(prepared.scope, low, value, lanes.index());
          }
          if (++tap == p.taps) {
            tap = 0;
            ++local;
          }
        }
      }
      if (c < stop) {
        DK_NO_UNROLL
        for (I cell = low; cell < high; ++cell) {
          A value[kWidth];
          shared.cells.read(cell - low, lanes.index(), value);
          store_narrow<kWidth>(value, partial + (number * p.cells + cell) * p.s.in_channels + c);
        }
      }
    }
  }
};

// The operator for data type T on whatever Launcher runs on.
template <typename Launcher, typename T>
class DeformKernelConv2dPipeline {
 public:
  using A = at::opmath_type<T>;

  DeformKernelConv2dPipeline(
      const DeformKernelConv2dSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& kernel_offset,
      const std::optional<at::Tensor>& offset,
      const std::optional<at::Tensor>& mask,
      const at::Tensor& weight)
      : s(sizes),
        wide(input.options().dtype(c10::CppTypeToScalarType<A>::value)),
        x(input.contiguous(at::MemoryFormat::ChannelsLast)),
        koff(kernel_offset.to(wide.dtype()).contiguous()),
        off(offset ? offset->to(wide.dtype()).contiguous() : at::Tensor()),
        msk(mask ? mask->to(wide.dtype()).contiguous() : at::Tensor()),
        // [cells, C] if depthwise, else [groups, O / groups, cells * C / groups], channels fastest
        filter(
            s.depthwise() ? weight.reshape({s.in_channels, s.cells()}).t().contiguous()
                          : weight.permute({0, 2, 3, 1}).reshape({s.groups, s.group_out(), s.cells() * s.group_in()})) {
  }

  at::Tensor forward(const std::optional<at::Tensor>& bias) const {
    at::Tensor out;
    if (s.depthwise()) {
      out = at::empty({s.batch, s.out_h, s.out_w, s.out_channels}, x.options());
      dispatch<kWide>(out, [&](auto index, auto width) {
        using I = decltype(index);
        const auto p = device<I>(0, total());
        Launcher::run(
            total() * segments(), DepthwiseForward<T, A, I, decltype(width)::value>{
                                      p, filter.template const_data_ptr<T>(), out.template mutable_data_ptr<T>()});
      });
    } else {
      out = at::empty({s.groups, total(), s.group_out()}, x.options());
      const int64_t step = chunk(/*buffers=*/1, /*sorts=*/false);
      for (int64_t first = 0; first < total(); first += step) {
        at::Tensor part = out.narrow(1, first, std::min(step, total() - first));
        at::bmm_out(part, scatter(first, part.size(1)), filter.transpose(1, 2));
      }
      out = out.permute({1, 0, 2}).reshape({s.batch, s.out_h, s.out_w, s.out_channels});
    }
    return bias ? out.add_(*bias) : out;  // [N, outH, outW, O]
  }

  DeformKernelConv2dGradients backward(
      const at::Tensor& grad_output, const at::Tensor& weight, std::array<bool, 6> wanted) const {
    const at::Tensor rows = grad_output.permute({0, 2, 3, 1}).contiguous();  // [N, outH, outW, O]
    const bool sorts = wanted[0] && off.defined() && at::globalContext().deterministicAlgorithms();
    const bool follows = wanted[0] || wanted[1] || wanted[2] || wanted[3];
    Gradients sums;
    if (wanted[0]) {
      sums.input = at::zeros({s.batch, s.height, s.width, s.in_channels}, wide);
    }
    if (wanted[1]) {
      sums.kernel_offset = at::empty(koff.sizes(), wide);
    }
    if (wanted[2]) {
      sums.offset = at::empty(off.sizes(), wide);
    }
    if (wanted[3]) {
      sums.mask = at::empty(msk.sizes(), wide);
    }
    at::Tensor grad_filter;
    const int64_t step = chunk(/*buffers=*/follows && wanted[4] ? 2 : 1, sorts);
    if (s.depthwise()) {
      for (int64_t first = 0; follows && first < total(); first += step) {
        dispatch<kWide>(rows, [&](auto index, auto width) {
          using I = decltype(index);
          const KernelDepthwiseGradient<T, I> grad{
              filter.template const_data_ptr<T>(), rows.template const_data_ptr<T>()};
          gradients<decltype(width)::value>(device<I>(first, std::min(step, total() - first)), grad, sums);
        });
      }
      if (wanted[4]) {
        grad_filter = depthwise_filter_gradient(rows);
      }
    } else {
      const at::Tensor grad = rows.view({total(), s.groups, s.group_out()}).transpose(0, 1).contiguous();
      if (wanted[4]) {
        grad_filter = at::zeros(filter.sizes(), wide);
      }
      for (int64_t first = 0; (follows || wanted[4]) && first < total(); first += step) {
        const int64_t count = std::min(step, total() - first);
        const at::Tensor part = grad.narrow(1, first, count);  // [groups, count, O / groups]
        if (follows) {
          const at::Tensor columns = at::bmm(part, filter);
          dispatch<kWide>(columns, [&](auto index, auto width) {
            using I = decltype(index);
            const KernelColumnGradient<T, I> grad_columns{columns.template const_data_ptr<T>()};
            gradients<decltype(width)::value>(device<I>(first, count), grad_columns, sums);
          });
        }
        if (wanted[4]) {
          grad_filter += at::bmm(part.transpose(1, 2), scatter(first, count)).to(wide.dtype());
        }
      }
    }

    DeformKernelConv2dGradients result = no_kernel_gradients(x);
    if (wanted[0]) {
      std::get<0>(result) = sums.input.permute({0, 3, 1, 2}).to(x.scalar_type());
    }
    if (wanted[1]) {
      std::get<1>(result) = sums.kernel_offset;
    }
    if (wanted[2]) {
      std::get<2>(result) = sums.offset;
    }
    if (wanted[3]) {
      std::get<3>(result) = sums.mask;
    }
    if (wanted[4]) {
      std::get<4>(result) = at::empty(weight.sizes(), weight.options());
      if (s.depthwise()) {
        std::get<4>(result).view({s.in_channels, s.cells()}).copy_(grad_filter.t());
      } else {
        std::get<4>(result).copy_(
            grad_filter.view({s.out_channels, s.scope_h, s.scope_w, s.group_in()}).permute({0, 3, 1, 2}));
      }
    }
    if (wanted[5]) {
      std::get<5>(result) = rows.view({total(), s.out_channels}).to(wide.dtype()).sum(0).to(weight.scalar_type());
    }
    return result;
  }

 private:
  struct Gradients {
    at::Tensor input, kernel_offset, offset, mask;
  };

  static constexpr int kWide = 16 / sizeof(T);
  static constexpr int kTileWide = kWide < 4 ? kWide : 4;  // where a warp keeps a whole tile of cells

  int64_t total() const { return s.batch * s.positions(); }
  int64_t segment() const { return std::gcd(s.kernel_offset_group_channels(), s.offset_group_channels()); }
  int64_t segments() const { return s.in_channels / segment(); }
  int64_t cell_tiles() const { return (s.cells() + kCellTile - 1) / kCellTile; }

  static A* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.template mutable_data_ptr<A>() : nullptr;
  }

  template <typename I>
  DeformKernelConv2dDevice<T, A, I> device(int64_t first, int64_t count) const {
    const auto i = [](int64_t value) { return static_cast<I>(value); };
    return {
        s.as<I>(),
        i(s.taps()),
        i(s.positions()),
        i(s.cells()),
        i(s.group_in()),
        i(s.offset_group_channels()),
        i(s.kernel_offset_group_channels()),
        i(segment()),
        x.template const_data_ptr<T>(),
        koff.template const_data_ptr<A>(),
        off.defined() ? off.template const_data_ptr<A>() : nullptr,
        msk.defined() ? msk.template const_data_ptr<A>() : nullptr,
        i(first),
        i(count)};
  }

  // Output positions at a time: as many as have room in the columns, of which there may be several buffers, but none
  // for a depthwise convolution, and, where they are sorted, among the contributions.
  int64_t chunk(int64_t buffers, bool sorts) const {
    const int64_t columns = s.depthwise() ? 0 : buffers * s.cells() * s.in_channels * static_cast<int64_t>(sizeof(T));
    return chunk_of<Launcher>(total(), columns, buffers, sorts ? s.taps() * s.offset_groups * 4 : 0);
  }

  // Calls body(I{}, width) with the types that fit the sizes, and `other`, which the body reads or writes.
  template <int kWidth, typename Body>
  void dispatch(const at::Tensor& other, const Body& body) const {
    const int64_t items = total() * std::max(s.taps(), cell_tiles() * segments());
    with_index<Launcher>(
        {x, koff, off, msk, filter, other}, {s.reach(), items, s.batch * s.height * s.width * segments()},
        [&](auto index) {
          const int64_t group = s.depthwise() ? s.in_channels : s.group_in();
          with_width<T, kWidth>({segment(), group}, {x, other, filter}, [&](auto width) { body(index, width); });
        });
  }

  // [groups, count, cells * C / groups]
  at::Tensor scatter(int64_t first, int64_t count) const {
    at::Tensor columns = at::empty({s.groups, count, s.cells() * s.group_in()}, x.options());
    dispatch<kTileWide>(columns, [&](auto index, auto width) {
      using I = decltype(index);
      Launcher::run(
          count * cell_tiles() * segments(), ScatterColumns<T, A, I, decltype(width)::value>{
                                                 device<I>(first, count), columns.template mutable_data_ptr<T>()});
    });
    return columns;
  }

  template <int kWidth, typename I, typename Columns>
  void gradients(const DeformKernelConv2dDevice<T, A, I>& p, const Columns& columns, const Gradients& sums) const {
    const bool pulls = !off.defined(), sorts = at::globalContext().deterministicAlgorithms();
    A* grad_input = data(sums.input);
    if (grad_input && pulls) {
      const int64_t first_image = p.first / s.positions(), last_image = (p.first + p.count - 1) / s.positions();
      Launcher::run(
          (last_image - first_image + 1) * s.height * s.width * segments(),
          PullInputGradient<T, A, I, kWidth, Columns>{p, columns, static_cast<I>(first_image), grad_input});
    } else if (grad_input && sorts) {
      const int64_t items = p.count * s.offset_groups;
      const ContributionList list(items * s.taps() * 4, s.batch * s.offset_groups * s.height * s.width, wide);
      Launcher::run(
          items, ListTouched<T, A, I>{
                     p, list.pixels.template mutable_data_ptr<int64_t>(), list.weights.template mutable_data_ptr<A>()});
      gather<Launcher, A, kWidth>(list, TouchedContributions<T, A, I, Columns>{p, columns, grad_input});
    }
    const bool pushes = grad_input && !pulls && !sorts;
    if (pushes || sums.kernel_offset.defined() || sums.offset.defined() || sums.mask.defined()) {
      Launcher::run(
          p.count, TapGradients<T, A, I, kWidth, Columns>{
                       p, columns, rows_of<Launcher>(segment() / kWidth), pushes ? grad_input : nullptr,
                       data(sums.kernel_offset), data(sums.offset), data(sums.mask)});
    }
  }

  // [cells, C]
  at::Tensor depthwise_filter_gradient(const at::Tensor& grad_rows) const {
    at::Tensor partial;
    dispatch<kTileWide>(grad_rows, [&](auto index, auto width) {
      using I = decltype(index);
      KernelFilterGradient<T, A, I, decltype(width)::value> body{
          device<I>(0, total()), grad_rows.template const_data_ptr<T>(), 0, nullptr};
      const int64_t warps = cell_tiles() * body.slices();
      const auto blocks = blocks_of<Launcher>(total(), warps, s.cells() * s.in_channels * sizeof(A));
      body.block = static_cast<I>(blocks.size);
      partial = at::empty({blocks.count, s.cells(), s.in_channels}, wide);
      body.partial = partial.template mutable_data_ptr<A>();
      Launcher::run(blocks.count * warps, body);
    });
    return partial.sum(0);
  }

  DeformKernelConv2dSizes s;
  at::TensorOptions wide;
  at::Tensor x, koff, off, msk, filter;
};

// Entry points for every backend: checks, dispatch on the data type, the caller's memory format and dtypes.
template <typename Launcher>
at::Tensor deform_kernel_conv2d_device(
    const at::Tensor& input,
    const at::Tensor& kernel_offset,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool clip) {
  const auto s =
      check_deform_kernel_conv2d(input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip);
  const DeviceScope<Launcher> scope(input.device());
  at::Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_kernel_conv2d", [&] {
    output =
        DeformKernelConv2dPipeline<Launcher, scalar_t>(s, input, kernel_offset, offset, mask, weight).forward(bias);
  });
  return output.permute({0, 3, 1, 2}).contiguous(input.suggest_memory_format());
}

template <typename Launcher>
DeformKernelConv2dGradients deform_kernel_conv2d_backward_device(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& kernel_offset,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool clip,
    std::array<bool, 6> output_mask) {
  const auto s = check_deform_kernel_conv2d(
      input, kernel_offset, offset, mask, weight, std::nullopt, stride, padding, dilation, clip);
  check_deform_kernel_conv2d_grad(grad_output, input, offset, mask, s, output_mask);
  const DeviceScope<Launcher> scope(input.device());
  DeformKernelConv2dGradients result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_kernel_conv2d_backward", [&] {
    result = DeformKernelConv2dPipeline<Launcher, scalar_t>(s, input, kernel_offset, offset, mask, weight)
                 .backward(grad_output, weight, output_mask);
  });
  if (output_mask[0]) {
    std::get<0>(result) = std::get<0>(result).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = std::get<1>(result).to(kernel_offset.scalar_type());
  }
  if (output_mask[2]) {
    std::get<2>(result) = std::get<2>(result).to(offset->scalar_type());
  }
  if (output_mask[3]) {
    std::get<3>(result) = std::get<3>(result).to(mask->scalar_type());
  }
  return result;
}

}  // namespace dk
