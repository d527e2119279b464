// kernel_evolution_conv2d for devices: bodies of the kernels, and the order they run in, written over a launcher
// (launch.h).
//
// Where a channel is read is the same at all output positions, so the lanes of a warp take neighbouring positions of
// one location: they read neighbouring pixels of a contiguous map, with weights that they share. Columns are made for a
// chunk of output positions at a time and handed to a matrix product; their buffer is bounded whatever the sizes. The
// gradients of windows and map are gathered: no atomics.
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/launch.h"
#include "ops/kernel_evolution_conv2d.h"

namespace dk {

// What all bodies know. T is the data type, A the wider type of windows and sums, I the type of indices.
template <typename T, typename A, typename I>
struct KernelEvolutionConv2dDevice {
  KernelEvolutionConv2dSizesOf<I> s;
  const T* input;   // [N, C, H, W]
  const A* origin;  // [C, K, 2]
  const A* window;  // [C, K, cells]
  I first;          // the chunk: output positions [first, first + count) of the N * P
  I count;

  // Number i = c * K + k of channel and location: the pixel under its first cell at output position (0, 0).
  DK_HOST_DEVICE I first_row(I i) const {
    return first_pixel(origin[2 * i], s.padding_h, s.out_h, s.stride_h, s.window_h, s.height);
  }
  DK_HOST_DEVICE I first_column(I i) const {
    return first_pixel(origin[2 * i + 1], s.padding_w, s.out_w, s.stride_w, s.window_w, s.width);
  }

  // Number of a plane's first pixel.
  DK_HOST_DEVICE I plane(I n, I c) const { return (n * s.in_channels + c) * s.height * s.width; }

  // Finds positions of the chunk in their images, with no 64-bit division for each.
  struct Finder {
    I image;
    uint32_t first, positions, width;

    struct Place {
      I n, oh, ow;
    };

    DK_HOST_DEVICE Place operator()(I t) const {
      const uint32_t all = first + static_cast<uint32_t>(t), n = all / positions, at = all - n * positions;
      const uint32_t oh = at / width;
      return {image + static_cast<I>(n), static_cast<I>(oh), static_cast<I>(at - oh * width)};
    }
  };

  DK_HOST_DEVICE Finder finder() const {
    const I image = first / s.positions();
    return {
        image, static_cast<uint32_t>(first - image * s.positions()), static_cast<uint32_t>(s.positions()),
        static_cast<uint32_t>(s.out_w)};
  }
};

// Whether 0 <= at < size.
template <typename I>
DK_HOST_DEVICE bool within(I at, I size) {
  return static_cast<std::make_unsigned_t<I>>(at) < static_cast<std::make_unsigned_t<I>>(size);
}

// columns [C * K, count] = what each location reads.
template <typename T, typename A, typename I>
struct SampleWindows {
  static constexpr int kEach = 8;          // positions that a lane sums up at a time: they share a cell's weight
  static constexpr int kRun = 32 * kEach;  // positions of a work item

  KernelEvolutionConv2dDevice<T, A, I> p;
  T* columns;

  DK_HOST_DEVICE static int64_t runs(int64_t count) { return (count + kRun - 1) / kRun; }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const I runs_ = static_cast<I>(runs(p.count)), i = static_cast<I>(index) / runs_;
    const I start = (static_cast<I>(index) - i * runs_) * kRun, c = i / s.locations;
    const I row = p.first_row(i), column = p.first_column(i);
    const A* weights = p.window + i * s.cells();
    const auto find = p.finder();
    for (I begin = start; begin < start + kRun; begin += kEach * lanes.count()) {
      I y[kEach], x[kEach], at[kEach];
      A sum[kEach];
      DK_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const auto place = find(begin + lanes.index() + j * lanes.count());
        y[j] = place.oh * s.stride_h + row;
        x[j] = place.ow * s.stride_w + column;
        at[j] = p.plane(place.n, c) + y[j] * s.width + x[j];
        sum[j] = 0;
        if (begin + lanes.index() + j * lanes.count() >= p.count) {
          y[j] = s.height;  // off the map
        }
      }
      DK_NO_UNROLL
      for (I dy = 0; dy < s.window_h; ++dy) {
        DK_NO_UNROLL
        for (I dx = 0; dx < s.window_w; ++dx) {
          const A weight = weights[dy * s.window_w + dx];
          if (weight == A(0)) {
            continue;
          }
          DK_UNROLL
          for (int j = 0; j < kEach; ++j) {
            if (within(y[j] + dy, s.height) && within(x[j] + dx, s.width)) {
              sum[j] += weight * static_cast<A>(p.input[at[j] + dy * s.width + dx]);
            }
          }
        }
      }
      DK_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const I t = begin + lanes.index() + j * lanes.count();
        if (t < p.count) {
          columns[i * p.count + t] = static_cast<T>(sum[j]);
        }
      }
    }
  }
};

