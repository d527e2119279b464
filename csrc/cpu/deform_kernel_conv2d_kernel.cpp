// Host kernels of deform_kernel_conv2d.
//
// Everything runs in float (double for double): half types are widened on entry and rounded once at the end; but where
// the processor multiplies bfloat16 matrices, the columns of the forward are rounded, too. The input
// is channels-last. For each output position and tap two bilinear set-ups, where the tap looks on the map and which
// cells of the scope it takes its value from, are computed once and serve all channels of their groups.
//
// A depthwise filter is applied as it is resampled, without columns. For the others the identity
//     sum_k x[k] * (sum_s B[k, s] W[s]) = sum_s W[s] * (sum_k B[k, s] x[k])
// turns the resampling around: the taps are scattered into one column per cell of the scope, and the filter follows as
// a matrix product. Columns exist for one tile of positions and one panel of channels at a time and stay in cache.
//
// The backward gives every thread a slice of the channels: it alone writes that slice of the input's and the weight's
// gradient, so no atomics are needed and the result does not depend on timing; only the gradients of offsets and mask
// are sums over slices, taken in a fixed order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/panels.h"
#include "ops/deform_kernel_conv2d.h"

namespace dk {

namespace {

// Where a tap looks on the map, for all channels of a data offset group.
template <typename T>
struct DataSample {
  Corners<T> corners;
  T mask;
  T weight[4];  // corner weights times mask; zero outside, so that 0 * infinity cannot spread from a mask
  bool on_map;
};

// Which cells of the scope a tap takes its value from, for all channels of a kernel offset group. Cells outside are
// number `cells`: a row of zeros where cells are read, a row that nobody reads where they are written.
template <typename T>
struct ScopeSample {
  ClippedCorners<T> corners;
  int64_t cell[4];
  T weight[4];
};

template <typename T>
struct Problem {
  DeformKernelConv2dSizes s;
  const T* input;          // [N, H, W, C]
  const T* kernel_offset;  // [N, G, K, 2, P]
  const T* offset;         // [N, D, K, 2, P] or null
  const T* mask;           // [N, D, K, P] or null

  const T* image(int64_t n) const { return input + n * s.height * s.width * s.in_channels; }

  // Fills samples[count, taps] for the output positions from `first` on.
  void look_at_data(int64_t n, int64_t d, int64_t first, int64_t count, DataSample<T>* samples) const {
    const int64_t positions = s.positions();
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const int64_t row = (n * s.offset_groups + d) * s.taps() + tap;
      const T* dy = offset ? offset + row * 2 * positions + first : nullptr;
      const T* dx = offset ? dy + positions : nullptr;
      const T* m = mask ? mask + row * positions + first : nullptr;
      int64_t oh = first / s.out_w, ow = first % s.out_w;
      for (int64_t t = 0; t < count; ++t) {
        DataSample<T>& sample = samples[t * s.taps() + tap];
        sample.corners = data_corners(s, oh, ow, tap, dy ? dy + t : nullptr, dx ? dx + t : nullptr);
        sample.mask = m ? m[t] : T(1);
        sample.on_map = false;
        for (int k = 0; k < 4; ++k) {
          const bool inside = sample.corners.index[k] >= 0;
          sample.weight[k] = inside ? sample.corners.weight[k] * sample.mask : T(0);
          sample.on_map |= inside;
        }
        if (++ow == s.out_w) {
          ow = 0;
          ++oh;
        }
      }
    }
  }

  void look_at_scope(int64_t n, int64_t g, int64_t first, int64_t count, ScopeSample<T>* samples) const {
    const int64_t positions = s.positions();
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const T* dy = kernel_offset + ((n * s.kernel_offset_groups + g) * s.taps() + tap) * 2 * positions + first;
      const T* dx = dy + positions;
      for (int64_t t = 0; t < count; ++t) {
        ScopeSample<T>& sample = samples[t * s.taps() + tap];
        sample.corners = scope_corners(s, tap, dy[t], dx[t]);
        for (int k = 0; k < 4; ++k) {
          const bool inside = sample.corners.index[k] >= 0;
          sample.cell[k] = inside ? sample.corners.index[k] : s.cells();
          sample.weight[k] = inside ? sample.corners.weight[k] : T(0);
        }
      }
    }
  }
};

