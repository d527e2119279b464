// deform_conv2d for devices: bodies of the kernels, and the order they run in, written over a launcher (launch.h).
//
// The map is channels-last, so the lanes of a warp read neighbouring channels of one sampling position: its set-up is
// computed once per warp. Columns are made for a chunk of output positions at a time and handed to a matrix product;
// their buffer is bounded whatever the sizes.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/OpMathType.h>

#include <algorithm>

#include "common/bilinear.h"
#include "common/contributions.h"
#include "common/launch.h"
#include "ops/deform_conv2d.h"

namespace dk {

// What all bodies know. T is the data type, A the wider type of positions and sums.
template <typename T, typename A>
struct DeformConv2dDevice {
  DeformConv2dSizes s;
  const T* input;   // [N, H, W, C]
  const A* offset;  // [N, D, K, 2, P]
  const A* mask;    // [N, D, K, P] or null
  int64_t first;    // the chunk: output positions [first, first + count) of the N * P
  int64_t count;

  // Work items of a chunk are (position, tap, offset group), the group fastest.
  DK_HOST_DEVICE int64_t items() const { return count * s.taps() * s.offset_groups; }

  // Of the map, counted once for every offset group.
  DK_HOST_DEVICE int64_t pixels() const { return s.batch * s.offset_groups * s.height * s.width; }

  struct Item {
    int64_t local, tap, group, n, position;
    Corners<A> corners;
    A mask;
    // Number of the (tap, group)'s plane of `positions` values in offset (two each) and mask.
    int64_t plane;
  };

  DK_HOST_DEVICE Item item(int64_t index) const {
    Item it;
    it.group = index % s.offset_groups;
    it.tap = index / s.offset_groups % s.taps();
    it.local = index / s.offset_groups / s.taps();
    it.n = (first + it.local) / s.positions();
    it.position = (first + it.local) % s.positions();
    it.plane = (it.n * s.offset_groups + it.group) * s.taps() + it.tap;
    const int64_t oh = it.position / s.out_w, ow = it.position % s.out_w;
    const A* shift = offset + it.plane * 2 * s.positions() + it.position;
    const A y = static_cast<A>(rest_y(s, oh, it.tap / s.kernel_w)) + shift[0];
    const A x = static_cast<A>(rest_x(s, ow, it.tap % s.kernel_w)) + shift[s.positions()];
    it.corners = bilinear_corners(y, x, s.height, s.width);
    it.mask = mask ? mask[it.plane * s.positions() + it.position] : A(1);
    return it;
  }

  // First channel of corner k, seen from channel c; only for corners on the map.
  DK_HOST_DEVICE int64_t pixel(const Item& it, int k, int64_t c) const {
    return (it.n * s.height * s.width + it.corners.index[k]) * s.in_channels + c;
  }

  // Columns are [groups, count, taps, C / groups]: one matrix per weight group.
  DK_HOST_DEVICE int64_t column(const Item& it, int64_t c) const {
    return ((c / s.group_in() * count + it.local) * s.taps() + it.tap) * s.group_in() + c % s.group_in();
  }
};

// columns = the sampled, modulated input.
template <typename T, typename A, int kWidth>
struct SampleColumns {
  DeformConv2dDevice<T, A> p;
  T* columns;

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto it = p.item(index);
    const int64_t channels = p.s.offset_group_channels(), start = it.group * channels;
    for (int64_t c = start + lanes.index() * kWidth; c < start + channels; c += lanes.count() * kWidth) {
      A sum[kWidth] = {};
      for (int k = 0; k < 4; ++k) {
        if (it.corners.index[k] < 0) {
          continue;
        }
        const auto value = Vector<T, kWidth>::load(p.input + p.pixel(it, k, c));
        const A weight = it.corners.weight[k] * it.mask;
        for (int i = 0; i < kWidth; ++i) {
          sum[i] += weight * static_cast<A>(value.value[i]);
        }
      }
      Vector<T, kWidth> out;
      for (int i = 0; i < kWidth; ++i) {
        out.value[i] = static_cast<T>(sum[i]);
      }
      out.store(columns + p.column(it, c));
    }
  }
};