// Gradient of the windows: a tile of cells belongs to one warp, which adds up the chunk's positions.
template <typename T, typename A, typename I>
struct WindowGradient {
  static constexpr int kSide = 5;  // of a tile: the window of radius 2

  KernelEvolutionConv2dDevice<T, A, I> p;
  const T* grad_columns;  // [C * K, count]
  A* grad_window;         // [C, K, cells], added to

  DK_HOST_DEVICE static I parts(I length) { return (length + kSide - 1) / kSide; }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const I across = parts(s.window_w), down = parts(s.window_h);
    const I rest = static_cast<I>(index) / across, dx = (static_cast<I>(index) - rest * across) * kSide;
    const I i = rest / down, dy = (rest - i * down) * kSide, c = i / s.locations;
    const I row = p.first_row(i) + dy, column = p.first_column(i) + dx;
    const auto find = p.finder();
    A sum[kSide][kSide] = {};
    DK_NO_UNROLL
    for (I t = lanes.index(); t < p.count; t += lanes.count()) {
      const auto place = find(t);
      const I y = place.oh * s.stride_h + row, x = place.ow * s.stride_w + column;
      const I at = p.plane(place.n, c) + y * s.width + x;
      const A grad = static_cast<A>(grad_columns[i * p.count + t]);
      DK_UNROLL
      for (int j = 0; j < kSide; ++j) {
        if (within(y + j, s.height)) {
          DK_UNROLL
          for (int k = 0; k < kSide; ++k) {
            if (within(x + k, s.width)) {
              sum[j][k] += grad * static_cast<A>(p.input[at + j * s.width + k]);
            }
          }
        }
      }
    }
    DK_UNROLL
    for (int j = 0; j < kSide; ++j) {
      DK_UNROLL
      for (int k = 0; k < kSide; ++k) {
        const A all = lanes.sum(sum[j][k]);
        if (lanes.index() == 0 && dy + j < s.window_h && dx + k < s.window_w) {
          grad_window[i * s.cells() + (dy + j) * s.window_w + dx + k] += all;
        }
      }
    }
  }
};

// Gradient of the map: each pixel gathers from the windows that cover it at positions of the chunk. A work item is a
// row of a channel, and its number counts from image `image` on.
template <typename T, typename A, typename I>
struct GatherMapGradient {
  KernelEvolutionConv2dDevice<T, A, I> p;
  const T* grad_columns;  // [C * K, count]
  I image;
  A* grad_input;  // [N, C, H, W], added to

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const I rest = static_cast<I>(index) / s.height, y = static_cast<I>(index) - rest * s.height;
    const I images = rest / s.in_channels, c = rest - images * s.in_channels, n = image + images;
    A* target = grad_input + p.plane(n, c) + y * s.width;
    const I begin = n * s.positions() - p.first;
    for (I x = lanes.index(); x < s.width; x += lanes.count()) {
      A sum = 0;
      DK_NO_UNROLL
      for (I k = 0; k < s.locations; ++k) {
        const I i = c * s.locations + k;
        // Output position (oh, ow) has cell (dy, dx) on this pixel: oh * stride = down - dy, ow * stride = across - dx.
        const I down = y - p.first_row(i), across = x - p.first_column(i);
        const A* weights = p.window + i * s.cells();
        DK_NO_UNROLL
        for (I dy = 0; dy < s.window_h && dy <= down; ++dy) {
          const I oh = s.stride_h == 1 ? down - dy : (down - dy) / s.stride_h;
          if (oh >= s.out_h || oh * s.stride_h != down - dy) {
            continue;
          }
          const I line = begin + oh * s.out_w;
          DK_NO_UNROLL
          for (I dx = 0; dx < s.window_w; ++dx) {
            const A weight = weights[dy * s.window_w + dx];
            if (weight == A(0)) {
              continue;
            }
            const I ow = s.stride_w == 1 ? across - dx : (across - dx) / s.stride_w, t = line + ow;
            if (dx <= across && ow < s.out_w && ow * s.stride_w == across - dx && within(t, p.count)) {
              sum += weight * static_cast<A>(grad_columns[i * p.count + t]);
            }
          }
        }
      }
      target[x] += sum;
    }
  }
};

