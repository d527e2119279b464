// Test-only operators: the device's bodies on the host, one lane an item in a plain loop and 32 lanes in lock step, so
// that machines without a GPU prove the device arithmetic, its strides and its sums over lanes.

#include <torch/library.h>

#include "common/deform_kernel_conv2d_device.h"
#include "cpu/lock_step.h"

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def("_deform_kernel_conv2d_host_run", &dk::deform_kernel_conv2d_device<dk::HostLauncher>);
  m.def("_deform_kernel_conv2d_host_run_backward", &dk::deform_kernel_conv2d_backward_device<dk::HostLauncher>);
#ifdef DK_HAS_LOCK_STEP
  m.def("_deform_kernel_conv2d_lock_step", &dk::deform_kernel_conv2d_device<dk::LockStepLauncher>);
  m.def("_deform_kernel_conv2d_lock_step_backward", &dk::deform_kernel_conv2d_backward_device<dk::LockStepLauncher>);
#endif
}
