#include "ops/deform_conv2d.h"

#include <torch/library.h>

#include <vector>

namespace dk {

namespace {

constexpr const char* kName = "deform_conv2d";

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - (dilation * (kernel - 1) + 1);
  return span < 0 ? 0 : span / stride + 1;
}

void check_pair(const char* argument, at::IntArrayRef values, int64_t least) {
  TORCH_CHECK_VALUE(
      values.size() == 2 && values[0] >= least && values[1] >= least, kName, ": ", argument,
      " must be two integers of at least ", least, ", got ", values);
}

void check_map(
    const at::Tensor& map, const char* argument, int64_t channels, const char* rule, const DeformConv2dSizes& s) {
  TORCH_CHECK_VALUE(
      map.dim() == 4 && map.size(0) == s.batch && map.size(1) == channels && map.size(2) == s.out_h &&
          map.size(3) == s.out_w,
      kName, ": ", argument, " has shape ", map.sizes(), ", expected [", s.batch, ", ", channels, ", ", s.out_h, ", ",
      s.out_w, "]: [batch, ", rule, ", out_h, out_w] with offset_groups=", s.offset_groups, ", kernel ", s.kernel_h,
      "x", s.kernel_w);
}

}  // namespace

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
      input.dim() == 4, kName, ": input must be [batch, channels, height, width], got shape ", input.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4, kName, ": weight must be [out_channels, in_channels / groups, kH, kW], got shape ",
      weight.sizes());
  TORCH_CHECK_VALUE(offset.dim() == 4, kName, ": offset must have 4 dimensions, got shape ", offset.sizes());
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);

  DeformConv2dSizes s{};
  s.batch = input.size(0), s.in_channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.padding_h = padding[0], s.padding_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  TORCH_CHECK_VALUE(weight.numel() > 0, kName, ": weight must not be empty, got shape ", weight.sizes());
  TORCH_CHECK_VALUE(
      s.in_channels > 0 && s.in_channels % weight.size(1) == 0, kName, ": input has ", s.in_channels,
      " channels, expected a positive multiple of weight.size(1) = ", weight.size(1));
  s.groups = s.in_channels / weight.size(1);
  TORCH_CHECK_VALUE(
      s.out_channels % s.groups == 0, kName, ": weight has ", s.out_channels,
      " output channels, expected a multiple of groups = ", s.groups);
  const int64_t per_group = 2 * s.taps();
  TORCH_CHECK_VALUE(
      offset.size(1) > 0 && offset.size(1) % per_group == 0, kName, ": offset has ", offset.size(1),
      " channels, expected a positive multiple of 2 * kH * kW = ", per_group);
  s.offset_groups = offset.size(1) / per_group;
  TORCH_CHECK_VALUE(
      s.in_channels % s.offset_groups == 0, kName, ": offset has ", offset.size(1),
      " channels, so offset_groups = ", s.offset_groups, ", which does not divide the ", s.in_channels,
      " channels of input");
  s.out_h = output_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  s.out_w = output_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  TORCH_CHECK_VALUE(
      s.out_h > 0 && s.out_w > 0, kName, ": the output would be empty: input ", s.height, "x", s.width,
      " with padding ", padding, " is smaller than the kernel ", s.kernel_h, "x", s.kernel_w, " with dilation ",
      dilation);
  check_map(offset, "offset", s.offset_groups * per_group, "2 * offset_groups * kH * kW", s);
  if (mask) {
    check_map(*mask, "mask", s.offset_groups * s.taps(), "offset_groups * kH * kW", s);
  }
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == s.out_channels, kName, ": bias has shape ", bias->sizes(), ", expected [",
        s.out_channels, "]");
  }

  const auto check_tensor = [&](const at::Tensor& tensor, const char* argument, bool same_dtype) {
    TORCH_CHECK_VALUE(
        tensor.device() == input.device(), kName, ": ", argument, " is on ", tensor.device(),
        ", expected the device of input, ", input.device());
    TORCH_CHECK_TYPE(
        same_dtype ? tensor.scalar_type() == input.scalar_type() : at::isFloatingType(tensor.scalar_type()), kName,
        ": ", argument, " is ", tensor.scalar_type(), ", expected ",
        same_dtype ? toString(input.scalar_type()) : "a floating-point type", " (input is ", input.scalar_type(), ")");
  };
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, kName, ": input is ",
      dtype, ", expected float64, float32, float16 or bfloat16");
  check_tensor(weight, "weight", true);
  check_tensor(offset, "offset", false);
  if (mask) {
    check_tensor(*mask, "mask", false);
  }
  if (bias) {
    check_tensor(*bias, "bias", true);
  }
  return s;
}

void check_deform_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& mask,
    const DeformConv2dSizes& s,
    std::array<bool, 5> output_mask) {
  const std::vector<int64_t> expected = {s.batch, s.out_channels, s.out_h, s.out_w};
  TORCH_CHECK_VALUE(
      grad_output.sizes() == expected, kName, ": grad_output has shape ", grad_output.sizes(), ", expected ", expected);
  TORCH_CHECK_VALUE(
      grad_output.device() == input.device(), kName, ": grad_output is on ", grad_output.device(),
      ", expected the device of input, ", input.device());
  TORCH_CHECK_TYPE(
      grad_output.scalar_type() == input.scalar_type(), kName, ": grad_output is ", grad_output.scalar_type(),
      ", expected the dtype of input, ", input.scalar_type());
  TORCH_CHECK_VALUE(mask || !output_mask[2], kName, ": a gradient of mask is asked for, but there is no mask");
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
