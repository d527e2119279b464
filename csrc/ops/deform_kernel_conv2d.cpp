#include "ops/deform_kernel_conv2d.h"

#include <torch/library.h>

#include <vector>

namespace dk {

namespace {

constexpr const char* kName = "deform_kernel_conv2d";

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - (dilation * (kernel - 1) + 1);
  return span < 0 ? 0 : span / stride + 1;
}

void check_pair(const char* argument, at::IntArrayRef values, int64_t least) {
  TORCH_CHECK_VALUE(
      values.size() == 2 && values[0] >= least && values[1] >= least, kName, ": ", argument,
      " must be two integers of at least ", least, ", got ", values);
}

// The number of groups whose data offsets or modulations `map` holds: `values` of them for each tap.
int64_t map_groups(const at::Tensor& map, const char* argument, int64_t values, const DeformKernelConv2dSizes& s) {
  TORCH_CHECK_VALUE(map.dim() == 4, kName, ": ", argument, " must have 4 dimensions, got shape ", map.sizes());
  const int64_t per_group = values * s.taps(), groups = map.size(1) / per_group;
  TORCH_CHECK_VALUE(
      groups > 0 && map.size(1) % per_group == 0, kName, ": ", argument, " has ", map.size(1),
      " channels, expected a positive multiple of ", per_group, " (kernel ", s.kernel_h, "x", s.kernel_w, ")");
  TORCH_CHECK_VALUE(
      s.in_channels % groups == 0, kName, ": ", argument, " has ", map.size(1),
      " channels, so offset_groups = ", groups, ", which does not divide the ", s.in_channels, " channels of input");
  return groups;
}

void check_map(const at::Tensor& map, const char* argument, int64_t channels, const DeformKernelConv2dSizes& s) {
  TORCH_CHECK_VALUE(
      map.size(0) == s.batch && map.size(1) == channels && map.size(2) == s.out_h && map.size(3) == s.out_w, kName,
      ": ", argument, " has shape ", map.sizes(), ", expected [", s.batch, ", ", channels, ", ", s.out_h, ", ", s.out_w,
      "]: [batch, channels, out_h, out_w] with offset_groups=", s.offset_groups, ", kernel ", s.kernel_h, "x",
      s.kernel_w);
}

}  // namespace

DeformKernelConv2dSizes check_deform_kernel_conv2d(
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
  TORCH_CHECK_VALUE(
      input.dim() == 4, kName, ": input must be [batch, channels, height, width], got shape ", input.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.numel() > 0, kName,
      ": weight must be [out_channels, in_channels / groups, scopeH, scopeW] and not empty, got shape ",
      weight.sizes());
  TORCH_CHECK_VALUE(
      kernel_offset.dim() == 7 && kernel_offset.size(4) == 2 && kernel_offset.size(1) > 0 &&
          kernel_offset.size(2) > 0 && kernel_offset.size(3) > 0,
      kName, ": kernel_offset must be [batch, kernel_offset_groups, kH, kW, 2, out_h, out_w], got shape ",
      kernel_offset.sizes());
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);

  DeformKernelConv2dSizes s{};
  s.batch = input.size(0), s.in_channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.scope_h = weight.size(2), s.scope_w = weight.size(3);
  s.kernel_h = kernel_offset.size(2), s.kernel_w = kernel_offset.size(3);
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.padding_h = padding[0], s.padding_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  s.clip = clip;
  TORCH_CHECK_VALUE(
      s.scope_h >= s.kernel_h && s.scope_w >= s.kernel_w, kName, ": weight has a scope of ", s.scope_h, "x", s.scope_w,
      ", expected at least the kernel size ", s.kernel_h, "x", s.kernel_w);
  TORCH_CHECK_VALUE(
      s.in_channels > 0 && s.in_channels % weight.size(1) == 0, kName, ": input has ", s.in_channels,
      " channels, expected a positive multiple of weight.size(1) = ", weight.size(1));
  s.groups = s.in_channels / weight.size(1);
  TORCH_CHECK_VALUE(
      s.out_channels % s.groups == 0, kName, ": weight has ", s.out_channels,
      " output channels, expected a multiple of groups = ", s.groups);
  s.out_h = output_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  s.out_w = output_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  TORCH_CHECK_VALUE(
      s.out_h > 0 && s.out_w > 0, kName, ": the output would be empty: input ", s.height, "x", s.width,
      " with padding ", padding, " is smaller than the kernel ", s.kernel_h, "x", s.kernel_w, " with dilation ",
      dilation);
  s.kernel_offset_groups = kernel_offset.size(1);
  TORCH_CHECK_VALUE(
      s.in_channels % s.kernel_offset_groups == 0, kName, ": kernel_offset has ", s.kernel_offset_groups,
      " groups, which do not divide the ", s.in_channels, " channels of input");
  TORCH_CHECK_VALUE(
      kernel_offset.size(0) == s.batch && kernel_offset.size(5) == s.out_h && kernel_offset.size(6) == s.out_w, kName,
      ": kernel_offset has shape ", kernel_offset.sizes(), ", expected batch ", s.batch, " and output size ", s.out_h,
      "x", s.out_w);
  s.offset_groups = offset ? map_groups(*offset, "offset", 2, s) : mask ? map_groups(*mask, "mask", 1, s) : 1;
  if (offset) {
    check_map(*offset, "offset", 2 * s.offset_groups * s.taps(), s);
  }
  if (mask) {
    TORCH_CHECK_VALUE(mask->dim() == 4, kName, ": mask must have 4 dimensions, got shape ", mask->sizes());
    check_map(*mask, "mask", s.offset_groups * s.taps(), s);
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
  check_tensor(kernel_offset, "kernel_offset", false);
  if (offset) {
    check_tensor(*offset, "offset", false);
  }
  if (mask) {
    check_tensor(*mask, "mask", false);
  }
  if (bias) {
    check_tensor(*bias, "bias", true);
  }
  return s;
}

void check_deform_kernel_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const DeformKernelConv2dSizes& s,
    std::array<bool, 6> output_mask) {
  const std::vector<int64_t> expected = {s.batch, s.out_channels, s.out_h, s.out_w};
  TORCH_CHECK_VALUE(
      grad_output.sizes() == expected, kName, ": grad_output has shape ", grad_output.sizes(), ", expected ", expected);
  TORCH_CHECK_VALUE(
      grad_output.device() == input.device(), kName, ": grad_output is on ", grad_output.device(),
      ", expected the device of input, ", input.device());
  TORCH_CHECK_TYPE(
      grad_output.scalar_type() == input.scalar_type(), kName, ": grad_output is ", grad_output.scalar_type(),
      ", expected the dtype of input, ", input.scalar_type());
  TORCH_CHECK_VALUE(offset || !output_mask[2], kName, ": a gradient of offset is asked for, but there is no offset");
  TORCH_CHECK_VALUE(mask || !output_mask[3], kName, ": a gradient of mask is asked for, but there is no mask");
}

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "deform_kernel_conv2d(Tensor input, Tensor kernel_offset, Tensor? offset, Tensor? mask, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, bool clip) -> Tensor");
  m.def(
      "deform_kernel_conv2d_backward(Tensor grad_output, Tensor input, Tensor kernel_offset, Tensor? offset, "
      "Tensor? mask, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, bool clip, "
      "bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