// The operator for data type T on whatever Launcher runs on.
template <typename Launcher, typename T>
class KernelEvolutionConv2dPipeline {
 public:
  using A = at::opmath_type<T>;

  KernelEvolutionConv2dPipeline(
      const KernelEvolutionConv2dSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& origin,
      const at::Tensor& window,
      const std::optional<at::Tensor>& attention,
      const at::Tensor& weight)
      : s(sizes),
        wide(input.options().dtype(c10::CppTypeToScalarType<A>::value)),
        x(input.contiguous()),
        from(origin.to(wide.dtype()).contiguous()),
        cells(window.to(wide.dtype()).contiguous()),
        scores(attention ? by_location(*attention) : at::Tensor()),
        filter(weight.reshape({s.groups, s.group_out(), rows()})) {
    TORCH_CHECK_VALUE(
        s.positions() <= std::numeric_limits<int32_t>::max(), "kernel_evolution_conv2d: an output of ", s.out_h, "x",
        s.out_w, " is too large for a device");
  }

  at::Tensor forward(const std::optional<at::Tensor>& bias) const {
    at::Tensor out = at::empty({s.groups, s.group_out(), total()}, x.options());
    const int64_t step = chunk(/*buffers=*/1);
    for (int64_t first = 0; first < total(); first += step) {
      const int64_t count = std::min(step, total() - first);
      out.narrow(2, first, count).copy_(at::bmm(filter, modulated(sample(first, count), first, count)));
    }
    out = out.view({s.out_channels, s.batch, s.out_h, s.out_w}).transpose(0, 1);
    return bias ? out + bias->view({-1, 1, 1}) : out;
  }

  KernelEvolutionConv2dGradients backward(const at::Tensor& grad_output, std::array<bool, 5> wanted) const {
    const at::Tensor grad = grad_output.transpose(0, 1).reshape({s.groups, s.group_out(), total()});
    at::Tensor grad_x, grad_cells, grad_scores, grad_filter;
    if (wanted[0]) {
      grad_x = at::zeros({s.batch, s.in_channels, s.height, s.width}, wide);
    }
    if (wanted[1]) {
      grad_cells = at::zeros(cells.sizes(), wide);
    }
    if (wanted[2]) {
      grad_scores = at::empty({s.locations, total()}, wide);
    }
    if (wanted[3]) {
      grad_filter = at::zeros(filter.sizes(), wide);
    }
    const int64_t step = chunk(/*buffers=*/2);
    for (int64_t first = 0; first < total(); first += step) {
      const int64_t count = std::min(step, total() - first);
      const at::Tensor part = grad.narrow(2, first, count);
      at::Tensor values, grad_columns;
      if (wanted[2] || wanted[3]) {
        values = sample(first, count);
      }
      if (wanted[3]) {
        grad_filter += at::bmm(part, modulated(values, first, count).transpose(1, 2)).to(wide.dtype());
      }
      if (!wanted[0] && !wanted[1] && !wanted[2]) {
        continue;
      }
      grad_columns = at::bmm(filter.transpose(1, 2), part);  // [groups, C / groups * K, count]
      if (wanted[2]) {
        const at::Tensor products = grad_columns.to(wide.dtype()) * values.to(wide.dtype());
        at::Tensor target = grad_scores.narrow(1, first, count);
        at::sum_out(target, products.view({s.in_channels, s.locations, count}), 0);
      }
      grad_columns = modulated(grad_columns, first, count);
      const T* data = grad_columns.template const_data_ptr<T>();
      dispatch(grad_columns, [&](auto index) {
        using I = decltype(index);
        const auto p = device<I>(first, count);
        if (wanted[1]) {
          using Body = WindowGradient<T, A, I>;
          Launcher::run(
              s.in_channels * s.locations * Body::parts(p.s.window_h) * Body::parts(p.s.window_w),
              Body{p, data, grad_cells.template mutable_data_ptr<A>()});
        }
        if (wanted[0]) {
          const int64_t image = first / s.positions(), last = (first + count - 1) / s.positions();
          Launcher::run(
              (last - image + 1) * s.in_channels * s.height,
              GatherMapGradient<T, A, I>{p, data, static_cast<I>(image), grad_x.template mutable_data_ptr<A>()});
        }
      });
    }

    KernelEvolutionConv2dGradients result = no_gradients(x);
    if (wanted[0]) {
      std::get<0>(result) = grad_x.to(x.scalar_type());
    }
    if (wanted[1]) {
      std::get<1>(result) = grad_cells;
    }
    if (wanted[2]) {
      std::get<2>(result) = grad_scores.view({s.locations, s.batch, s.out_h, s.out_w}).transpose(0, 1).contiguous();
    }
    if (wanted[3]) {
      std::get<3>(result) = grad_filter.view({s.out_channels, s.group_in(), s.locations}).to(x.scalar_type());
    }
    if (wanted[4]) {
      std::get<4>(result) = grad.to(wide.dtype()).sum(2).view({s.out_channels}).to(x.scalar_type());
    }
    return result;
  }