// The groups a panel of channels touches: [low, high).
struct GroupRange {
  int64_t low = 0, high = 0;

  GroupRange() = default;
  GroupRange(const Panel& panel, int64_t group_channels)
      : low(panel.first / group_channels), high((panel.end() - 1) / group_channels + 1) {}
  bool operator==(const GroupRange& other) const { return low == other.low && high == other.high; }
  int64_t size() const { return high - low; }
};

// The samples of one tile of output positions for the groups of one panel of channels. What the next panel shares with
// the last one is not computed again.
template <typename T>
class Plan {
 public:
  explicit Plan(const Problem<T>& problem) : p_(problem) {}

  void start_tile(int64_t n, int64_t first, int64_t count) {
    n_ = n, first_ = first, count_ = count;
    data_groups = scope_groups = GroupRange();
  }

  void prepare(const Panel& panel) {
    const GroupRange data(panel, p_.s.offset_group_channels());
    if (!(data == data_groups)) {
      data_groups = data;
      data_.resize(data.size() * count_ * p_.s.taps());
      for (int64_t d = data.low; d < data.high; ++d) {
        p_.look_at_data(n_, d, first_, count_, data_.data() + index(d - data.low, 0));
      }
    }
    const GroupRange scope(panel, p_.s.kernel_offset_group_channels());
    if (!(scope == scope_groups)) {
      scope_groups = scope;
      scope_.resize(scope.size() * count_ * p_.s.taps());
      for (int64_t g = scope.low; g < scope.high; ++g) {
        p_.look_at_scope(n_, g, first_, count_, scope_.data() + index(g - scope.low, 0));
      }
    }
  }

  // The taps of group `i` of the range at position t of the tile are at index(i, t) and the `taps` that follow.
  int64_t index(int64_t i, int64_t t) const { return (i * count_ + t) * p_.s.taps(); }
  const DataSample<T>* data(int64_t i, int64_t t) const { return data_.data() + index(i, t); }
  const ScopeSample<T>* scope(int64_t i, int64_t t) const { return scope_.data() + index(i, t); }

  // Calls body(first channel, width, i, j) for the runs of a panel's channels that share data offset group i and kernel
  // offset group j, counted from the beginning of the panel's ranges.
  template <typename Body>
  void each_run(const Panel& panel, const Body& body) const {
    const int64_t per_data = p_.s.offset_group_channels(), per_scope = p_.s.kernel_offset_group_channels();
    for (int64_t c = panel.first; c < panel.end();) {
      const int64_t d = c / per_data, g = c / per_scope;
      const int64_t width = std::min({panel.end(), (d + 1) * per_data, (g + 1) * per_scope}) - c;
      body(c, width, d - data_groups.low, g - scope_groups.low);
      c += width;
    }
  }

  GroupRange data_groups, scope_groups;

 private:
  const Problem<T>& p_;
  int64_t n_ = 0, first_ = 0, count_ = 0;
  std::vector<DataSample<T>> data_;
  std::vector<ScopeSample<T>> scope_;
};

// Rows of channels the loops below read where a corner lies outside, and write where nobody looks.
template <typename T>
struct Margin {
  T zeros[kPanel] = {};
  T scratch[kPanel] = {};
};

template <typename T>
void corner_rows(const T* image, int64_t pixel_stride, const DataSample<T>& sample, const T* zeros, const T* rows[4]) {
  for (int k = 0; k < 4; ++k) {
    const int64_t index = sample.corners.index[k];
    rows[k] = index < 0 ? zeros : image + index * pixel_stride;
  }
}

