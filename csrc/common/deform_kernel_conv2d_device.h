// deform_kernel_conv2d for devices: bodies of the kernels, and the order they run in, written over a launcher
// (launch.h).
//
// The map is channels-last, so the lanes of a warp read neighbouring channels of one output position: where its taps
// look, and which cells of the scope they take their values from, is computed once per warp. A depthwise filter is
// applied as it is resampled, without columns. Any other is turned around (see cpu/deform_kernel_conv2d_kernel.cpp):
// the taps are scattered into one column per cell of the scope, for a chunk of output positions at a time, and the
// filter follows as a matrix product. From the gradient of these columns on, the backward is the same for both; a
// depthwise filter makes that gradient on the spot.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <numeric>

#include "common/bilinear.h"
#include "common/contributions.h"
#include "common/launch.h"
#include "ops/deform_kernel_conv2d.h"

namespace dk {

// Cells a lane sums up at a time; more of them are more work items.
constexpr int kCellTile = 16;

// What all bodies know. T is the data type, A the wider type of positions and sums.
template <typename T, typename A>
struct DeformKernelConv2dDevice {
  DeformKernelConv2dSizes s;
  int64_t segment;         // channels of a segment: they share kernel offset group and data offset group
  const T* input;          // [N, H, W, C]
  const A* kernel_offset;  // [N, G, K, 2, P]
  const A* offset;         // [N, D, K, 2, P] or null
  const A* mask;           // [N, D, K, P] or null
  int64_t first;           // the chunk: output positions [first, first + count) of the N * P
  int64_t count;

  struct Position {
    int64_t n, index;  // image, position in its map
  };

  // Where a tap looks. `plane` is the number of the (tap, data offset group)'s plane in offset (two each) and mask.
  struct Look {
    Corners<A> corners;
    A mask;
    int64_t plane;

    DK_HOST_DEVICE bool on_map() const {
      return corners.index[0] >= 0 || corners.index[1] >= 0 || corners.index[2] >= 0 || corners.index[3] >= 0;
    }
  };

  // Of the map, counted once for every data offset group.
  DK_HOST_DEVICE int64_t pixels() const { return s.batch * s.offset_groups * s.height * s.width; }

  DK_HOST_DEVICE int64_t segments() const { return s.in_channels / segment; }
  DK_HOST_DEVICE int64_t cell_tiles() const { return (s.cells() + kCellTile - 1) / kCellTile; }
  DK_HOST_DEVICE int64_t data_group(int64_t c) const { return c / s.offset_group_channels(); }
  DK_HOST_DEVICE int64_t scope_group(int64_t c) const { return c / s.kernel_offset_group_channels(); }

  DK_HOST_DEVICE Position position(int64_t local) const {
    return {(first + local) / s.positions(), (first + local) % s.positions()};
  }

  DK_HOST_DEVICE Look look(const Position& at, int64_t tap, int64_t d) const {
    Look look;
    look.plane = (at.n * s.offset_groups + d) * s.taps() + tap;
    const A* shift = offset ? offset + look.plane * 2 * s.positions() + at.index : nullptr;
    look.corners =
        data_corners(s, at.index / s.out_w, at.index % s.out_w, tap, shift, shift ? shift + s.positions() : nullptr);
    look.mask = mask ? mask[look.plane * s.positions() + at.index] : A(1);
    return look;
  }

  // Number of the (tap, kernel offset group)'s pair of planes in kernel_offset.
  DK_HOST_DEVICE int64_t scope_plane(const Position& at, int64_t tap, int64_t g) const {
    return (at.n * s.kernel_offset_groups + g) * s.taps() + tap;
  }

  DK_HOST_DEVICE ClippedCorners<A> scope(const Position& at, int64_t tap, int64_t g) const {
    const A* shift = kernel_offset + scope_plane(at, tap, g) * 2 * s.positions() + at.index;
    return scope_corners(s, tap, shift[0], shift[s.positions()]);
  }

