// Test-only operators: the device's bodies on the host, one lane an item in a plain loop and 32 lanes in lock step, so
// that machines without a GPU prove the device arithmetic, its strides and its sums over lanes.

#include <torch/library.h>

#include "common/deform_roi_pool_device.h"
#include "cpu/lock_step.h"

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def("_deform_roi_pool_host_run", &dk::deform_roi_pool_device<dk::HostLauncher>);
  m.def("_deform_roi_pool_host_run_backward", &dk::deform_roi_pool_backward_device<dk::HostLauncher>);
#ifdef DK_HAS_LOCK_STEP
  m.def("_deform_roi_pool_lock_step", &dk::deform_roi_pool_device<dk::LockStepLauncher>);
  m.def("_deform_roi_pool_lock_step_backward", &dk::deform_roi_pool_backward_device<dk::LockStepLauncher>);
#endif
}