// What the forward of output positions reads, from the first channel of a run on.
template <typename T>
struct ForwardRun {
  const T* image;
  int64_t pixel_stride;
  const T* filter;  // [cells + 1]; depthwise only
  int64_t cell_stride;
  const T* zeros;
  int64_t taps;
};

// What the backward of output positions reads and writes, a run of channels wide.
template <typename T>
struct BackwardRun {
  const T* image;
  T* grad_image;  // null: not wanted
  int64_t pixel_stride;
  const T* grad_output;  // depthwise only: rows of the output's gradient
  int64_t grad_stride;
  const T* cell_source;  // [cells + 1]: the filter if depthwise, else the gradient of the columns, row_stride apart
  T* cell_target;        // [cells + 1]: the filter's gradient if depthwise, else the columns, row_stride apart
  int64_t cell_stride;
  int64_t row_stride;  // from one position to the next
  int64_t width, taps;
  T* data_dots;   // [positions, taps, 4] += sum over channels of gradient * corner
  T* scope_dots;  // [positions, taps, 4] += sum over channels of gradient * cell
};

}  // namespace

#define DK_VECTOR_FILE "cpu/deform_kernel_conv2d_vectors.h"
#include "cpu/for_each_vector.h"

namespace {

// Output positions of a tile. Depthwise they only share the set-up of their samples. Otherwise they are the rows of
// matrix products, as many as keep a panel of columns inside a quarter megabyte.
int64_t tile_positions(const DeformKernelConv2dSizes& s) {
  constexpr int64_t kCacheFloats = 64 * 1024;
  const int64_t positions = std::max<int64_t>(s.positions(), 1);
  int64_t tile = s.depthwise() ? 64 : std::clamp<int64_t>(kCacheFloats / (s.cells() * kPanel), 16, 128);
  // Four tiles a thread even out threads that start late.
  tile = std::min(tile, std::max<int64_t>(16, positions * s.batch / (4 * at::get_num_threads())));
  return even_tile(positions, tile);
}

// The tensors of a call, widened, and the problem on them.
template <typename T>
struct Arguments {
  at::Tensor input, kernel_offset, offset, mask;
  Problem<T> problem;

  Arguments(
      const DeformKernelConv2dSizes& s,
      const at::Tensor& x,
      const at::Tensor& ko,
      const std::optional<at::Tensor>& o,
      const std::optional<at::Tensor>& m)
      : input(channels_last_map<T>(x)),
        kernel_offset(widen<T>(ko, at::MemoryFormat::Contiguous)),
        offset(o ? widen<T>(*o, at::MemoryFormat::Contiguous) : at::Tensor()),
        mask(m ? widen<T>(*m, at::MemoryFormat::Contiguous) : at::Tensor()),
        problem{
            s, input.const_data_ptr<T>(), kernel_offset.const_data_ptr<T>(), o ? offset.const_data_ptr<T>() : nullptr,
            m ? mask.const_data_ptr<T>() : nullptr} {}
};

// A depthwise filter is kept as [cells + 1, width] for each panel, the last row zero. Where channel c of a panel
// begins:
int64_t depthwise_cell(const DeformKernelConv2dSizes& s, const Panel& panel, int64_t c) {
  return panel.first * (s.cells() + 1) + c - panel.first;
}

// Calls body(channel, cell, index in the filter as it is kept).
template <typename Body>
void each_depthwise_value(const DeformKernelConv2dSizes& s, const Body& body) {
  for (const Panel& panel : channel_panels(s.in_channels, 1)) {
    for (int64_t c = panel.first; c < panel.end(); ++c) {
      for (int64_t cell = 0; cell < s.cells(); ++cell) {
        body(c, cell, depthwise_cell(s, panel, c) + cell * panel.width);
      }
    }
  }
}

template <typename T>
std::vector<T> depthwise_filter(const DeformKernelConv2dSizes& s, const at::Tensor& weight) {
  std::vector<T> filter((s.cells() + 1) * s.in_channels);
  const T* w = weight.const_data_ptr<T>();
  each_depthwise_value(s, [&](int64_t c, int64_t cell, int64_t at) { filter[at] = w[c * s.cells() + cell]; });
  return filter;
}

// Rows of a weight group's columns are ordered (part of a panel, cell, channel of the part): each part is a dense
// matrix. The group's `channels` are cut as channel_panels cuts them; body(first channel, width).
template <typename Body>
void each_part_of_group(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kPanel) {
    body(c, std::min(kPanel, channels - c));
  }
}

