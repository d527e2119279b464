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

#include "common/launch.h"
#include "ops/kernel_evolution_conv2d.h"

namespace dk {

// What all bodies know. T is the data type, A the wider type of windows and sums.
template <typename T, typename A>
struct KernelEvolutionConv2dDevice {
  KernelEvolutionConv2dSizes s;
  const T* input;   // [N, C, H, W]
  const A* origin;  // [C, K, 2]
  const A* window;  // [C, K, cells]
  int64_t first;    // the chunk: output positions [first, first + count) of the N * P
  int64_t count;

  // Number i = c * K + k of channel and location: the pixel under its first cell at output position (0, 0).
  DK_HOST_DEVICE int64_t first_row(int64_t i) const {
    return first_pixel(origin[2 * i], s.padding_h, s.out_h, s.stride_h, s.window_h, s.height);
  }
  DK_HOST_DEVICE int64_t first_column(int64_t i) const {
    return first_pixel(origin[2 * i + 1], s.padding_w, s.out_w, s.stride_w, s.window_w, s.width);
  }

  DK_HOST_DEVICE const T* plane(int64_t n, int64_t c) const {
    return input + (n * s.in_channels + c) * s.height * s.width;
  }

  // Finds positions of the chunk in their images, with no 64-bit division for each.
  struct Finder {
    int64_t image;
    uint32_t first, positions, width;

    struct Place {
      int64_t n;
      int oh, ow;
    };

    DK_HOST_DEVICE Place operator()(int64_t t) const {
      const uint32_t all = first + static_cast<uint32_t>(t), n = all / positions, at = all - n * positions;
      const uint32_t oh = at / width;
      return {image + n, static_cast<int>(oh), static_cast<int>(at - oh * width)};
    }
  };

  DK_HOST_DEVICE Finder finder() const {
    const int64_t image = first / s.positions();
    return {
        image, static_cast<uint32_t>(first - image * s.positions()), static_cast<uint32_t>(s.positions()),
        static_cast<uint32_t>(s.out_w)};
  }
};

// columns [C * K, count] = what each location reads.
template <typename T, typename A>
struct SampleWindows {
  static constexpr int64_t kRun = 256;  // positions of a work item

  KernelEvolutionConv2dDevice<T, A> p;
  T* columns;

  DK_HOST_DEVICE static int64_t runs(int64_t count) { return (count + kRun - 1) / kRun; }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const int64_t i = index / runs(p.count), begin = index % runs(p.count) * kRun;
    const int64_t end = begin + kRun < p.count ? begin + kRun : p.count;
    const int64_t row = p.first_row(i), column = p.first_column(i), c = i / s.locations;
    const A* weights = p.window + i * s.cells();
    const auto find = p.finder();
    for (int64_t t = begin + lanes.index(); t < end; t += lanes.count()) {
      const auto place = find(t);
      const int64_t y = place.oh * s.stride_h + row, x = place.ow * s.stride_w + column;
      const T* map = p.plane(place.n, c);
      A sum = 0;
      for (int64_t dy = y < 0 ? -y : 0; dy < s.window_h && y + dy < s.height; ++dy) {
        for (int64_t dx = x < 0 ? -x : 0; dx < s.window_w && x + dx < s.width; ++dx) {
          const A weight = weights[dy * s.window_w + dx];
          if (weight != A(0)) {
            sum += weight * static_cast<A>(map[(y + dy) * s.width + x + dx]);
          }
        }
      }
      columns[i * p.count + t] = static_cast<T>(sum);
    }
  }
};

// Gradient of the windows: some neighbouring cells of a row belong to one warp, which adds up the chunk's positions.
template <typename T, typename A>
struct WindowGradient {
  static constexpr int kCells = 5;  // a row of the window of radius 2

  KernelEvolutionConv2dDevice<T, A> p;
  const T* grad_columns;  // [C * K, count]
  A* grad_window;         // [C, K, cells], added to

  DK_HOST_DEVICE static int64_t parts(int64_t width) { return (width + kCells - 1) / kCells; }

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const int64_t part = index % parts(s.window_w) * kCells, rows = index / parts(s.window_w);
    const int64_t i = rows / s.window_h, dy = rows % s.window_h, c = i / s.locations;
    const int64_t row = p.first_row(i) + dy, column = p.first_column(i) + part;
    const auto find = p.finder();
    A sum[kCells] = {};
    for (int64_t t = lanes.index(); t < p.count; t += lanes.count()) {
      const auto place = find(t);
      const int64_t y = place.oh * s.stride_h + row, x = place.ow * s.stride_w + column;
      if (y < 0 || y >= s.height) {
        continue;
      }
      const A grad = static_cast<A>(grad_columns[i * p.count + t]);
      const T* line = p.plane(place.n, c) + y * s.width;
      DK_UNROLL
      for (int cell = 0; cell < kCells; ++cell) {
        if (x + cell >= 0 && x + cell < s.width) {
          sum[cell] += grad * static_cast<A>(line[x + cell]);
        }
      }
    }
    DK_UNROLL
    for (int cell = 0; cell < kCells; ++cell) {
      const A all = lanes.sum(sum[cell]);
      if (lanes.index() == 0 && part + cell < s.window_w) {
        grad_window[i * s.cells() + dy * s.window_w + part + cell] += all;
      }
    }
  }
};

