// Test-only operators: the device's bodies in a plain loop, so that machines without a GPU prove the device arithmetic.

#include <torch/library.h>

#include "common/deform_roi_pool_device.h"

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "_deform_roi_pool_host_run(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma) -> Tensor");
  m.def(
      "_deform_roi_pool_host_run_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
      "Tensor? mask, int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("_deform_roi_pool_host_run", &dk::deform_roi_pool_device<dk::HostLauncher>);
  m.impl("_deform_roi_pool_host_run_backward", &dk::deform_roi_pool_backward_device<dk::HostLauncher>);
}