 private:
  int64_t total() const { return s.batch * s.positions(); }
  int64_t rows() const { return s.group_in() * s.locations; }

  // Output positions at a time, of whose columns there are `buffers`, and under attention as many products with it.
  int64_t chunk(int64_t buffers) const {
    buffers *= scores.defined() ? 2 : 1;
    const int64_t bytes = buffers * s.locations * s.in_channels * static_cast<int64_t>(sizeof(T));
    return chunk_of<Launcher>(total(), bytes, buffers, /*listed=*/0);
  }

  template <typename I>
  KernelEvolutionConv2dDevice<T, A, I> device(int64_t first, int64_t count) const {
    return {
        s.as<I>(),
        x.template const_data_ptr<T>(),
        from.template const_data_ptr<A>(),
        cells.template const_data_ptr<A>(),
        static_cast<I>(first),
        static_cast<I>(count)};
  }

  // Calls body(I{}) with the type that fits the sizes and the columns.
  template <typename Body>
  void dispatch(const at::Tensor& columns, const Body& body) const {
    // Lanes ask for positions beyond the last.
    const int64_t items = s.in_channels * s.locations * (s.cells() + SampleWindows<T, A, int64_t>::runs(total()));
    with_index<Launcher>({x, cells, columns}, {(2 * s.reach() + s.cells()) * s.width, total() + 256, items}, body);
  }

  // [K, N * P]
  at::Tensor by_location(const at::Tensor& attention) const {
    return attention.transpose(0, 1).reshape({s.locations, total()}).to(wide.dtype());
  }

  // [groups, C / groups * K, count]
  at::Tensor sample(int64_t first, int64_t count) const {
    at::Tensor columns = at::empty({s.groups, rows(), count}, x.options());
    dispatch(columns, [&](auto index) {
      using Body = SampleWindows<T, A, decltype(index)>;
      Launcher::run(
          s.in_channels * s.locations * Body::runs(count),
          Body{device<decltype(index)>(first, count), columns.template mutable_data_ptr<T>()});
    });
    return columns;
  }

  // Columns times the attention of their location.
  at::Tensor modulated(const at::Tensor& columns, int64_t first, int64_t count) const {
    if (!scores.defined()) {
      return columns;
    }
    const at::Tensor by_channel = columns.view({s.in_channels, s.locations, count});
    return (by_channel * scores.narrow(1, first, count)).to(x.scalar_type()).view_as(columns);
  }

  KernelEvolutionConv2dSizes s;
  at::TensorOptions wide;
  at::Tensor x, from, cells, scores, filter;
};

// Entry points for every backend: checks, dispatch on the data type, the caller's memory format and dtypes.
template <typename Launcher>
at::Tensor kernel_evolution_conv2d_device(
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
  const DeviceScope<Launcher> scope(input.device());
  at::Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "kernel_evolution_conv2d", [&] {
    output =
        KernelEvolutionConv2dPipeline<Launcher, scalar_t>(s, input, origin, window, attention, weight).forward(bias);
  });
  return output.contiguous(input.suggest_memory_format());
}

template <typename Launcher>
KernelEvolutionConv2dGradients kernel_evolution_conv2d_backward_device(
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
  const DeviceScope<Launcher> scope(input.device());
  KernelEvolutionConv2dGradients result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "kernel_evolution_conv2d_backward", [&] {
        result = KernelEvolutionConv2dPipeline<Launcher, scalar_t>(s, input, origin, window, attention, weight)
                     .backward(grad_output, output_mask);
      });
  if (output_mask[0]) {
    std::get<0>(result) = std::get<0>(result).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = std::get<1>(result).to(window.scalar_type());
  }
  if (output_mask[2]) {
    std::get<2>(result) = std::get<2>(result).to(attention->scalar_type());
  }
  return result;
}

}  // namespace dk