// Gradient of the map: each pixel gathers from the windows that cover it at positions of the chunk. A work item is a
// row of a channel, and its number counts from image `image` on.
template <typename T, typename A>
struct GatherMapGradient {
  KernelEvolutionConv2dDevice<T, A> p;
  const T* grad_columns;  // [C * K, count]
  int64_t image;
  A* grad_input;  // [N, C, H, W], added to

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto& s = p.s;
    const int64_t y = index % s.height, c = index / s.height % s.in_channels;
    const int64_t n = image + index / s.height / s.in_channels;
    A* target = grad_input + ((n * s.in_channels + c) * s.height + y) * s.width;
    for (int64_t x = lanes.index(); x < s.width; x += lanes.count()) {
      A sum = 0;
      for (int64_t k = 0; k < s.locations; ++k) {
        const int64_t i = c * s.locations + k;
        // Output position (oh, ow) has cell (dy, dx) on this pixel: oh * stride = down - dy, ow * stride = across - dx.
        const int down = static_cast<int>(y - p.first_row(i)), across = static_cast<int>(x - p.first_column(i));
        const int stride_h = static_cast<int>(s.stride_h), stride_w = static_cast<int>(s.stride_w);
        const A* weights = p.window + i * s.cells();
        for (int dy = 0; dy < s.window_h && dy <= down; ++dy) {
          const int oh = (down - dy) / stride_h;
          if (oh >= s.out_h || oh * stride_h != down - dy) {
            continue;
          }
          const int64_t line = n * s.positions() + oh * s.out_w - p.first;
          for (int dx = 0; dx < s.window_w && dx <= across; ++dx) {
            const int ow = (across - dx) / stride_w;
            const A weight = weights[dy * s.window_w + dx];
            const int64_t t = line + ow;
            if (ow < s.out_w && ow * stride_w == across - dx && t >= 0 && t < p.count && weight != A(0)) {
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
    for (int64_t first = 0; first < total(); first += chunk()) {
      const auto p = device(first);
      out.narrow(2, first, p.count).copy_(at::bmm(filter, modulated(sample(p), p)));
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
    for (int64_t first = 0; first < total(); first += chunk()) {
      const auto p = device(first);
      const at::Tensor part = grad.narrow(2, first, p.count);
      at::Tensor values, grad_columns;
      if (wanted[2] || wanted[3]) {
        values = sample(p);
      }
      if (wanted[3]) {
        grad_filter += at::bmm(part, modulated(values, p).transpose(1, 2)).to(wide.dtype());
      }
      if (!wanted[0] && !wanted[1] && !wanted[2]) {
        continue;
      }
      grad_columns = at::bmm(filter.transpose(1, 2), part);  // [groups, C / groups * K, count]
      if (wanted[2]) {
        const at::Tensor products = grad_columns.to(wide.dtype()) * values.to(wide.dtype());
        at::Tensor target = grad_scores.narrow(1, first, p.count);
        at::sum_out(target, products.view({s.in_channels, s.locations, p.count}), 0);
      }
      grad_columns = modulated(grad_columns, p);
      const T* data = grad_columns.template const_data_ptr<T>();
      if (wanted[1]) {
        Launcher::run(
            s.in_channels * s.locations * s.window_h * WindowGradient<T, A>::parts(s.window_w),
            WindowGradient<T, A>{p, data, grad_cells.template mutable_data_ptr<A>()});
      }
      if (wanted[0]) {
        const int64_t image = first / s.positions(), last = (first + p.count - 1) / s.positions();
        Launcher::run(
            (last - image + 1) * s.in_channels * s.height,
            GatherMapGradient<T, A>{p, data, image, grad_x.template mutable_data_ptr<A>()});
      }
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
  static constexpr int64_t kColumnBytes = 64 << 20;  // fits the second-level cache of large GPUs, and any memory

  int64_t total() const { return s.batch * s.positions(); }
  int64_t rows() const { return s.group_in() * s.locations; }

  int64_t chunk() const {
    const int64_t bytes = s.locations * s.in_channels * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(kColumnBytes / bytes, 1, std::max<int64_t>(total(), 1));
  }

  KernelEvolutionConv2dDevice<T, A> device(int64_t first) const {
    return {
        s,     x.template const_data_ptr<T>(),    from.template const_data_ptr<A>(), cells.template const_data_ptr<A>(),
        first, std::min(chunk(), total() - first)};
  }

  // [K, N * P]
  at::Tensor by_location(const at::Tensor& attention) const {
    return attention.transpose(0, 1).reshape({s.locations, total()}).to(wide.dtype());
  }

  // [groups, C / groups * K, count]
  at::Tensor sample(const KernelEvolutionConv2dDevice<T, A>& p) const {
    at::Tensor columns = at::empty({s.groups, rows(), p.count}, x.options());
    Launcher::run(
        s.in_channels * s.locations * SampleWindows<T, A>::runs(p.count),
        SampleWindows<T, A>{p, columns.template mutable_data_ptr<T>()});
    return columns;
  }

  // Columns times the attention of their location.
  at::Tensor modulated(const at::Tensor& columns, const KernelEvolutionConv2dDevice<T, A>& p) const {
    if (!scores.defined()) {
      return columns;
    }
    const at::Tensor by_channel = columns.view({s.in_channels, s.locations, p.count});
    return (by_channel * scores.narrow(1, p.first, p.count)).to(x.scalar_type()).view_as(columns);
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