// Gradients of offset and mask: each (position, tap, group) belongs to one warp, which adds up its channels.
template <typename T, typename A, int kWidth>
struct SampleGradient {
  DeformConv2dDevice<T, A> p;
  const T* grad_columns;
  A* grad_offset;  // [N, D, K, 2, P]
  A* grad_mask;    // [N, D, K, P] or null

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto it = p.item(index);
    const int64_t channels = p.s.offset_group_channels(), start = it.group * channels;
    A dot[4] = {};
    for (int64_t c = start + lanes.index() * kWidth; c < start + channels; c += lanes.count() * kWidth) {
      const auto grad = Vector<T, kWidth>::load(grad_columns + p.column(it, c));
      for (int k = 0; k < 4; ++k) {
        if (it.corners.index[k] < 0) {
          continue;
        }
        const auto value = Vector<T, kWidth>::load(p.input + p.pixel(it, k, c));
        for (int i = 0; i < kWidth; ++i) {
          dot[k] += static_cast<A>(grad.value[i]) * static_cast<A>(value.value[i]);
        }
      }
    }
    A by_mask = 0;
    for (int k = 0; k < 4; ++k) {
      dot[k] = lanes.sum(dot[k]);
      by_mask += it.corners.weight[k] * dot[k];
    }
    if (lanes.index() == 0) {
      const int64_t positions = p.s.positions();
      A* shift = grad_offset + it.plane * 2 * positions + it.position;
      shift[0] = it.mask * bilinear_grad_y(it.corners, dot);
      shift[positions] = it.mask * bilinear_grad_x(it.corners, dot);
      if (grad_mask) {
        grad_mask[it.plane * positions + it.position] = by_mask;
      }
    }
  }
};

// Gradient of the input, scattered with atomics: fast, the order of the sums is left to chance.
template <typename T, typename A>
struct ScatterInputGradient {
  DeformConv2dDevice<T, A> p;
  const T* grad_columns;
  A* grad_input;  // [N, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    const auto it = p.item(index);
    const int64_t channels = p.s.offset_group_channels(), start = it.group * channels;
    for (int64_t c = start + lanes.index(); c < start + channels; c += lanes.count()) {
      const A grad = static_cast<A>(grad_columns[p.column(it, c)]) * it.mask;
      for (int k = 0; k < 4; ++k) {
        if (it.corners.index[k] >= 0) {
          add_atomically(grad_input + p.pixel(it, k, c), it.corners.weight[k] * grad);
        }
      }
    }
  }
};

// The deterministic way to the same gradient, in two bodies. First, for every item and corner the pixel it touches,
// numbered within (image, offset group) planes, or the number of pixels where it touches none.
template <typename T, typename A>
struct CornerKeys {
  DeformConv2dDevice<T, A> p;
  int64_t* keys;  // [items, 4]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t index, const Lanes& lanes) const {
    if (lanes.index() != 0) {
      return;
    }
    const auto it = p.item(index);
    const int64_t plane = p.s.height * p.s.width;
    for (int k = 0; k < 4; ++k) {
      keys[index * 4 + k] =
          it.corners.index[k] < 0 ? p.pixels() : (it.n * p.s.offset_groups + it.group) * plane + it.corners.index[k];
    }
  }
};

// Then each pixel gathers its contributions.
template <typename T, typename A>
struct GatherInputGradient {
  DeformConv2dDevice<T, A> p;
  const T* grad_columns;
  Contributions from;  // numbered (item, corner)
  A* grad_input;       // [N, H, W, C]

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t at, const Lanes& lanes) const {
    if (!from.begins(at)) {
      return;
    }
    const int64_t pixel = from.pixels[at];
    const int64_t plane = p.s.height * p.s.width, channels = p.s.offset_group_channels();
    const int64_t n = pixel / plane / p.s.offset_groups, group = pixel / plane % p.s.offset_groups;
    const int64_t start = group * channels;
    A* row = grad_input + (n * plane + pixel % plane) * p.s.in_channels;
    for (; from.continues(at, pixel); ++at) {
      const auto it = p.item(from.order[at] / 4);
      const A weight = it.corners.weight[from.order[at] % 4] * it.mask;
      for (int64_t c = start + lanes.index(); c < start + channels; c += lanes.count()) {
        row[c] += weight * static_cast<A>(grad_columns[p.column(it, c)]);
      }
    }
  }
};

// The operator for data type T on whatever Launcher runs on.
template <typename Launcher, typename T>
class DeformConv2dPipeline {
 public:
  using A = at::opmath_type<T>;

