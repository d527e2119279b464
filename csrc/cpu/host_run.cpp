// Test-only operators about the backends that run a device's bodies on the host.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "common/launch.h"
#include "cpu/lock_step.h"

namespace dk {

namespace {

#ifdef DK_HAS_LOCK_STEP
// Each item's 32 values, added up by its lanes. Lane `absent` does not take part in the last item's sum.
struct SumLanes {
  const float* values;
  float* sums;
  int64_t items, absent;

  template <typename Lanes>
  void operator()(int64_t item, const Lanes& lanes) const {
    const int64_t i = item * lanes.count() + lanes.index();
    if (item + 1 < items || lanes.index() != absent) {
      sums[i] = lanes.sum(values[i]);
    }
  }
};

at::Tensor lock_step_sum(const at::Tensor& values, int64_t absent) {
  TORCH_CHECK(
      values.dim() == 2 && values.size(1) == LockStepWarp::kLanes, "expected [items, 32], got ", values.sizes());
  at::Tensor sums = at::zeros_like(values);
  LockStepLauncher::run(
      values.size(0), SumLanes{values.const_data_ptr<float>(), sums.mutable_data_ptr<float>(), values.size(0), absent});
  return sums;
}
#endif

}  // namespace

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def("_host_run_record", [](bool recording) { dk::HostLauncher::recording = recording; });
  m.def("_host_run_lag", [](bool lagging) {
    dk::HostLauncher::lagging = lagging;
    if (!lagging) {
      dk::HostLauncher::reported = dk::HostLauncher::late;
      dk::HostLauncher::late = 0;
    }
  });
  m.def("_host_run_limits", [](int64_t column_bytes, int64_t contributions, int64_t elements) {
    dk::HostLauncher::limits = {column_bytes, contributions, elements};
  });
#ifdef DK_HAS_LOCK_STEP
  m.def("_lock_step_sum", &dk::lock_step_sum);
#endif
}