// `Stored` is the type of the output and of what is multiplied: T, or bfloat16 where the processor multiplies it.
template <typename T, typename Stored>
at::Tensor forward(
    const DeformKernelConv2dSizes& s,
    const at::Tensor& input,
    const at::Tensor& kernel_offset,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias) {
  const auto format = input.suggest_memory_format();
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  const auto stored = c10::CppTypeToScalarType<Stored>::value;
  at::Tensor output = at::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.options().dtype(stored), format);
  if (s.batch == 0) {
    return output.to(input.scalar_type());
  }
  const Arguments<T> arguments(s, input, kernel_offset, offset, mask);
  const Problem<T>& problem = arguments.problem;
  const at::Tensor w = widen<T>(weight, at::MemoryFormat::Contiguous);
  const at::Tensor b = bias ? widen<T>(*bias, at::MemoryFormat::Contiguous) : at::Tensor();
  const T* bias_data = bias ? b.const_data_ptr<T>() : nullptr;
  Stored* out = output.mutable_data_ptr<Stored>();

  const int64_t channels = s.in_channels, positions = s.positions(), cells = s.cells(), taps = s.taps();
  const int64_t group_in = s.group_in(), group_out = s.group_out(), group_rows = cells * group_in;
  std::vector<T> filter;       // depthwise
  std::vector<Stored> packed;  // else: [cells * C / groups, O / groups] per group, in panels
  if (s.depthwise()) {
    filter = depthwise_filter<T>(s, w);
  } else {
    const at::Tensor by_group = w.view({s.groups, group_out, group_in, cells});
    std::vector<at::Tensor> parts;
    each_part_of_group(group_in, [&](int64_t c, int64_t width) {
      parts.push_back(by_group.narrow(2, c, width).permute({0, 3, 2, 1}).flatten(1, 2));
    });
    const at::Tensor rows = at::cat(parts, 1);  // [groups, cells * C / groups, O / groups]
    packed.resize(rows.numel());
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t shift = g * group_rows * group_out;
      pack_panels(rows.const_data_ptr<T>() + shift, group_rows, group_out, group_out, 1, packed.data() + shift);
    }
  }
  const std::vector<Panel> panels = channel_panels(channels, group_in);
  const int64_t tile = tile_positions(s), tiles = (positions + tile - 1) / tile;
  const int64_t column_size = (cells + 1) * kPanel;

  const auto rows = s.depthwise() ? (offset ? DK_BEST(depthwise_rows<T, true>) : DK_BEST(depthwise_rows<T, false>))
                                  : (offset ? DK_BEST(scatter_rows<T, true>) : DK_BEST(scatter_rows<T, false>));

  const auto narrow_row = DK_BEST(shift_row<T, Stored>);
  at::parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    Plan<T> plan(problem);
    const Margin<T> margin;
    std::vector<T> columns(s.depthwise() ? 0 : tile * column_size), result(tile * s.out_channels);
    std::vector<Stored> narrowed(std::is_same_v<T, Stored> ? 0 : columns.size());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / tiles, first = unit % tiles * tile, count = std::min(tile, positions - first);
      plan.start_tile(n, first, count);
      for (const Panel& panel : panels) {
        plan.prepare(panel);
        if (!s.depthwise()) {
          std::fill_n(columns.data(), count * column_size, T(0));
        }
        // Columns of a panel are [count, cells + 1, panel width]: dense but for the last row of each position.
        const int64_t row_size = (cells + 1) * panel.width;
        plan.each_run(panel, [&](int64_t c, int64_t width, int64_t i, int64_t j) {
          const bool depthwise = s.depthwise();
          const T* cells_of_run = depthwise ? filter.data() + depthwise_cell(s, panel, c) : nullptr;
          rows(
              {problem.image(n) + c, channels, cells_of_run, panel.width, margin.zeros, taps}, plan.data(i, 0),
              plan.scope(j, 0), count, width, (depthwise ? result.data() : columns.data()) + c - panel.first,
              depthwise ? panel.width : row_size);
        });
        if (s.depthwise()) {
          store_tile(
              result.data(), bias_data ? bias_data + panel.first : nullptr, count, panel.width, channels, positions,
              channels_last, first, out + n * channels * positions + panel.first * (channels_last ? 1 : positions));
          continue;
        }
        const Stored* multiplied;
        if constexpr (std::is_same_v<T, Stored>) {
          multiplied = columns.data();
        } else {
          narrow_row(columns.data(), nullptr, count * row_size, narrowed.data());
          multiplied = narrowed.data();
        }
        each_part(panel, group_in, [&](int64_t c, int64_t width, int64_t g) {
          const Stored* a = multiplied + c - panel.first;
          const Stored* matrix = packed.data() + g * group_rows * group_out;
          const int64_t row = c % group_in * cells;
          T* to = result.data() + g * group_out;
          if (width == panel.width) {  // the part is the panel: its cells lie side by side
            gemm_packed(
                count, group_out, group_rows, row, cells * width, a, row_size, matrix, to, s.out_channels, row > 0);
            return;
          }
          for (int64_t cell = 0; cell < cells; ++cell) {
            gemm_packed(
                count, group_out, group_rows, row + cell * width, width, a + cell * panel.width, row_size, matrix, to,
                s.out_channels, cell > 0);
          }
        });
      }
      if (!s.depthwise()) {
        store_tile(
            result.data(), bias_data, count, s.out_channels, s.out_channels, positions, channels_last, first,
            out + n * s.out_channels * positions);
      }
    }
    release_gemm<Stored>();
  });
  return output.to(input.scalar_type());
}

