// Host kernels of kernel_evolution_conv2d.
//
// Everything runs in float (double for double): half types are widened on entry and rounded once at the end. Where a
// channel is read is the same at all output positions, so along a row of them a window is a handful of shifted rows of
// the map, each times a constant, and positions are the axis of vectors. Rows of the map are padded with zeros as
// far as any location needs, and cut into one row for each remainder by the stride, so no read along a row is guarded
// and none is strided. The sampled columns stay in cache and are multiplied at once by the weight. In the backward
// every thread owns channels, so nothing is shared but the attention's gradient, a sum over threads in a fixed order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#include "ops/kernel_evolution_conv2d.h"

namespace dk {

namespace {

// Runs along a row may be computed up to the next multiple of so many values: there has to be room.
constexpr int64_t kBlock = 16;

// A pixel that a location reads, seen from the row and the position at which its window begins.
template <typename T>
struct Point {
  T weight;
  int64_t shift;
};

// Positions of a tile that lie in one row of the output.
struct Run {
  int64_t row;    // of the map, that output row is centred on: oh * stride
  int64_t start;  // ow
  int64_t at;     // in the tile
  int64_t count;
};

std::vector<Run> runs_of(const KernelEvolutionConv2dSizes& s, int64_t first, int64_t count) {
  std::vector<Run> runs;
  for (int64_t at = 0; at < count;) {
    const int64_t oh = (first + at) / s.out_w, ow = (first + at) % s.out_w;
    const int64_t length = std::min(count - at, s.out_w - ow);
    runs.push_back({oh * s.stride_h, ow, at, length});
    at += length;
  }
  return runs;
}

// Where every location of every channel reads, in planes of rows that are padded and cut by the remainder of the
// stride.
template <typename T>
struct Stencils {
  KernelEvolutionConv2dSizes s;
  int64_t left = 0, pitch = 0;     // zeros before a row, and the length of a padded row
  std::vector<int64_t> first_row;  // [C, K]
  std::vector<Point<T>> points;    // [C, K, cells]: those that weigh anything, row by row
  std::vector<int64_t> row_ends;   // [C, K, window_h + 1]: how many points lie above each row of the window
  std::vector<int64_t> column;     // [C, K, window_w]: shift of each column of the window

  Stencils(const KernelEvolutionConv2dSizes& sizes, const T* origin, const T* window) : s(sizes) {
    const int64_t number = s.in_channels * s.locations;
    std::vector<int64_t> first_column(number);
    first_row.resize(number);
    int64_t lowest = 0, highest = 0;
    for (int64_t i = 0; i < number; ++i) {
      const T y = origin[2 * i], x = origin[2 * i + 1];
      TORCH_CHECK_VALUE(
          std::isfinite(y) && std::isfinite(x),
          "kernel_evolution_conv2d: location must be finite, but that of input "
          "channel ",
          i / s.locations, ", number ", i % s.locations, ", is not");
      first_row[i] = first_pixel(y, s.padding_h, s.out_h, s.stride_h, s.window_h, s.height);
      first_column[i] = first_pixel(x, s.padding_w, s.out_w, s.stride_w, s.window_w, s.width);
      lowest = std::min(lowest, first_column[i]);
      highest = std::max(highest, first_column[i]);
    }
    left = -floor_div(lowest);
    const int64_t read = floor_div(highest + s.window_w - 1) + s.out_w + kBlock;
    pitch = left + std::max(read, (s.width + s.stride_w - 1) / s.stride_w);

    points.resize(number * s.cells());
    row_ends.resize(number * (s.window_h + 1));
    column.resize(number * s.window_w);
    at::parallel_for(0, number, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t* shifts = column.data() + i * s.window_w;
        for (int64_t x = 0; x < s.window_w; ++x) {
          const int64_t pixel = first_column[i] + x, whole = floor_div(pixel);
          shifts[x] = (pixel - whole * s.stride_w) * pitch + left + whole;
        }
        Point<T>* next = points.data() + i * s.cells();
        int64_t* ends = row_ends.data() + i * (s.window_h + 1);
        int64_t found = 0;
        for (int64_t y = 0; y < s.window_h; ++y) {
          ends[y] = found;
          for (int64_t x = 0; x < s.window_w; ++x) {
            const T weight = window[i * s.cells() + y * s.window_w + x];
            if (weight != T(0)) {
              next[found++] = {weight, y * row_size() + shifts[x]};
            }
          }
        }
        ends[s.window_h] = found;
      }
    });
  }

