// Test-only operators: the device's bodies in a plain loop, so that machines without a GPU prove the device arithmetic.

#include <torch/library.h>

#include "common/deform_kernel_conv2d_device.h"

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "_deform_kernel_conv2d_host_run(Tensor input, Tensor kernel_offset, Tensor? offset, Tensor? mask, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, bool clip) -> Tensor");
  m.def(
      "_deform_kernel_conv2d_host_run_backward(Tensor grad_output, Tensor input, Tensor kernel_offset, Tensor? offset, "
      "Tensor? mask, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, bool clip, "
      "bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("_deform_kernel_conv2d_host_run", &dk::deform_kernel_conv2d_device<dk::HostLauncher>);
  m.impl("_deform_kernel_conv2d_host_run_backward", &dk::deform_kernel_conv2d_backward_device<dk::HostLauncher>);
}
