// CUDA registrations of deform_psroi_pool; the kernels' bodies are in common/roi_pool_device.h.

#include <torch/library.h>

#include "common/deform_psroi_pool_device.h"
#include "cuda/launcher.cuh"

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("deform_psroi_pool", &dk::deform_psroi_pool_device<dk::CudaLauncher>);
  m.impl("deform_psroi_pool_backward", &dk::deform_psroi_pool_backward_device<dk::CudaLauncher>);
}