  int64_t floor_div(int64_t pixel) const {
    return pixel >= 0 ? pixel / s.stride_w : -((s.stride_w - 1 - pixel) / s.stride_w);
  }

  int64_t row_size() const { return s.stride_w * pitch; }
  int64_t plane_size() const { return s.height * row_size(); }

  // Copies one channel of an image into a plane, zeros around it, or, where `back`, the other way.
  template <bool back>
  void pad(std::conditional_t<back, T, const T>* channel, std::conditional_t<back, const T, T>* plane) const {
    for (int64_t row = 0; row < s.height; ++row, channel += s.width, plane += row_size()) {
      if constexpr (!back) {
        std::fill_n(plane, row_size(), T(0));
      }
      if (s.stride_w == 1) {
        if constexpr (back) {
          std::copy_n(plane + left, s.width, channel);
        } else {
          std::copy_n(channel, s.width, plane + left);
        }
        continue;
      }
      for (int64_t rest = 0; rest < std::min(s.stride_w, s.width); ++rest) {
        auto* padded = plane + rest * pitch + left;
        for (int64_t x = rest; x < s.width; x += s.stride_w, ++padded) {
          if constexpr (back) {
            channel[x] = *padded;
          } else {
            *padded = channel[x];
          }
        }
      }
    }
  }

  // The rows [low, high) of a window that lie on the map.
  void rows_on_map(int64_t i, const Run& run, int64_t& low, int64_t& high) const {
    const int64_t top = run.row + first_row[i];
    low = std::clamp<int64_t>(-top, 0, s.window_h);
    high = std::clamp<int64_t>(s.height - top, low, s.window_h);
  }

  // Asks for what the locations of channel c read of its plane. A tile reads a few short rows of every channel, which
  // the processor does not foresee.
  void prefetch(int64_t c, const T* plane, const std::vector<Run>& runs) const {
    const auto [first, last] =
        std::minmax_element(first_row.begin() + c * s.locations, first_row.begin() + (c + 1) * s.locations);
    constexpr int64_t kLine = 64 / sizeof(T);
    for (const Run& run : runs) {
      const int64_t low = std::max<int64_t>(run.row + *first, 0),
                    high = std::min(run.row + *last + s.window_h, s.height);
      for (int64_t row = low; row < high; ++row) {
        const T* at = plane + row * row_size() + left + run.start;
        for (int64_t x = 0; x < run.count + kLine; x += kLine) {
          __builtin_prefetch(at + x);
        }
      }
    }
  }

  // What points and columns of location i are counted from in a plane.
  int64_t base(int64_t i, const Run& run) const { return (run.row + first_row[i]) * row_size() + run.start; }
};

// out[t] (+)= the sum over points of weight * from[shift + t]. Whole blocks of `out` are written, and some vectors of
// it stay in registers while the points are added up.
#define DK_ADD_VECTORS(NUMBER)                                                           \
  {                                                                                      \
    Vector sum[NUMBER] = {};                                                             \
    for (int v = 0; add && v < NUMBER; ++v) {                                            \
      sum[v] = *reinterpret_cast<const Vector*>(out + t + v * kLanes);                   \
    }                                                                                    \
    for (int64_t i = 0; i < number; ++i) {                                               \
      const T* row = from + t + points[i].shift;                                         \
      _Pragma("GCC unroll 4") for (int v = 0; v < NUMBER; ++v) {                         \
        sum[v] += points[i].weight * *reinterpret_cast<const Vector*>(row + v * kLanes); \
      }                                                                                  \
    }                                                                                    \
    for (int v = 0; v < NUMBER; ++v) {                                                   \
      *reinterpret_cast<Vector*>(out + t + v * kLanes) = sum[v];                         \
    }                                                                                    \
    t += NUMBER * kLanes;                                                                \
  }
