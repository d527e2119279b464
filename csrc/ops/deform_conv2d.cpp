#include "ops/deform_conv2d.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace dk {

namespace {

constexpr const char* kName = "deform_conv2d";

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - (dilation * (kernel - 1) + 1);
  return span < 0 ? 0 : span / stride + 1;
}

// The number of groups whose offsets or modulations `map` holds: `values` of them for each tap.
int64_t count_groups(
    const char* name, const at::Tensor& map, const char* argument, int64_t values, const DeformConv2dSizes& s) {
  TORCH_CHECK_VALUE(map.dim() == 4, name, ": ", argument, " must have 4 dimensions, got shape ", map.sizes());
  const int64_t per_group = values * s.taps(), groups = map.size(1) / per_group;
  TORCH_CHECK_VALUE(
      groups > 0 && map.size(1) % per_group == 0, name, ": ", argument, " has ", map.size(1),
      " channels, expected a positive multiple of ", values == 2 ? "2 * kH * kW = " : "kH * kW = ", per_group);
  TORCH_CHECK_VALUE(
      s.in_channels % groups == 0, name, ": ", argument, " has ", map.size(1), " channels, so offset_groups = ", groups,
      ", which does not divide the ", s.in_channels, " channels of input");
  return groups;
}

void check_map(
    const char* name, const at::Tensor& map, const char* argument, int64_t values, const DeformConv2dSizes& s) {
  const int64_t channels = values * s.offset_groups * s.taps();
  TORCH_CHECK_VALUE(
      map.dim() == 4 && map.size(0) == s.batch && map.size(1) == channels && map.size(2) == s.out_h &&
          map.size(3) == s.out_w,
      name, ": ", argument, " has shape ", map.sizes(), ", expected [", s.batch, ", ", channels, ", ", s.out_h, ", ",
      s.out_w, "]: [batch, ", values == 2 ? "2 * " : "",
      "offset_groups * kH * kW, out_h, out_w] with offset_groups=", s.offset_groups, ", kernel ", s.kernel_h, "x",
      s.kernel_w);
}

}  // namespace

DeformConv2dSizes check_convolution(
    const char* name,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    std::array<int64_t, 2> kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(
      input.dim() == 4, name, ": input must be [batch, channels, height, width], got shape ", input.sizes());
  check_int_pair(name, "stride", stride, 1);
  check_int_pair(name, "padding", padding, 0);
  check_int_pair(name, "dilation", dilation, 1);

  DeformConv2dSizes s{};
  s.batch = input.size(0), s.in_channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.padding_h = padding[0], s.padding_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  TORCH_CHECK_VALUE(
      s.in_channels > 0 && s.in_channels % weight.size(1) == 0, name, ": input has ", s.in_channels,
      " channels, expected a positive multiple of weight.size(1) = ", weight.size(1));
  s.groups = s.in_channels / weight.size(1);
  TORCH_CHECK_VALUE(
      s.out_channels % s.groups == 0, name, ": weight has ", s.out_channels,
      " output channels, expected a multiple of groups = ", s.groups);
  s.out_h = output_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  s.out_w = output_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  TORCH_CHECK_VALUE(
      s.out_h > 0 && s.out_w > 0, name, ": the output would be empty: input ", s.height, "x", s.width, " with padding ",
      padding, " is smaller than the kernel ", s.kernel_h, "x", s.kernel_w, " with dilation ", dilation);
  check_input_dtype(name, input);
  check_tensor(name, "weight", weight, input, true);
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == s.out_channels, name, ": bias has shape ", bias->sizes(), ", expected [",
        s.out_channels, "]");
    check_tensor(name, "bias", *bias, input, true);
  }
  return s;
}

void check_sampling(
    const char* name,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    DeformConv2dSizes& s) {
  s.offset_groups = offset ? count_groups(name, *offset, "offset", 2, s)
                    : mask ? count_groups(name, *mask, "mask", 1, s)
                           : 1;
  if (offset) {
    check_map(name, *offset, "offset", 2, s);
    check_tensor(name, "offset", *offset, input, false);
  }
  if (mask) {
    check_map(name, *mask, "mask", 1, s);
    check_tensor(name, "mask", *mask, input, false);
  }
}

DeformConv2dSizes check_deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.numel() > 0, kName,
      ": weight must be [out_channels, in_channels / groups, kH, kW] and not empty, got shape ", weight.sizes());
  auto s = check_convolution(kName, input, weight, bias, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  check_sampling(kName, input, offset, mask, s);
  return s;
}

void check_deform_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& mask,
    const DeformConv2dSizes& s,
    std::array<bool, 5> output_mask) {
  check_grad_output(kName, grad_output, input, {s.batch, s.out_channels, s.out_h, s.out_w});
  check_asked(kName, "mask", mask.has_value(), output_mask[2]);
}

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[2] stride, int[2] "
      "padding, "
      "int[2] dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[2] "
      "stride, "
      "int[2] padding, int[2] dilation, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