  // Corner k of image n, from channel c on; only for corners on the map.
  DK_HOST_DEVICE int64_t pixel(int64_t n, const Corners<A>& corners, int k, int64_t c) const {
    return (n * s.height * s.width + corners.index[k]) * s.in_channels + c;
  }

  // value[0:kWidth] = the sampled, modulated input from channel c on.
  template <int kWidth>
  DK_HOST_DEVICE void sample(const Position& at, const Look& look, int64_t c, A value[kWidth]) const {
    for (int i = 0; i < kWidth; ++i) {
      value[i] = 0;
    }
    for (int k = 0; k < 4; ++k) {
      if (look.corners.index[k] >= 0) {
        const auto corner = Vector<T, kWidth>::load(input + pixel(at.n, look.corners, k, c));
        const A weight = look.corners.weight[k] * look.mask;
        for (int i = 0; i < kWidth; ++i) {
          value[i] += weight * static_cast<A>(corner.value[i]);
        }
      }
    }
  }

  // Columns are [groups, count, cells, C / groups]: one matrix per weight group.
  DK_HOST_DEVICE int64_t column(int64_t local, int64_t cell, int64_t c) const {
    return ((c / s.group_in() * count + local) * s.cells() + cell) * s.group_in() + c % s.group_in();
  }
};

// Depthwise forward. Work items are (position, segment), the segment fastest.
template <typename T, typename A, int kWidth>
struct DepthwiseForward {
  DeformKernelConv2dDevice<T, A> p;
  const T* filter;  // [cells, C]
  T* output;        // [N, P, C]

  static constexpr int kRows = 4;  // vectors a lane sums up at a time, so that the set-up of a tap serves all of them

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t local = item / p.segments(), start = item % p.segments() * p.segment, end = start + p.segment;
    const auto at = p.position(local);
    const int64_t stride = lanes.count() * kWidth;
    for (int64_t base = start + lanes.index() * kWidth; base < end; base += kRows * stride) {
      A sum[kRows][kWidth] = {};
      for (int64_t tap = 0; tap < p.s.taps(); ++tap) {
        const auto look = p.look(at, tap, p.data_group(start));
        if (!look.on_map()) {
          continue;
        }
        const auto scope = p.scope(at, tap, p.scope_group(start));
        DK_UNROLL
        for (int row = 0; row < kRows; ++row) {
          const int64_t c = base + row * stride;
          if (c < end) {
            A value[kWidth];
            p.template sample<kWidth>(at, look, c, value);
            A resampled[kWidth] = {};
            for (int k = 0; k < 4; ++k) {
              if (scope.index[k] >= 0) {
                const auto cell = Vector<T, kWidth>::load(filter + scope.index[k] * p.s.in_channels + c);
                for (int i = 0; i < kWidth; ++i) {
                  resampled[i] += scope.weight[k] * static_cast<A>(cell.value[i]);
                }
              }
            }
            for (int i = 0; i < kWidth; ++i) {
              sum[row][i] += value[i] * resampled[i];
            }
          }
        }
      }
      DK_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const int64_t c = base + row * stride;
        if (c < end) {
          Vector<T, kWidth> out;
          for (int i = 0; i < kWidth; ++i) {
            out.value[i] = static_cast<T>(sum[row][i]);
          }
          out.store(output + (p.first + local) * p.s.in_channels + c);
        }
      }
    }
  }
};