#define DK_ADD_POINTS(NAME, ATTRIBUTES, BYTES)                                                                   \
  template <typename T>                                                                                          \
  ATTRIBUTES void NAME(const T* from, const Point<T>* points, int64_t number, int64_t count, bool add, T* out) { \
    typedef T Vector __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));                        \
    constexpr int64_t kLanes = BYTES / sizeof(T);                                                                \
    static_assert(kLanes <= kBlock);                                                                             \
    for (int64_t t = 0; t < count;) {                                                                            \
      if (count - t > 3 * kLanes)                                                                                \
        DK_ADD_VECTORS(4)                                                                                        \
      else if (count - t > kLanes)                                                                               \
        DK_ADD_VECTORS(2)                                                                                        \
      else                                                                                                       \
        DK_ADD_VECTORS(1)                                                                                        \
    }                                                                                                            \
  }
DK_FOR_EACH_VECTOR(DK_ADD_POINTS, add_points)

// columns[j, t] = the value that location j of the channels [begin, end) reads at position t of a tile, times its
// attention. Behind the last row there has to be room for kBlock more. `planes` begin with channel
// `begin`, `attention` is [K, stride].
template <typename T>
DK_SIMD_CLONES void sample_columns(
    const Stencils<T>& stencils,
    const T* planes,
    int64_t begin,
    int64_t end,
    const std::vector<Run>& runs,
    const T* attention,
    int64_t stride,
    T* columns) {
  const int64_t locations = stencils.s.locations;
  for (int64_t c = begin; c < end; ++c, planes += stencils.plane_size()) {
    if (c + 1 < end) {
      stencils.prefetch(c + 1, planes + stencils.plane_size(), runs);
    }
    for (int64_t k = 0; k < locations; ++k, columns += stride) {
      const int64_t i = c * locations + k;
      const int64_t* ends = stencils.row_ends.data() + i * (stencils.s.window_h + 1);
      const Point<T>* points = stencils.points.data() + i * stencils.s.cells();
      for (const Run& run : runs) {
        int64_t low, high;
        stencils.rows_on_map(i, run, low, high);
        add_points<T>(
            planes + stencils.base(i, run), points + ends[low], ends[high] - ends[low], run.count, false,
            columns + run.at);
      }
      if (attention) {
        const T* scores = attention + k * stride;
        const int64_t count = runs.back().at + runs.back().count;
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) {
          columns[t] *= scores[t];
        }
      }
    }
  }
}

// sums[i] += the sum over positions of rows[i] * grad, at kRows rows.
template <typename T, int kRows>
inline __attribute__((always_inline)) void add_dots(
    const T* from, const int64_t* shifts, const T* grad, int64_t count, T* sums) {
  static_assert(kRows == 1 || kRows == 4);
  T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;
  const T *row0 = from + shifts[0], *row1 = from + shifts[kRows > 1], *row2 = from + shifts[kRows > 1 ? 2 : 0],
          *row3 = from + shifts[kRows > 1 ? 3 : 0];
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
  for (int64_t t = 0; t < count; ++t) {
    dot0 += row0[t] * grad[t];
    if (kRows > 1) {
      dot1 += row1[t] * grad[t];
      dot2 += row2[t] * grad[t];
      dot3 += row3[t] * grad[t];
    }
  }
  sums[0] += dot0;
  if (kRows > 1) {
    sums[1] += dot1;
    sums[2] += dot2;
    sums[3] += dot3;
  }
}

