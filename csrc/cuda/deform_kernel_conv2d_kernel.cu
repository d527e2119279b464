// CUDA registrations of deform_kernel_conv2d; the kernels' bodies are in common/deform_kernel_conv2d_device.h.

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/deform_kernel_conv2d_device.h"
#include "cuda/launcher.cuh"

namespace dk {

namespace {

at::Tensor deform_kernel_conv2d_cuda(
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
  const c10::cuda::CUDAGuard guard(input.device());
  return deform_kernel_conv2d_device<CudaLauncher>(
      input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip);
}

DeformKernelConv2dGradients deform_kernel_conv2d_backward_cuda(
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
  const c10::cuda::CUDAGuard guard(input.device());
  return deform_kernel_conv2d_backward_device<CudaLauncher>(
      grad_output, input, kernel_offset, offset, mask, weight, stride, padding, dilation, clip, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cuda);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cuda);
}