// The backward of one image and one slice of the channels.
template <typename T>
struct BackwardUnit {
  const Problem<T>& problem;
  const T* grad_rows;     // [P, O] of this image
  const T* grad_columns;  // [O, P] of this image; not depthwise
  const T* filter;  // as depthwise_filter keeps it if depthwise, else blocks [O / groups, width] by (group, part, cell)
  T* grad_image;    // [H, W, C] of this image or null
  T* grad_filter;   // like filter
  T* grad_kernel_offset;  // [G, K, 2, P]: y, x; this slice's share
  T* grad_data;           // [D, K, 3, P]: y, x, mask; this slice's share

  void run(int64_t n, const Panel* begin, const Panel* end, int64_t tile) const {
    const DeformKernelConv2dSizes& s = problem.s;
    const int64_t positions = s.positions(), channels = s.in_channels, row_size = (s.cells() + 1) * kPanel;
    const bool depthwise = s.depthwise();
    const auto rows = depthwise ? choose_rows<true>() : choose_rows<false>();
    Plan<T> plan(problem);
    Margin<T> margin;
    std::vector<T> data_dots, scope_dots;
    // [tile, cells + 1, kPanel] both; the last row of the gradient stays zero.
    std::vector<T> gradient(depthwise ? 0 : tile * row_size), columns(depthwise ? 0 : tile * row_size);
    for (int64_t first = 0; first < positions; first += tile) {
      const int64_t count = std::min(tile, positions - first);
      plan.start_tile(n, first, count);
      for (const Panel* panel = begin; panel != end; ++panel) {
        plan.prepare(*panel);
        data_dots.assign(plan.data_groups.size() * count * s.taps() * 4, T(0));
        scope_dots.assign(plan.scope_groups.size() * count * s.taps() * 4, T(0));
        if (!depthwise) {
          std::fill_n(columns.data(), count * row_size, T(0));
          column_gradient(*panel, first, count, gradient.data());
        }
        plan.each_run(*panel, [&](int64_t c, int64_t width, int64_t i, int64_t j) {
          const int64_t cell = depthwise ? depthwise_cell(s, *panel, c) : c - panel->first;
          const BackwardRun<T> run{
              problem.image(n) + c,
              grad_image ? grad_image + c : nullptr,
              channels,
              grad_rows + first * s.out_channels + c,
              s.out_channels,
              (depthwise ? filter : gradient.data()) + cell,
              (depthwise ? grad_filter : columns.data()) + cell,
              depthwise ? panel->width : kPanel,
              depthwise ? 0 : row_size,
              width,
              s.taps(),
              data_dots.data() + 4 * plan.index(i, 0),
              scope_dots.data() + 4 * plan.index(j, 0)};
          rows(run, plan.data(i, 0), plan.scope(j, 0), count, margin);
        });
        if (!depthwise) {
          filter_gradient(*panel, first, count, columns.data());
        }
        add_kernel_offset_gradient(plan, first, count, scope_dots.data());
        if (grad_data) {
          add_data_gradient(plan, first, count, data_dots.data());
        }
      }
    }
  }