// Adds the gradients that reach the windows and the map from those of the columns, `grad` [K * channels, stride]: a
// cell of a window gets the sum over positions of the column's gradient times the pixel under it, `sums` [channels, K,
// cells]; a pixel gets its weight times the column's gradient. Either may be null. `scratch` holds a row of the tile,
// with window_w zeros in front of it, and room for window_w + kBlock behind.
template <typename T>
DK_SIMD_CLONES void backward_columns(
    const Stencils<T>& stencils,
    const T* planes,
    int64_t begin,
    int64_t end,
    const std::vector<Run>& runs,
    const T* grad,
    int64_t stride,
    T* scratch,
    T* sums,
    T* grad_planes) {
  const KernelEvolutionConv2dSizes& s = stencils.s;
  const int64_t cells = s.cells(), row_size = stencils.row_size();
  T* row = scratch + s.window_w;
  std::vector<Point<T>> shifted(s.window_w);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t plane = (c - begin) * stencils.plane_size();
    for (int64_t k = 0; k < s.locations; ++k, grad += stride) {
      const int64_t i = c * s.locations + k;
      const int64_t* ends = stencils.row_ends.data() + i * (s.window_h + 1);
      const int64_t* columns = stencils.column.data() + i * s.window_w;
      const Point<T>* points = stencils.points.data() + i * cells;
      for (const Run& run : runs) {
        int64_t low, high;
        stencils.rows_on_map(i, run, low, high);
        std::copy_n(grad + run.at, run.count, row);
        std::fill_n(row + run.count, s.window_w + kBlock, T(0));
        const int64_t base = plane + stencils.base(i, run);
        for (int64_t y = low; sums && y < high; ++y) {
          T* target = sums + (i - begin * s.locations) * cells + y * s.window_w;
          const T* from = planes + (base + y * row_size);
          int64_t x = 0;
          for (; x + 4 <= s.window_w; x += 4) {
            add_dots<T, 4>(from, columns + x, row, run.count, target + x);
          }
          for (; x < s.window_w; ++x) {
            add_dots<T, 1>(from, columns + x, row, run.count, target + x);
          }
        }
        if (!grad_planes) {
          continue;
        }
        if (s.stride_w > 1) {  // neighbouring columns lie in different rows of a plane
          for (int64_t p = ends[low]; p < ends[high]; ++p) {
            const Point<T> point{points[p].weight, 0};
            add_points<T>(row, &point, 1, run.count, true, grad_planes + (base + points[p].shift));
          }
          continue;
        }
        for (int64_t y = low; y < high; ++y) {  // what the pixels of a row get, all columns at once
          const Point<T>* first = points + ends[y];
          const int64_t number = ends[y + 1] - ends[y];
          if (number > 0) {
            for (int64_t p = 0; p < number; ++p) {
              shifted[p] = {first[p].weight, first[0].shift - first[p].shift};
            }
            const int64_t reach = first[number - 1].shift - first[0].shift;
            add_points<T>(row, shifted.data(), number, run.count + reach, true, grad_planes + (base + first[0].shift));
          }
        }
      }
    }
  }
}

// out[t] (+)= in[t] * factor.
template <typename T>
DK_SIMD_CLONES void multiply_row(const T* in, T factor, int64_t count, bool accumulate, T* out) {
  if (accumulate) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) {
      out[t] += in[t] * factor;
    }
  } else {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) {
      out[t] = in[t] * factor;
    }
  }
}

// out[t] (+)= a[t] * b[t].
template <typename T>
DK_SIMD_CLONES void multiply_rows(const T* a, const T* b, int64_t count, bool accumulate, T* out) {
  if (accumulate) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) {
      out[t] += a[t] * b[t];
    }
  } else {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) {
      out[t] = a[t] * b[t];
    }
  }
}

template <typename T>
DK_SIMD_CLONES T dot_rows(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < count; ++t) {
    sum += a[t] * b[t];
  }
  return sum;
}

// Runs of at most `most` input channels, each inside one weight group.
std::vector<Panel> channel_blocks(const KernelEvolutionConv2dSizes& s, int64_t most) {
  std::vector<Panel> blocks;
  for (int64_t group = 0; group < s.in_channels; group += s.group_in()) {
    for (int64_t c = 0; c < s.group_in(); c += most) {
      blocks.push_back({group + c, std::min(most, s.group_in() - c)});
    }
  }
  return blocks;
}