// columns = the taps' values, spread over the cells. Work items are (position, tile of cells, segment), the segment
// fastest.
template <typename T, typename A, int kWidth>
struct ScatterColumns {
  DeformKernelConv2dDevice<T, A> p;
  T* columns;

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t start = item % p.segments() * p.segment, end = start + p.segment;
    const int64_t low = item / p.segments() % p.cell_tiles() * kCellTile;
    const int64_t high = low + kCellTile < p.s.cells() ? low + kCellTile : p.s.cells();
    const int64_t local = item / p.segments() / p.cell_tiles();
    const auto at = p.position(local);
    for (int64_t c = start + lanes.index() * kWidth; c < end; c += lanes.count() * kWidth) {
      A sum[kCellTile][kWidth] = {};
      for (int64_t tap = 0; tap < p.s.taps(); ++tap) {
        const auto look = p.look(at, tap, p.data_group(start));
        if (!look.on_map()) {
          continue;
        }
        const auto scope = p.scope(at, tap, p.scope_group(start));
        A value[kWidth];
        p.template sample<kWidth>(at, look, c, value);
        for (int k = 0; k < 4; ++k) {
          if (scope.index[k] >= low && scope.index[k] < high) {
            A* cell = sum[scope.index[k] - low];
            for (int i = 0; i < kWidth; ++i) {
              cell[i] += scope.weight[k] * value[i];
            }
          }
        }
      }
      for (int64_t cell = low; cell < high; ++cell) {
        Vector<T, kWidth> out;
        for (int i = 0; i < kWidth; ++i) {
          out.value[i] = static_cast<T>(sum[cell - low][i]);
        }
        out.store(columns + p.column(local, cell, c));
      }
    }
  }
};

// The gradient of the columns, from a matrix product ...
template <typename T, typename A>
struct ColumnGradient {
  DeformKernelConv2dDevice<T, A> p;
  const T* grad_columns;

  template <int kWidth>
  DK_HOST_DEVICE void load(int64_t local, int64_t cell, int64_t c, A grad[kWidth]) const {
    const auto row = Vector<T, kWidth>::load(grad_columns + p.column(local, cell, c));
    for (int i = 0; i < kWidth; ++i) {
      grad[i] = static_cast<A>(row.value[i]);
    }
  }
};

// ... or, depthwise, the filter times the gradient of the output.
template <typename T, typename A>
struct DepthwiseColumnGradient {
  DeformKernelConv2dDevice<T, A> p;
  const T* filter;       // [cells, C]
  const T* grad_output;  // [N, P, C]

  template <int kWidth>
  DK_HOST_DEVICE void load(int64_t local, int64_t cell, int64_t c, A grad[kWidth]) const {
    const auto value = Vector<T, kWidth>::load(filter + cell * p.s.in_channels + c);
    const auto row = Vector<T, kWidth>::load(grad_output + (p.first + local) * p.s.in_channels + c);
    for (int i = 0; i < kWidth; ++i) {
      grad[i] = static_cast<A>(value.value[i]) * static_cast<A>(row.value[i]);
    }
  }
};