  DeformConv2dPipeline(
      const DeformConv2dSizes& sizes,
      const at::Tensor& input,
      const at::Tensor& offset,
      const std::optional<at::Tensor>& mask)
      : s(sizes),
        wide(input.options().dtype(c10::CppTypeToScalarType<A>::value)),
        x(input.contiguous(at::MemoryFormat::ChannelsLast)),
        off(offset.to(wide.dtype()).contiguous()),
        msk(mask ? mask->to(wide.dtype()).contiguous() : at::Tensor()) {}

  at::Tensor forward(const at::Tensor& weight, const std::optional<at::Tensor>& bias) const {
    at::Tensor out = at::empty({s.groups, total(), s.group_out()}, x.options());
    const at::Tensor filter = filters(weight).transpose(1, 2);  // [groups, taps * C / groups, O / groups]
    const int64_t step = chunk(/*sorts=*/false);
    for (int64_t first = 0; first < total(); first += step) {
      const auto p = device(first, step);
      at::Tensor part = out.narrow(1, first, p.count);
      at::bmm_out(part, sample(p), filter);
    }
    out = out.permute({1, 0, 2}).reshape({s.batch, s.out_h, s.out_w, s.out_channels});
    return bias ? out.add_(*bias) : out;  // [N, outH, outW, O]
  }

  DeformConv2dGradients backward(
      const at::Tensor& grad_output, const at::Tensor& weight, std::array<bool, 5> wanted) const {
    const at::Tensor grad = grad_output.permute({0, 2, 3, 1})
                                .reshape({total(), s.groups, s.group_out()})
                                .transpose(0, 1)
                                .contiguous();  // [groups, N * P, O / groups]
    const at::Tensor filter = filters(weight);  // [groups, O / groups, taps * C / groups]
    at::Tensor grad_x, grad_off, grad_mask, grad_filter;
    if (wanted[0]) {
      grad_x = at::zeros({s.batch, s.height, s.width, s.in_channels}, wide);
    }
    if (wanted[1] || wanted[2]) {
      grad_off = at::empty(off.sizes(), wide);  // also where only the mask's is wanted: one body makes both
      grad_mask = wanted[2] ? at::empty(msk.sizes(), wide) : at::Tensor();
    }
    if (wanted[3]) {
      grad_filter = at::zeros(filter.sizes(), wide);
    }
    const int64_t step = chunk(/*sorts=*/wanted[0] && at::globalContext().deterministicAlgorithms());
    for (int64_t first = 0; first < total(); first += step) {
      const auto p = device(first, step);
      const at::Tensor part = grad.narrow(1, first, p.count);
      if (wanted[0] || wanted[1] || wanted[2]) {
        const at::Tensor grad_columns = at::bmm(part, filter);
        const T* data = grad_columns.template const_data_ptr<T>();
        if (grad_off.defined()) {
          with_width([&](auto width) {
            Launcher::run(
                p.items(), SampleGradient<T, A, decltype(width)::value>{
                               p, data, grad_off.template mutable_data_ptr<A>(),
                               grad_mask.defined() ? grad_mask.template mutable_data_ptr<A>() : nullptr});
          });
        }
        if (wanted[0]) {
          input_gradient(p, data, grad_x.template mutable_data_ptr<A>());
        }
      }
      if (wanted[3]) {
        grad_filter += at::bmm(part.transpose(1, 2), sample(p)).to(wide.dtype());
      }
    }

    DeformConv2dGradients result = no_gradients(x);
    if (wanted[0]) {
      std::get<0>(result) = grad_x.permute({0, 3, 1, 2}).to(x.scalar_type());
    }
    if (wanted[1]) {
      std::get<1>(result) = grad_off;
    }
    if (wanted[2]) {
      std::get<2>(result) = grad_mask;
    }
    if (wanted[3]) {
      std::get<3>(result) = at::empty(weight.sizes(), weight.options());
      std::get<3>(result).copy_(
          grad_filter.view({s.out_channels, s.kernel_h, s.kernel_w, s.group_in()}).permute({0, 3, 1, 2}));
    }
    if (wanted[4]) {
      std::get<4>(result) = grad.to(wide.dtype()).sum(1).view({s.out_channels}).to(weight.scalar_type());
    }
    return result;
  }

