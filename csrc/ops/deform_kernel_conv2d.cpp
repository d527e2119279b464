#include "ops/deform_kernel_conv2d.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace dk {

namespace {

constexpr const char* kName = "deform_kernel_conv2d";

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
      weight.dim() == 4 && weight.numel() > 0, kName,
      ": weight must be [out_channels, in_channels / groups, scopeH, scopeW] and not empty, got shape ",
      weight.sizes());
  TORCH_CHECK_VALUE(
      kernel_offset.dim() == 7 && kernel_offset.size(4) == 2 && kernel_offset.size(1) > 0 &&
          kernel_offset.size(2) > 0 && kernel_offset.size(3) > 0,
      kName, ": kernel_offset must be [batch, kernel_offset_groups, kH, kW, 2, out_h, out_w], got shape ",
      kernel_offset.sizes());
  DeformKernelConv2dSizes s{check_convolution(
      kName, input, weight, bias, {kernel_offset.size(2), kernel_offset.size(3)}, stride, padding, dilation)};
  s.scope_h = weight.size(2), s.scope_w = weight.size(3);
  s.clip = clip;
  TORCH_CHECK_VALUE(
      s.scope_h >= s.kernel_h && s.scope_w >= s.kernel_w, kName, ": weight has a scope of ", s.scope_h, "x", s.scope_w,
      ", expected at least the kernel size ", s.kernel_h, "x", s.kernel_w);
  s.kernel_offset_groups = kernel_offset.size(1);
  TORCH_CHECK_VALUE(
      s.in_channels % s.kernel_offset_groups == 0, kName, ": kernel_offset has ", s.kernel_offset_groups,
      " groups, which do not divide the ", s.in_channels, " channels of input");
  TORCH_CHECK_VALUE(
      kernel_offset.size(0) == s.batch && kernel_offset.size(5) == s.out_h && kernel_offset.size(6) == s.out_w, kName,
      ": kernel_offset has shape ", kernel_offset.sizes(), ", expected batch ", s.batch, " and output size ", s.out_h,
      "x", s.out_w);
  check_tensor(kName, "kernel_offset", kernel_offset, input, false);
  check_sampling(kName, input, offset, mask, s);
  return s;
}

void check_deform_kernel_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const DeformKernelConv2dSizes& s,
    std::array<bool, 6> output_mask) {
  check_grad_output(kName, grad_output, input, {s.batch, s.out_channels, s.out_h, s.out_w});
  check_asked(kName, "offset", offset.has_value(), output_mask[2]);
  check_asked(kName, "mask", mask.has_value(), output_mask[3]);
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