  template <bool kDepthwise>
  auto choose_rows() const {
    const bool moved = problem.offset, data_dots = grad_data;
    return moved ? (data_dots ? DK_BEST(backward_rows<T, true, kDepthwise, true>)
                              : DK_BEST(backward_rows<T, true, kDepthwise, false>))
                 : (data_dots ? DK_BEST(backward_rows<T, false, kDepthwise, true>)
                              : DK_BEST(backward_rows<T, false, kDepthwise, false>));
  }

  // Start of the dense [O / groups, width] block of the filter for one cell and the part of a panel from channel c on.
  int64_t block(int64_t c, int64_t width, int64_t cell) const {
    return (c * problem.s.cells() + cell * width) * problem.s.group_out();
  }

  void column_gradient(const Panel& panel, int64_t first, int64_t count, T* gradient) const {
    const DeformKernelConv2dSizes& s = problem.s;
    each_part(panel, s.group_in(), [&](int64_t c, int64_t width, int64_t g) {
      for (int64_t cell = 0; cell < s.cells(); ++cell) {
        gemm(
            count, width, s.group_out(), grad_rows + first * s.out_channels + g * s.group_out(), s.out_channels,
            filter + block(c, width, cell), width, gradient + cell * kPanel + c - panel.first, (s.cells() + 1) * kPanel,
            false);
      }
    });
  }

  void filter_gradient(const Panel& panel, int64_t first, int64_t count, const T* columns) const {
    const DeformKernelConv2dSizes& s = problem.s;
    each_part(panel, s.group_in(), [&](int64_t c, int64_t width, int64_t g) {
      for (int64_t cell = 0; cell < s.cells(); ++cell) {
        gemm(
            s.group_out(), width, count, grad_columns + g * s.group_out() * s.positions() + first, s.positions(),
            columns + cell * kPanel + c - panel.first, (s.cells() + 1) * kPanel, grad_filter + block(c, width, cell),
            width, true);
      }
    });
  }

  void add_kernel_offset_gradient(const Plan<T>& plan, int64_t first, int64_t count, const T* dots) const {
    const int64_t taps = problem.s.taps(), positions = problem.s.positions();
    for (int64_t i = 0; i < plan.scope_groups.size(); ++i) {
      T* y = grad_kernel_offset + (plan.scope_groups.low + i) * taps * 2 * positions + first;
      for (int64_t tap = 0; tap < taps; ++tap, y += 2 * positions) {
        for (int64_t t = 0; t < count; ++t) {
          const ClippedCorners<T>& corners = plan.scope(i, t)[tap].corners;
          const T* dot = dots + 4 * (plan.index(i, t) + tap);
          y[t] += corners.free_y ? bilinear_grad_y(corners, dot) : T(0);
          y[t + positions] += corners.free_x ? bilinear_grad_x(corners, dot) : T(0);
        }
      }
    }
  }