// Gradients of kernel_offset, offset and mask: each (position, tap) belongs to one warp, which goes through the
// channels and writes the sums of a group when it comes to its end.
template <typename T, typename A, int kWidth, typename Columns>
struct OffsetGradients {
  DeformKernelConv2dDevice<T, A> p;
  Columns columns;
  A* grad_kernel_offset;  // [N, G, K, 2, P]
  A* grad_offset;         // [N, D, K, 2, P] or null
  A* grad_mask;           // [N, D, K, P] or null

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t tap = item % p.s.taps(), local = item / p.s.taps(), positions = p.s.positions();
    const auto at = p.position(local);
    A scope_dot[4] = {}, data_dot[4] = {};
    for (int64_t start = 0; start < p.s.in_channels; start += p.segment) {
      const int64_t end = start + p.segment;
      const auto look = p.look(at, tap, p.data_group(start));
      const auto scope = p.scope(at, tap, p.scope_group(start));
      if (look.on_map()) {
        for (int64_t c = start + lanes.index() * kWidth; c < end; c += lanes.count() * kWidth) {
          A value[kWidth], grad[kWidth] = {};
          p.template sample<kWidth>(at, look, c, value);
          for (int k = 0; k < 4; ++k) {
            if (scope.index[k] >= 0) {
              A cell[kWidth];
              columns.template load<kWidth>(local, scope.index[k], c, cell);
              for (int i = 0; i < kWidth; ++i) {
                scope_dot[k] += cell[i] * value[i];
                grad[i] += scope.weight[k] * cell[i];
              }
            }
          }
          if (grad_offset || grad_mask) {
            for (int k = 0; k < 4; ++k) {
              if (look.corners.index[k] >= 0) {
                const auto corner = Vector<T, kWidth>::load(p.input + p.pixel(at.n, look.corners, k, c));
                for (int i = 0; i < kWidth; ++i) {
                  data_dot[k] += grad[i] * static_cast<A>(corner.value[i]);
                }
              }
            }
          }
        }
      }
      if (end % p.s.kernel_offset_group_channels() == 0) {
        for (int k = 0; k < 4; ++k) {
          scope_dot[k] = lanes.sum(scope_dot[k]);
        }
        if (lanes.index() == 0) {
          A* shift = grad_kernel_offset + p.scope_plane(at, tap, p.scope_group(start)) * 2 * positions + at.index;
          shift[0] = scope.free_y ? bilinear_grad_y(scope, scope_dot) : A(0);
          shift[positions] = scope.free_x ? bilinear_grad_x(scope, scope_dot) : A(0);
        }
        for (int k = 0; k < 4; ++k) {
          scope_dot[k] = 0;
        }
      }
      if (end % p.s.offset_group_channels() == 0) {
        A by_mask = 0;
        for (int k = 0; k < 4; ++k) {
          data_dot[k] = lanes.sum(data_dot[k]);
          by_mask += look.corners.weight[k] * data_dot[k];
        }
        if (lanes.index() == 0) {
          if (grad_offset) {
            A* shift = grad_offset + look.plane * 2 * positions + at.index;
            shift[0] = look.mask * bilinear_grad_y(look.corners, data_dot);
            shift[positions] = look.mask * bilinear_grad_x(look.corners, data_dot);
          }
          if (grad_mask) {
            grad_mask[look.plane * positions + at.index] = by_mask;
          }
        }
        for (int k = 0; k < 4; ++k) {
          data_dot[k] = 0;
        }
      }
    }
  }
};

// The gradient of one tap's value at channel c.
template <typename A, typename Columns>
DK_HOST_DEVICE A value_gradient(const Columns& columns, int64_t local, const ClippedCorners<A>& scope, int64_t c) {
  A sum = 0;
  for (int k = 0; k < 4; ++k) {
    if (scope.index[k] >= 0) {
      A cell[1];
      columns.template load<1>(local, scope.index[k], c, cell);
      sum += scope.weight[k] * cell[0];
    }
  }
  return sum;
}

// Gradient of the input where no data offset moves the taps: each pixel knows the output positions that look at it.
// Work items are the pixels of the images from `first_image` on.
template <typename T, typename A, typename Columns>
struct PullInputGradient {
  DeformKernelConv2dDevice<T, A> p;
  Columns columns;
  int64_t first_image;
  A* grad_input;  // [N, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const auto& s = p.s;
    const int64_t plane = s.height * s.width, n = first_image + item / plane;
    const int64_t y = item % plane / s.width, x = item % plane % s.width;
    A* row = grad_input + (n * plane + item % plane) * s.in_channels;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const int64_t down = y + s.padding_h - tap / s.kernel_w * s.dilation_h;
      const int64_t across = x + s.padding_w - tap % s.kernel_w * s.dilation_w;
      if (down < 0 || down % s.stride_h != 0 || across < 0 || across % s.stride_w != 0) {
        continue;
      }
      const int64_t oh = down / s.stride_h, ow = across / s.stride_w;
      const int64_t local = n * s.positions() + oh * s.out_w + ow - p.first;
      if (oh >= s.out_h || ow >= s.out_w || local < 0 || local >= p.count) {
        continue;
      }
      const auto at = p.position(local);
      for (int64_t start = 0; start < s.in_channels; start += p.segment) {
        const A mask = p.look(at, tap, p.data_group(start)).mask;
        const auto scope = p.scope(at, tap, p.scope_group(start));
        for (int64_t c = start + lanes.index(); c < start + p.segment; c += lanes.count()) {
          row[c] += mask * value_gradient(columns, local, scope, c);
        }
      }
    }
  }
};