// The attention of a tile, [K, stride], with zeros behind.
template <typename T>
void copy_attention(
    const T* attention, int64_t locations, int64_t positions, int64_t first, int64_t count, int64_t stride, T* out) {
  for (int64_t k = 0; k < locations; ++k) {
    std::copy_n(attention + k * positions + first, count, out + k * stride);
  }
}

template <typename T>
at::Tensor forward(
    const KernelEvolutionConv2dSizes& s,
    const at::Tensor& input,
    const at::Tensor& origin,
    const at::Tensor& window,
    const std::optional<at::Tensor>& attention,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const auto format = input.suggest_memory_format();
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  const auto compute = c10::CppTypeToScalarType<T>::value;
  at::Tensor output = at::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.options().dtype(compute), format);
  const at::Tensor from = widen<T>(origin, at::MemoryFormat::Contiguous);
  const at::Tensor cells = widen<T>(window, at::MemoryFormat::Contiguous);
  const Stencils<T> stencils(s, from.const_data_ptr<T>(), cells.const_data_ptr<T>());
  if (s.batch == 0) {
    return output.to(input.scalar_type());
  }
  const at::Tensor x = widen<T>(input, at::MemoryFormat::Contiguous);
  const at::Tensor scores = attention ? widen<T>(*attention, at::MemoryFormat::Contiguous) : at::Tensor();
  const at::Tensor w = widen<T>(weight, at::MemoryFormat::Contiguous);
  const at::Tensor b = bias ? widen<T>(*bias, at::MemoryFormat::Contiguous) : at::Tensor();
  const T* weights = w.const_data_ptr<T>();
  const int64_t locations = s.locations, positions = s.positions(), group_out = s.group_out();
  const int64_t map = s.height * s.width, plane = stencils.plane_size(), row = s.group_in() * locations;

  at::Tensor padded = at::empty({s.batch * s.in_channels * plane}, x.options());
  at::parallel_for(0, s.batch * s.in_channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      stencils.template pad<false>(x.const_data_ptr<T>() + i * map, padded.mutable_data_ptr<T>() + i * plane);
    }
  });

  const std::vector<Panel> blocks = channel_blocks(s, std::max<int64_t>(1, 384 / locations));
  constexpr int64_t kTile = 3 * kPanel;
  const int64_t tiles = (positions + kTile - 1) / kTile;
  at::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> columns(blocks.front().width * locations * kTile + kBlock);
    std::vector<T> score(attention ? locations * kTile : 0), result(s.out_channels * kTile);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / tiles, first = unit % tiles * kTile, count = std::min(kTile, positions - first);
      const std::vector<Run> runs = runs_of(s, first, count);
      if (attention) {
        copy_attention(
            scores.const_data_ptr<T>() + n * locations * positions, locations, positions, first, count, kTile,
            score.data());
      }
      for (const Panel& block : blocks) {
        const int64_t g = block.first / s.group_in(), within = block.first % s.group_in();
        sample_columns(
            stencils, padded.const_data_ptr<T>() + (n * s.in_channels + block.first) * plane, block.first, block.end(),
            runs, attention ? score.data() : nullptr, kTile, columns.data());
        const T* filter = weights + g * group_out * row + within * locations;
        T* out = result.data() + g * group_out * kTile;
        if (group_out > 1) {
          for (int64_t t = 0; t < count; t += kPanel) {
            gemm(
                group_out, kPanel, block.width * locations, filter, row, columns.data() + t, kTile, out + t, kTile,
                within > 0);
          }
        } else {
          for (int64_t j = 0; j < block.width * locations; ++j) {
            multiply_row(columns.data() + j * kTile, filter[j], count, within + j > 0, out);
          }
        }
      }
      T* target = output.mutable_data_ptr<T>() + n * s.out_channels * positions;
      for (int64_t o = 0; o < s.out_channels; ++o) {
        const T shift = bias ? b.const_data_ptr<T>()[o] : T(0);
        const T* values = result.data() + o * kTile;
        if (!channels_last) {
          std::transform(
              values, values + count, target + o * positions + first, [=](T value) { return value + shift; });
          continue;
        }
        for (int64_t t = 0; t < count; ++t) {
          target[(first + t) * s.out_channels + o] = values[t] + shift;
        }
      }
    }
  });
  return output.to(input.scalar_type());
}