  void add_data_gradient(const Plan<T>& plan, int64_t first, int64_t count, const T* dots) const {
    const int64_t taps = problem.s.taps(), positions = problem.s.positions();
    for (int64_t i = 0; i < plan.data_groups.size(); ++i) {
      T* y = grad_data + (plan.data_groups.low + i) * taps * 3 * positions + first;
      for (int64_t tap = 0; tap < taps; ++tap, y += 3 * positions) {
        for (int64_t t = 0; t < count; ++t) {
          const DataSample<T>& sample = plan.data(i, t)[tap];
          const T* dot = dots + 4 * (plan.index(i, t) + tap);
          const T* weight = sample.corners.weight;
          y[t] += sample.mask * bilinear_grad_y(sample.corners, dot);
          y[t + positions] += sample.mask * bilinear_grad_x(sample.corners, dot);
          y[t + 2 * positions] += weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3];
        }
      }
    }
  }
};

template <typename T>
DeformKernelConv2dGradients backward(
    const DeformKernelConv2dSizes& s,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& kernel_offset,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    std::array<bool, 6> wanted) {
  const auto options = input.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t taps = s.taps(), cells = s.cells(), channels = s.in_channels, positions = s.positions();
  const int64_t group_in = s.group_in(), group_out = s.group_out();
  const Arguments<T> arguments(s, input, kernel_offset, offset, mask);
  const at::Tensor grad_rows = channels_last_map<T>(grad_output);
  const at::Tensor grad_columns = s.depthwise() ? grad_rows : widen<T>(grad_output, at::MemoryFormat::Contiguous);

  const std::vector<Panel> panels = channel_panels(channels, group_in);
  const int64_t threads = at::get_num_threads();
  const int64_t slices = std::min<int64_t>(panels.size(), threads);
  const int64_t blocks = std::max<int64_t>(1, std::min(s.batch, (threads + slices - 1) / slices));  // of images

  const at::Tensor w = widen<T>(weight, at::MemoryFormat::Contiguous);
  std::vector<T> filter;
  if (s.depthwise()) {
    filter = depthwise_filter<T>(s, w);
  } else {
    const at::Tensor by_group = w.view({s.groups, group_out, group_in, cells});
    std::vector<at::Tensor> parts;
    each_part_of_group(group_in, [&](int64_t c, int64_t width) {
      parts.push_back(by_group.narrow(2, c, width).permute({0, 3, 1, 2}).flatten(1));  // [groups, cells * O * width]
    });
    const at::Tensor blocks = at::cat(parts, 1);
    filter.assign(blocks.const_data_ptr<T>(), blocks.const_data_ptr<T>() + blocks.numel());
  }
  const int64_t filter_size = filter.size();

  at::Tensor grad_x = wanted[0] ? at::zeros_like(arguments.input) : at::Tensor();
  const bool wants_data = wanted[2] || wanted[3];
  at::Tensor grad_kernel = at::zeros({slices, s.batch, s.kernel_offset_groups, taps, 2, positions}, options);
  at::Tensor grad_data = at::zeros({slices, s.batch, wants_data ? s.offset_groups : 0, taps, 3, positions}, options);
  at::Tensor grad_filter = at::zeros({blocks, filter_size}, options);
  const int64_t image_size = s.height * s.width * channels, grad_size = s.out_channels * positions;
  const int64_t kernel_size = s.kernel_offset_groups * taps * 2 * positions;
  const int64_t data_size = s.offset_groups * taps * 3 * positions;
  const int64_t tile = std::min(tile_positions(s), positions);
  at::parallel_for(0, slices * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t slice = unit % slices, block = unit / slices;
      const Panel* first = panels.data() + panels.size() * slice / slices;
      const Panel* last = panels.data() + panels.size() * (slice + 1) / slices;
      for (int64_t n = s.batch * block / blocks; n < s.batch * (block + 1) / blocks; ++n) {
        BackwardUnit<T>{
            arguments.problem,
            grad_rows.const_data_ptr<T>() + n * grad_size,
            grad_columns.const_data_ptr<T>() + n * grad_size,
            filter.data(),
            wanted[0] ? grad_x.mutable_data_ptr<T>() + n * image_size : nullptr,
            grad_filter.mutable_data_ptr<T>() + block * filter_size,
            grad_kernel.mutable_data_ptr<T>() + (slice * s.batch + n) * kernel_size,
            wants_data ? grad_data.mutable_data_ptr<T>() + (slice * s.batch + n) * data_size : nullptr,
        }
            .run(n, first, last, tile);
      }
    }
  });

  DeformKernelConv2dGradients result = no_kernel_gradients(input);
  if (wanted[0]) {
    std::get<0>(result) = map_like<T>(grad_x, input);
  }
  if (wanted[1]) {
    std::get<1>(result) = at::empty(kernel_offset.sizes(), kernel_offset.options());
    std::get<1>(result).view({s.batch, s.kernel_offset_groups, taps, 2, positions}).copy_(grad_kernel.sum(0));
  }
  if (wants_data) {
    const at::Tensor sum = grad_data.sum(0);
    if (wanted[2]) {
      std::get<2>(result) = at::empty(offset->sizes(), offset->options());
      std::get<2>(result).view({s.batch, s.offset_groups, taps, 2, positions}).copy_(sum.narrow(3, 0, 2));
    }
    if (wanted[3]) {
      std::get<3>(result) = at::empty(mask->sizes(), mask->options());
      std::get<3>(result).view({s.batch, s.offset_groups, taps, positions}).copy_(sum.select(3, 2));
    }
  }
  if (wanted[4]) {
    const at::Tensor sum = grad_filter.sum(0);
    std::get<4>(result) = at::empty(weight.sizes(), weight.options());
    if (s.depthwise()) {
      at::Tensor dense = at::empty({channels, cells}, options);
      T* to = dense.mutable_data_ptr<T>();
      const T* from = sum.const_data_ptr<T>();
      each_depthwise_value(s, [&](int64_t c, int64_t cell, int64_t at) { to[c * cells + cell] = from[at]; });
      std::get<4>(result).view({channels, cells}).copy_(dense);
    } else {
      const at::Tensor by_group = std::get<4>(result).view({s.groups, group_out, group_in, cells});
      const at::Tensor blocked = sum.view({s.groups, cells * group_out * group_in});
      each_part_of_group(group_in, [&](int64_t c, int64_t width) {
        const at::Tensor part = blocked.narrow(1, c * cells * group_out, width * cells * group_out);
        by_group.narrow(2, c, width).copy_(part.reshape({s.groups, cells, group_out, width}).permute({0, 2, 3, 1}));
      });
    }
  }
  if (wanted[5]) {
    std::get<5>(result) = grad_rows.sum({0, 2, 3}).to(weight.scalar_type());
  }
  return result;
}

at::Tensor deform_kernel_conv2d_cpu(
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
  if (input.scalar_type() == at::kDouble) {
    return forward<double, double>(s, input, kernel_offset, offset, mask, weight, bias);
  }
  // Two channels at a time are multiplied.
  if (input.scalar_type() == at::kBFloat16 && (s.depthwise() || s.group_in() % 2 == 0) && has_bfloat16_products()) {
    return forward<float, at::BFloat16>(s, input, kernel_offset, offset, mask, weight, bias);
  }
  return forward<float, float>(s, input, kernel_offset, offset, mask, weight, bias);
}

DeformKernelConv2dGradients deform_kernel_conv2d_backward_cpu(
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
  return input.scalar_type() == at::kDouble
             ? backward<double>(s, grad_output, input, kernel_offset, offset, mask, weight, output_mask)
             : backward<float>(s, grad_output, input, kernel_offset, offset, mask, weight, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cpu);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cpu);
}
