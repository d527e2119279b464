// CUDA registrations of deform_conv2d; the kernels' bodies are in common/deform_conv2d_device.h.

#include <torch/library.h>

#include "common/deform_conv2d_device.h"
#include "cuda/launcher.cuh"

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("deform_conv2d", &dk::deform_conv2d_device<dk::CudaLauncher>);
  m.impl("deform_conv2d_backward", &dk::deform_conv2d_backward_device<dk::CudaLauncher>);
}

// The same by names of their own: what serves a call where another kernel has taken these places (ops/fused.py).
TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def("_deform_conv2d_cuda", &dk::deform_conv2d_device<dk::CudaLauncher>);
  m.def("_deform_conv2d_cuda_backward", &dk::deform_conv2d_backward_device<dk::CudaLauncher>);
}