// Gradient of the input under data offsets, scattered with atomics: fast, the order of the sums is left to chance. Work
// items are (position, tap).
template <typename T, typename A, typename Columns>
struct PushInputGradient {
  DeformKernelConv2dDevice<T, A> p;
  Columns columns;
  A* grad_input;  // [N, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t tap = item % p.s.taps(), local = item / p.s.taps();
    const auto at = p.position(local);
    for (int64_t start = 0; start < p.s.in_channels; start += p.segment) {
      const auto look = p.look(at, tap, p.data_group(start));
      if (!look.on_map()) {
        continue;
      }
      const auto scope = p.scope(at, tap, p.scope_group(start));
      for (int64_t c = start + lanes.index(); c < start + p.segment; c += lanes.count()) {
        const A grad = look.mask * value_gradient(columns, local, scope, c);
        for (int k = 0; k < 4; ++k) {
          if (look.corners.index[k] >= 0) {
            add_atomically(grad_input + p.pixel(at.n, look.corners, k, c), look.corners.weight[k] * grad);
          }
        }
      }
    }
  }
};

// The deterministic way to the same gradient, in two bodies. First, for every (position, tap, data offset group) and
// corner the pixel it touches, numbered within (image, group) planes, or the number of pixels where it touches none.
// Sorted by that key, the contributions to one pixel lie together and in a fixed order.
template <typename T, typename A>
struct TouchedPixels {
  DeformKernelConv2dDevice<T, A> p;
  int64_t* keys;  // [items, 4]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    if (lanes.index() != 0) {
      return;
    }
    const int64_t d = item % p.s.offset_groups, tap = item / p.s.offset_groups % p.s.taps();
    const auto at = p.position(item / p.s.offset_groups / p.s.taps());
    const auto look = p.look(at, tap, d);
    const int64_t plane = p.s.height * p.s.width;
    for (int k = 0; k < 4; ++k) {
      keys[item * 4 + k] =
          look.corners.index[k] < 0 ? p.pixels() : (at.n * p.s.offset_groups + d) * plane + look.corners.index[k];
    }
  }
};

// Then each pixel gathers its contributions.
template <typename T, typename A, typename Columns>
struct GatherInputGradients {
  DeformKernelConv2dDevice<T, A> p;
  Columns columns;
  Contributions from;  // numbered (item, corner)
  A* grad_input;       // [N, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t i, const Lanes& lanes) const {
    if (!from.begins(i)) {
      return;
    }
    const int64_t pixel = from.pixels[i];
    const int64_t plane = p.s.height * p.s.width, groups = p.s.offset_groups;
    const int64_t n = pixel / plane / groups, d = pixel / plane % groups;
    const int64_t low = d * p.s.offset_group_channels(), high = low + p.s.offset_group_channels();
    A* row = grad_input + (n * plane + pixel % plane) * p.s.in_channels;
    for (; from.continues(i, pixel); ++i) {
      const int64_t item = from.order[i] / 4, tap = item / groups % p.s.taps(), local = item / groups / p.s.taps();
      const auto at = p.position(local);
      const auto look = p.look(at, tap, d);
      const A weight = look.corners.weight[from.order[i] % 4] * look.mask;
      for (int64_t start = low; start < high; start += p.segment) {
        const auto scope = p.scope(at, tap, p.scope_group(start));
        for (int64_t c = start + lanes.index(); c < start + p.segment; c += lanes.count()) {
          row[c] += weight * value_gradient(columns, local, scope, c);
        }
      }
    }
  }
};