// The backward of a block of input channels, image by image.
template <typename T>
struct BackwardUnit {
  static constexpr int64_t kTile = 256;

  const Stencils<T>& stencils;
  const T* input;         // [N, C, H, W]
  const T* attention;     // [N, K, P] or null
  const T* grad_columns;  // [N, tiles, O, 64]
  const T* grad_rows;     // [N, P, O], in dense blocks of at most kTile positions and 64 channels of one group
  const T* filter;        // [groups, C / groups * K, O / groups]
  T* grad_input;          // [N, C, H, W] or null
  T* grad_window;         // [C, K, cells] or null
  T* grad_attention;      // [N, K, P] or null
  T* grad_filter;         // like filter, or null

  void run(const Panel& block) const {
    const KernelEvolutionConv2dSizes& s = stencils.s;
    const int64_t locations = s.locations, positions = s.positions(), map = s.height * s.width;
    const int64_t rows = block.width * locations, plane = stencils.plane_size();
    const int64_t g = block.first / s.group_in(), shift = block.first * locations * s.group_out();
    const bool needs_grad = grad_input || grad_window || grad_attention, needs_values = grad_attention || grad_filter;
    std::vector<T> planes(block.width * plane), grad_planes(grad_input ? block.width * plane : 0);
    std::vector<T> grad(needs_grad ? rows * kTile : 0), values(needs_values ? rows * kTile + kBlock : 0);
    std::vector<T> score(attention ? locations * kTile : 0), scratch(kTile + 2 * s.window_w + kBlock);
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t c = 0; c < block.width; ++c) {
        stencils.template pad<false>(input + (n * s.in_channels + block.first + c) * map, planes.data() + c * plane);
      }
      std::fill(grad_planes.begin(), grad_planes.end(), T(0));
      for (int64_t first = 0; first < positions; first += kTile) {
        const int64_t count = std::min(kTile, positions - first);
        const std::vector<Run> runs = runs_of(s, first, count);
        if (attention) {
          copy_attention(
              attention + n * locations * positions, locations, positions, first, count, kTile, score.data());
        }
        if (needs_grad) {
          column_gradient(n, g, first, count, rows, filter + shift, grad.data());
        }
        if (needs_values) {
          sample_columns<T>(stencils, planes.data(), block.first, block.end(), runs, nullptr, kTile, values.data());
        }
        if (grad_attention) {
          for (int64_t j = 0; j < rows; ++j) {
            multiply_rows(
                grad.data() + j * kTile, values.data() + j * kTile, count, true,
                grad_attention + (n * locations + j % locations) * positions + first);
          }
        }
        if (attention) {
          for (int64_t j = 0; j < rows; ++j) {
            const T* scores = score.data() + j % locations * kTile;
            for (std::vector<T>* of : {&grad, &values}) {
              if (!of->empty()) {
                multiply_rows(of->data() + j * kTile, scores, count, false, of->data() + j * kTile);
              }
            }
          }
        }
        if (grad_filter) {
          filter_gradient(n, g, first, count, rows, values.data(), grad_filter + shift);
        }
        if (grad_window || grad_input) {
          backward_columns(
              stencils, planes.data(), block.first, block.end(), runs, grad.data(), kTile, scratch.data(),
              grad_window ? grad_window + block.first * locations * s.cells() : nullptr,
              grad_input ? grad_planes.data() : nullptr);
        }
      }
      for (int64_t c = 0; grad_input && c < block.width; ++c) {
        stencils.template pad<true>(
            grad_input + (n * s.in_channels + block.first + c) * map, grad_planes.data() + c * plane);
      }
    }
  }

  void column_gradient(
      int64_t n, int64_t g, int64_t first, int64_t count, int64_t rows, const T* weights, T* grad) const {
    const KernelEvolutionConv2dSizes& s = stencils.s;
    const int64_t panels = (s.positions() + kPanel - 1) / kPanel;
    for (int64_t at = 0; at < count; at += kPanel) {
      const T* part =
          grad_columns + ((n * panels + (first + at) / kPanel) * s.out_channels + g * s.group_out()) * kPanel;
      if (s.group_out() > 1) {
        gemm(rows, kPanel, s.group_out(), weights, s.group_out(), part, kPanel, grad + at, kTile, false);
        continue;
      }
      for (int64_t j = 0; j < rows; ++j) {
        multiply_row(part, weights[j], kPanel, false, grad + j * kTile + at);
      }
    }
  }

  void filter_gradient(
      int64_t n, int64_t g, int64_t first, int64_t count, int64_t rows, const T* values, T* grad) const {
    const KernelEvolutionConv2dSizes& s = stencils.s;
    const int64_t group_out = s.group_out();
    const T* part = grad_rows + (n * s.positions() + first) * s.out_channels + g * group_out * count;
    if (group_out == 1) {
      for (int64_t j = 0; j < rows; ++j) {
        grad[j] += dot_rows(values + j * kTile, part, count);
      }
      return;
    }
    for (int64_t o = 0; o < group_out; o += kPanel) {
      const int64_t width = std::min(kPanel, group_out - o);
      gemm(rows, width, count, values, kTile, part + o * count, width, grad + o, group_out, true);
    }
  }
};

