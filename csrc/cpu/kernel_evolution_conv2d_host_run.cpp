// Test-only operators: the device's bodies in a plain loop, so that machines without a GPU prove the device arithmetic.

#include <torch/library.h>

#include "common/kernel_evolution_conv2d_device.h"

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "_kernel_evolution_conv2d_host_run(Tensor input, Tensor origin, Tensor window, Tensor? attention, Tensor weight, "
      "Tensor? bias, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  m.def(
      "_kernel_evolution_conv2d_host_run_backward(Tensor grad_output, Tensor input, Tensor origin, Tensor window, "
      "Tensor? attention, Tensor weight, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool[5] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("_kernel_evolution_conv2d_host_run", &dk::kernel_evolution_conv2d_device<dk::HostLauncher>);
  m.impl("_kernel_evolution_conv2d_host_run_backward", &dk::kernel_evolution_conv2d_backward_device<dk::HostLauncher>);
}