 private:
  static constexpr int64_t kColumnBytes = 64 << 20;  // a bound on memory

  int64_t total() const { return s.batch * s.positions(); }

  // Output positions at a time: as many as have room in the columns and, where they are sorted, among the
  // contributions.
  int64_t chunk(bool sorts) const {
    const int64_t bytes = s.taps() * s.in_channels * static_cast<int64_t>(sizeof(T));
    const int64_t fit = sorts ? kContributions / (s.taps() * s.offset_groups * 4) : total();
    return std::max<int64_t>(std::min({kColumnBytes / bytes, fit, total()}), 1);
  }

  DeformConv2dDevice<T, A> device(int64_t first, int64_t step) const {
    return {
        s,
        x.template const_data_ptr<T>(),
        off.template const_data_ptr<A>(),
        msk.defined() ? msk.template const_data_ptr<A>() : nullptr,
        first,
        std::min(step, total() - first)};
  }

  // [groups, O / groups, taps * C / groups], channels fastest.
  at::Tensor filters(const at::Tensor& weight) const {
    return weight.permute({0, 2, 3, 1}).reshape({s.groups, s.group_out(), s.taps() * s.group_in()});
  }

  // Sixteen bytes at a time where the channels of a group allow it.
  template <typename Body>
  void with_width(const Body& body) const {
    constexpr int kWide = 16 / sizeof(T);
    const bool fits = s.offset_group_channels() % kWide == 0 && s.group_in() % kWide == 0 &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    if (fits) {
      body(std::integral_constant<int, kWide>{});
    } else {
      body(std::integral_constant<int, 1>{});
    }
  }

  // [groups, count, taps * C / groups]
  at::Tensor sample(const DeformConv2dDevice<T, A>& p) const {
    at::Tensor columns = at::empty({s.groups, p.count, s.taps() * s.group_in()}, x.options());
    with_width([&](auto width) {
      Launcher::run(p.items(), SampleColumns<T, A, decltype(width)::value>{p, columns.template mutable_data_ptr<T>()});
    });
    return columns;
  }

  void input_gradient(const DeformConv2dDevice<T, A>& p, const T* grad_columns, A* grad_input) const {
    if (!at::globalContext().deterministicAlgorithms()) {
      Launcher::run(p.items(), ScatterInputGradient<T, A>{p, grad_columns, grad_input});
      return;
    }
    at::Tensor keys = at::empty({p.items() * 4}, x.options().dtype(at::kLong));
    Launcher::run(p.items(), CornerKeys<T, A>{p, keys.mutable_data_ptr<int64_t>()});
    gather<Launcher>(keys, p.pixels(), [&](const Contributions& from) {
      return GatherInputGradient<T, A>{p, grad_columns, from, grad_input};
    });
  }

  DeformConv2dSizes s;
  at::TensorOptions wide;
  at::Tensor x, off, msk;
};

// Entry points for every backend: checks, dispatch on the data type, the caller's memory format and dtypes.
template <typename Launcher>
at::Tensor deform_conv2d_device(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const auto s = check_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation);
  const DeviceScope<Launcher> scope(input.device());
  at::Tensor output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d", [&] {
    output = DeformConv2dPipeline<Launcher, scalar_t>(s, input, offset, mask).forward(weight, bias);
  });
  return output.permute({0, 3, 1, 2}).contiguous(input.suggest_memory_format());
}

template <typename Launcher>
DeformConv2dGradients deform_conv2d_backward_device(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    std::array<bool, 5> output_mask) {
  const auto s = check_deform_conv2d(input, offset, mask, weight, std::nullopt, stride, padding, dilation);
  check_deform_conv2d_grad(grad_output, input, mask, s, output_mask);
  const DeviceScope<Launcher> scope(input.device());
  DeformConv2dGradients result;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d_backward", [&] {
    result =
        DeformConv2dPipeline<Launcher, scalar_t>(s, input, offset, mask).backward(grad_output, weight, output_mask);
  });
  if (output_mask[0]) {
    std::get<0>(result) = std::get<0>(result).contiguous(input.suggest_memory_format());
  }
  if (output_mask[1]) {
    std::get<1>(result) = std::get<1>(result).to(offset.scalar_type());
  }
  if (output_mask[2]) {
    std::get<2>(result) = std::get<2>(result).to(mask->scalar_type());
  }
  return result;
}

}  // namespace dk