template <typename T>
KernelEvolutionConv2dGradients backward(
    const KernelEvolutionConv2dSizes& s,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& origin,
    const at::Tensor& window,
    const std::optional<at::Tensor>& attention,
    const at::Tensor& weight,
    std::array<bool, 5> wanted) {
  const auto options = input.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t locations = s.locations, positions = s.positions(), group_out = s.group_out();
  const at::Tensor x = widen<T>(input, at::MemoryFormat::Contiguous);
  const at::Tensor from = widen<T>(origin, at::MemoryFormat::Contiguous);
  const at::Tensor cells = widen<T>(window, at::MemoryFormat::Contiguous);
  const at::Tensor scores = attention ? widen<T>(*attention, at::MemoryFormat::Contiguous) : at::Tensor();
  const at::Tensor grad = widen<T>(grad_output, at::MemoryFormat::Contiguous);
  const at::Tensor filter = widen<T>(weight, at::MemoryFormat::Contiguous)
                                .view({s.groups, group_out, s.group_in() * locations})
                                .transpose(1, 2)
                                .contiguous();
  const Stencils<T> stencils(s, from.const_data_ptr<T>(), cells.const_data_ptr<T>());

  // The output's gradient in the two forms in which matrix products take it.
  constexpr int64_t kTile = BackwardUnit<T>::kTile;
  const int64_t panels = (positions + kPanel - 1) / kPanel;
  at::Tensor columns = at::zeros({s.batch, panels, s.out_channels, kPanel}, options);
  at::Tensor rows = at::empty({wanted[3] ? s.batch : 0, positions, s.out_channels}, options);
  at::parallel_for(0, s.batch * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % panels * kPanel, count = std::min(kPanel, positions - first);
      const T* image = grad.const_data_ptr<T>() + unit / panels * s.out_channels * positions + first;
      for (int64_t o = 0; o < s.out_channels; ++o) {
        std::copy_n(image + o * positions, count, columns.mutable_data_ptr<T>() + (unit * s.out_channels + o) * kPanel);
      }
    }
  });
  const int64_t tiles = (positions + kTile - 1) / kTile;
  at::parallel_for(0, wanted[3] ? s.batch * tiles : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / tiles, first = unit % tiles * kTile, count = std::min(kTile, positions - first);
      const T* image = grad.const_data_ptr<T>() + n * s.out_channels * positions + first;
      T* block = rows.mutable_data_ptr<T>() + (n * positions + first) * s.out_channels;
      for (int64_t g = 0; g < s.groups; ++g, block += group_out * count, image += group_out * positions) {
        pack_panels(image, count, group_out, 1, positions, block);
      }
    }
  });

  const std::vector<Panel> blocks = channel_blocks(s, 8);
  const int64_t slices = std::min<int64_t>(blocks.size(), at::get_num_threads());
  at::Tensor grad_x = wanted[0] ? at::empty_like(x) : at::Tensor();
  at::Tensor grad_window = wanted[1] ? at::zeros_like(cells) : at::Tensor();
  at::Tensor grad_scores =
      wanted[2] ? at::zeros({slices, s.batch, locations, s.out_h, s.out_w}, options) : at::Tensor();
  at::Tensor grad_filter = wanted[3] ? at::zeros_like(filter) : at::Tensor();
  const auto data = [](at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr; };
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const BackwardUnit<T> unit{
          stencils,
          x.const_data_ptr<T>(),
          attention ? scores.const_data_ptr<T>() : nullptr,
          columns.const_data_ptr<T>(),
          rows.const_data_ptr<T>(),
          filter.const_data_ptr<T>(),
          data(grad_x),
          data(grad_window),
          wanted[2] ? data(grad_scores) + slice * s.batch * locations * positions : nullptr,
          data(grad_filter)};
      const int64_t number = blocks.size();
      for (int64_t i = number * slice / slices; i < number * (slice + 1) / slices; ++i) {
        unit.run(blocks[i]);
      }
    }
  });

  KernelEvolutionConv2dGradients result = no_gradients(input);
  if (wanted[0]) {
    std::get<0>(result) = grad_x.to(input.scalar_type()).contiguous(input.suggest_memory_format());
  }
  if (wanted[1]) {
    std::get<1>(result) = grad_window.to(window.scalar_type());
  }
  if (wanted[2]) {
    std::get<2>(result) = grad_scores.sum(0).to(attention->scalar_type());
  }
  if (wanted[3]) {
    std::get<3>(result) = at::empty(weight.sizes(), weight.options());
    std::get<3>(result).view({s.groups, group_out, s.group_in() * locations}).copy_(grad_filter.transpose(1, 2));
  }
  if (wanted[4]) {
    std::get<4>(result) = grad.sum({0, 2, 3}).to(weight.scalar_type());
  }
  return result;
}

