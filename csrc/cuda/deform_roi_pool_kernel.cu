// CUDA registrations of deform_roi_pool; the kernels' bodies are in common/roi_pool_device.h.

#include <torch/library.h>

#include "common/deform_roi_pool_device.h"
#include "cuda/launcher.cuh"

TORCH_LIBRARY_IMPL(dk_detection, CUDA, m) {
  m.impl("deform_roi_pool", &dk::deform_roi_pool_device<dk::CudaLauncher>);
  m.impl("deform_roi_pool_backward", &dk::deform_roi_pool_backward_device<dk::CudaLauncher>);
}
