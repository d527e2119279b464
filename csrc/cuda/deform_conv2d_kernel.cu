// CUDA registrations of deform_conv2d; the kernels' bodies are in common/deform_conv2d_device.h.

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/deform_conv2d_device.h"
#include "cuda/launcher.cuh"

namespace dk {

namespace {

at::Tensor deform_conv2d_cuda(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const c10::cuda::CUDAGuard guard(input.device());
  return deform_conv2d_device<CudaLauncher>(input, offset, mask, weight, bias, stride, padding, dilation);
}

DeformConv2dGradients deform_conv2d_backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    std::array<bool, 5> output_mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  return deform_conv2d_backward_device<CudaLauncher>(
      grad_output, input, offset, mask, weight, stride, padding, dilation, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("deform_conv2d", &dk::deform_conv2d_cuda);
  m.impl("deform_conv2d_backward", &dk::deform_conv2d_backward_cuda);
}
