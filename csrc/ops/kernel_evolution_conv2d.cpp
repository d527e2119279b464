#include "ops/kernel_evolution_conv2d.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace dk {

namespace {

constexpr const char* kName = "kernel_evolution_conv2d";

}  // namespace

KernelEvolutionConv2dSizes check_kernel_evolution_conv2d(
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
  check_int_pair(kName, "kernel_size", kernel_size, 1);
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && weight.numel() > 0, kName,
      ": weight must be [out_channels, in_channels / groups, K] and not empty, got shape ", weight.sizes());
  KernelEvolutionConv2dSizes s{
      check_convolution(kName, input, weight, bias, {kernel_size[0], kernel_size[1]}, stride, padding, dilation)};
  s.locations = weight.size(2);
  TORCH_CHECK_VALUE(
      window.dim() == 4 && window.size(0) == s.in_channels && window.size(1) == s.locations && window.numel() > 0,
      kName, ": window has shape ", window.sizes(),
      ", expected [in_channels, K, rows, columns] with in_channels=", s.in_channels, ", K=", s.locations);
  s.window_h = window.size(2), s.window_w = window.size(3);
  TORCH_CHECK_VALUE(
      origin.dim() == 3 && origin.size(0) == s.in_channels && origin.size(1) == s.locations && origin.size(2) == 2,
      kName, ": origin has shape ", origin.sizes(), ", expected [", s.in_channels, ", ", s.locations,
      ", 2]: [in_channels, K, 2]");
  check_tensor(kName, "origin", origin, input, false);
  check_tensor(kName, "window", window, input, false);
  if (attention) {
    TORCH_CHECK_VALUE(
        attention->dim() == 4 && attention->size(0) == s.batch && attention->size(1) == s.locations &&
            attention->size(2) == s.out_h && attention->size(3) == s.out_w,
        kName, ": attention has shape ", attention->sizes(), ", expected [", s.batch, ", ", s.locations, ", ", s.out_h,
        ", ", s.out_w, "]: [batch, K, out_h, out_w]");
    check_tensor(kName, "attention", *attention, input, false);
  }
  return s;
}

void check_kernel_evolution_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& attention,
    const KernelEvolutionConv2dSizes& s,
    std::array<bool, 5> output_mask) {
  check_grad_output(kName, grad_output, input, {s.batch, s.out_channels, s.out_h, s.out_w});
  check_asked(kName, "attention", attention.has_value(), output_mask[2]);
}

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "kernel_evolution_conv2d(Tensor input, Tensor origin, Tensor window, Tensor? attention, Tensor weight, Tensor? "
      "bias, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "kernel_evolution_conv2d_backward(Tensor grad_output, Tensor input, Tensor origin, Tensor window, Tensor? "
      "attention, Tensor weight, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool[5] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
