// CUDA registrations of kernel_evolution_conv2d; the kernels' bodies are in common/kernel_evolution_conv2d_device.h.

#include <torch/library.h>

#include "common/kernel_evolution_conv2d_device.h"
#include "cuda/launcher.cuh"

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("kernel_evolution_conv2d", &dk::kernel_evolution_conv2d_device<dk::CudaLauncher>);
  m.impl("kernel_evolution_conv2d_backward", &dk::kernel_evolution_conv2d_backward_device<dk::CudaLauncher>);
}