at::Tensor kernel_evolution_conv2d_cpu(
    const at::Tensor& input,
    const at::Tensor& origin,
    const at::Tensor& window,
    const std::optional<at::Tensor>& attention,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const auto s = check_kernel_evolution_conv2d(
      input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation);
  return input.scalar_type() == at::kDouble ? forward<double>(s, input, origin, window, attention, weight, bias)
                                            : forward<float>(s, input, origin, window, attention, weight, bias);
}

KernelEvolutionConv2dGradients kernel_evolution_conv2d_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& origin,
    const at::Tensor& window,
    const std::optional<at::Tensor>& attention,
    const at::Tensor& weight,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    std::array<bool, 5> output_mask) {
  const auto s = check_kernel_evolution_conv2d(
      input, origin, window, attention, weight, std::nullopt, kernel_size, stride, padding, dilation);
  check_kernel_evolution_conv2d_grad(grad_output, input, attention, s, output_mask);
  return input.scalar_type() == at::kDouble
             ? backward<double>(s, grad_output, input, origin, window, attention, weight, output_mask)
             : backward<float>(s, grad_output, input, origin, window, attention, weight, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("kernel_evolution_conv2d", &dk::kernel_evolution_conv2d_cpu);
  m.impl("kernel_evolution_conv2d_backward", &dk::kernel_evolution_conv2d_backward_cpu);
}