// Gradient of a depthwise filter: every warp sums up a block of output positions for a chunk of the channels and a tile
// of the cells, in registers and its own memory; the blocks are added afterwards. Work items are (block, tile, chunk),
// the chunk fastest.
template <typename T, typename A, int kWidth>
struct DepthwiseFilterGradient {
  DeformKernelConv2dDevice<T, A> p;
  const T* grad_output;  // [N, P, C]
  int64_t block;         // positions of a block
  A* partial;            // [blocks, cells, C]

  static constexpr int64_t kChunk = 128;

  DK_HOST_DEVICE int64_t chunks_per_segment() const { return (p.segment + kChunk - 1) / kChunk; }
  DK_HOST_DEVICE int64_t chunks() const { return p.segments() * chunks_per_segment(); }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t chunk = item % chunks(), segment_end = (chunk / chunks_per_segment() + 1) * p.segment;
    const int64_t start = chunk / chunks_per_segment() * p.segment + chunk % chunks_per_segment() * kChunk;
    const int64_t end = start + kChunk < segment_end ? start + kChunk : segment_end;
    const int64_t low = item / chunks() % p.cell_tiles() * kCellTile;
    const int64_t high = low + kCellTile < p.s.cells() ? low + kCellTile : p.s.cells();
    const int64_t number = item / chunks() / p.cell_tiles();
    const int64_t last = (number + 1) * block < p.count ? (number + 1) * block : p.count;
    for (int64_t c = start + lanes.index() * kWidth; c < end; c += lanes.count() * kWidth) {
      A sum[kCellTile][kWidth] = {};
      for (int64_t local = number * block; local < last; ++local) {
        const auto at = p.position(local);
        const auto row = Vector<T, kWidth>::load(grad_output + (p.first + local) * p.s.in_channels + c);
        for (int64_t tap = 0; tap < p.s.taps(); ++tap) {
          const auto look = p.look(at, tap, p.data_group(start));
          if (!look.on_map()) {
            continue;
          }
          const auto scope = p.scope(at, tap, p.scope_group(start));
          A value[kWidth];
          p.template sample<kWidth>(at, look, c, value);
          for (int k = 0; k < 4; ++k) {
            if (scope.index[k] >= low && scope.index[k] < high) {
              A* cell = sum[scope.index[k] - low];
              for (int i = 0; i < kWidth; ++i) {
                cell[i] += scope.weight[k] * value[i] * static_cast<A>(row.value[i]);
              }
            }
          }
        }
      }
      for (int64_t cell = low; cell < high; ++cell) {
        for (int i = 0; i < kWidth; ++i) {
          partial[(number * p.s.cells() + cell) * p.s.in_channels + c + i] = sum[cell - low][i];
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
      const auto p = device(0, total());
      with_width<kWide>({filter, out}, [&](auto width) {
        Launcher::run(
            p.count * p.segments(), DepthwiseForward<T, A, decltype(width)::value>{
                                        p, filter.template const_data_ptr<T>(), out.template mutable_data_ptr<T>()});
      });
    } else {
      out = at::empty({s.groups, total(), s.group_out()}, x.options());
      each_chunk(/*sorts=*/false, [&](const auto& p) {
        at::Tensor part = out.narrow(1, p.first, p.count);
        at::bmm_out(part, scatter(p), filter.transpose(1, 2));
      });
      out = out.permute({1, 0, 2}).reshape({s.batch, s.out_h, s.out_w, s.out_channels});
    }
    return bias ? out.add_(*bias) : out;  // [N, outH, outW, O]
  }

  DeformKernelConv2dGradients backward(
      const at::Tensor& grad_output, const at::Tensor& weight, std::array<bool, 6> wanted) const {
    const at::Tensor rows = grad_output.permute({0, 2, 3, 1}).contiguous();  // [N, outH, outW, O]
    const bool sorts = wanted[0] && off.defined() && at::globalContext().deterministicAlgorithms();
    at::Tensor grad_x, grad_koff, grad_off, grad_mask, grad_filter;
    if (wanted[0]) {
      grad_x = at::zeros({s.batch, s.height, s.width, s.in_channels}, wide);
    }
    if (wanted[1] || wanted[2] || wanted[3]) {
      grad_koff = at::empty(koff.sizes(), wide);  // also where only others are wanted: one body makes all three
      grad_off = wanted[2] ? at::empty(off.sizes(), wide) : at::Tensor();
      grad_mask = wanted[3] ? at::empty(msk.sizes(), wide) : at::Tensor();
    }
    const auto gradients = [&](const auto& p, const auto& columns, at::ArrayRef<at::Tensor> read) {
      using Columns = std::decay_t<decltype(columns)>;
      if (grad_koff.defined()) {
        with_width<kWide>(read, [&](auto width) {
          Launcher::run(
              p.count * s.taps(),
              OffsetGradients<T, A, decltype(width)::value, Columns>{
                  p, columns, grad_koff.template mutable_data_ptr<A>(), data<A>(grad_off), data<A>(grad_mask)});
        });
      }
      if (wanted[0]) {
        input_gradient(p, columns, grad_x.template mutable_data_ptr<A>());
      }
    };

    if (s.depthwise()) {
      const T* grad = rows.template const_data_ptr<T>();
      if (wanted[0] || grad_koff.defined()) {
        each_chunk(sorts, [&](const auto& p) {
          gradients(p, DepthwiseColumnGradient<T, A>{p, filter.template const_data_ptr<T>(), grad}, {filter, rows});
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
      each_chunk(sorts, [&](const auto& p) {
        const at::Tensor part = grad.narrow(1, p.first, p.count);  // [groups, count, O / groups]
        if (wanted[0] || grad_koff.defined()) {
          const at::Tensor columns = at::bmm(part, filter);
          gradients(p, ColumnGradient<T, A>{p, columns.template const_data_ptr<T>()}, {columns});
        }
        if (wanted[4]) {
          grad_filter += at::bmm(part.transpose(1, 2), scatter(p)).to(wide.dtype());
        }
      });
    }

    DeformKernelConv2dGradients result = no_kernel_gradients(x);
    if (wanted[0]) {
      std::get<0>(result) = grad_x.permute({0, 3, 1, 2}).to(x.scalar_type());
    }
    if (wanted[1]) {
      std::get<1>(result) = grad_koff;
    }
    if (wanted[2]) {
      std::get<2>(result) = grad_off;
    }
    if (wanted[3]) {
      std::get<3>(result) = grad_mask;
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
  using Device = DeformKernelConv2dDevice<T, A>;

  static constexpr int64_t kBufferBytes = 64 << 20;  // a bound on memory
  static constexpr int kWide = 16 / sizeof(T);
  static constexpr int kTileWide = kWide < 4 ? kWide : 4;  // where a lane keeps a whole tile of cells

  int64_t total() const { return s.batch * s.positions(); }

  template <typename V>
  static V* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.template mutable_data_ptr<V>() : nullptr;
  }

  Device device(int64_t first, int64_t count) const {
    return {
        s,
        std::gcd(s.kernel_offset_group_channels(), s.offset_group_channels()),
        x.template const_data_ptr<T>(),
        koff.template const_data_ptr<A>(),
        off.defined() ? off.template const_data_ptr<A>() : nullptr,
        msk.defined() ? msk.template const_data_ptr<A>() : nullptr,
        first,
        count};
  }

  // Calls body(device) for chunks of output positions: as many as have room in the columns, which a depthwise
  // convolution has not, and, where they are sorted, among the contributions.
  template <typename Body>
  void each_chunk(bool sorts, const Body& body) const {
    int64_t chunk = total();
    if (!s.depthwise()) {
      chunk = std::min(chunk, kBufferBytes / (s.cells() * s.in_channels * static_cast<int64_t>(sizeof(T))));
    }
    if (sorts) {
      chunk = std::min(chunk, kContributions / (s.taps() * s.offset_groups * 4));
    }
    chunk = std::max<int64_t>(chunk, 1);
    for (int64_t first = 0; first < total(); first += chunk) {
      body(device(first, std::min(chunk, total() - first)));
    }
  }

  // kWidth values at a time where the channels of a segment and of a weight group, and the tensors read, allow it.
  template <int kWidth, typename Body>
  void with_width(at::ArrayRef<at::Tensor> tensors, const Body& body) const {
    const auto aligned = [](const at::Tensor& tensor) {
      return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (kWidth * sizeof(T)) == 0;
    };
    const bool fits = device(0, 0).segment % kWidth == 0 && (s.depthwise() || s.group_in() % kWidth == 0) &&
                      aligned(x) && std::all_of(tensors.begin(), tensors.end(), aligned);
    if (fits) {
      body(std::integral_constant<int, kWidth>{});
    } else {
      body(std::integral_constant<int, 1>{});
    }
  }

  // [groups, count, cells * C / groups]
  at::Tensor scatter(const Device& p) const {
    at::Tensor columns = at::empty({s.groups, p.count, s.cells() * s.group_in()}, x.options());
    with_width<kTileWide>({}, [&](auto width) {
      Launcher::run(
          p.count * p.cell_tiles() * p.segments(),
          ScatterColumns<T, A, decltype(width)::value>{p, columns.template mutable_data_ptr<T>()});
    });
    return columns;
  }

  // [cells, C]
  at::Tensor depthwise_filter_gradient(const at::Tensor& grad_rows) const {
    const auto p = device(0, total());
    // Enough blocks to fill a device, as long as their sums stay small.
    const int64_t most = kBufferBytes / (s.cells() * s.in_channels * static_cast<int64_t>(sizeof(A)));
    const int64_t wanted = std::clamp<int64_t>(total() / 64, 1, std::clamp<int64_t>(most, 1, 256));
    const int64_t block = std::max<int64_t>((total() + wanted - 1) / wanted, 1), blocks = (total() + block - 1) / block;
    at::Tensor partial = at::empty({blocks, s.cells(), s.in_channels}, wide);
    with_width<kTileWide>({grad_rows}, [&](auto width) {
      const DepthwiseFilterGradient<T, A, decltype(width)::value> body{
          p, grad_rows.template const_data_ptr<T>(), block, partial.template mutable_data_ptr<A>()};
      Launcher::run(blocks * p.cell_tiles() * body.chunks(), body);
    });
    return partial.sum(0);
  }

  template <typename Columns>
  void input_gradient(const Device& p, const Columns& columns, A* grad_input) const {
    if (!off.defined()) {
      const int64_t first_image = p.first / s.positions(), last_image = (p.first + p.count - 1) / s.positions();
      Launcher::run(
          (last_image - first_image + 1) * s.height * s.width,
          PullInputGradient<T, A, Columns>{p, columns, first_image, grad_input});
      return;
    }
    const int64_t items = p.count * s.taps();
    if (!at::globalContext().deterministicAlgorithms()) {
      Launcher::run(items, PushInputGradient<T, A, Columns>{p, columns, grad_input});
      return;
    }
    at::Tensor keys = at::empty({items * s.offset_groups * 4}, x.options().dtype(at::kLong));
    Launcher::run(items * s.offset_groups, TouchedPixels<T, A>{p, keys.mutable_data_ptr<int64_t>()});
    gather<Launcher>(keys, p.pixels(), [&](const Contributions& from) {
      return GatherInputGradients<T, A, Columns>{p, columns, from, grad_input};
    });
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
