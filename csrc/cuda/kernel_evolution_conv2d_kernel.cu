// CUDA registrations of kernel_evolution_conv2d; the kernels' bodies are in common/kernel_evolution_conv2d_device.h.

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/kernel_evolution_conv2d_device.h"
#include "cuda/launcher.cuh"

namespace dk {

namespace {

at::Tensor kernel_evolution_conv2d_cuda(
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
  const c10::cuda::CUDAGuard guard(input.device());
  return kernel_evolution_conv2d_device<CudaLauncher>(
      input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation);
}

KernelEvolutionConv2dGradients kernel_evolution_conv2d_backward_cuda(
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
  const c10::cuda::CUDAGuard guard(input.device());
  return kernel_evolution_conv2d_backward_device<CudaLauncher>(
      grad_output, input, origin, window, attention, weight, kernel_size, stride, padding, dilation, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("kernel_evolution_conv2d", &dk::kernel_evolution_conv2d_cuda);
  m.impl("kernel_evolution_conv2d_backward", &dk::kernel_evolution_conv2d_backward_cuda);
}
