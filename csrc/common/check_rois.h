// The check of what RoIs hold, on the device they lie on.
#pragma once

#include <ATen/ATen.h>

#include "common/launch.h"
#include "common/roi_sampling.h"

namespace dk {

template <typename A>
struct MarkInvalidRois {
  RoiPoolSizes s;
  const A* rois;
  int64_t* marks;  // [n]: the RoI's number if it is invalid, else n

  template <typename Lanes>
  DK_HOST_DEVICE void operator()(int64_t roi, const Lanes& lanes) const {
    if (lanes.index() == 0) {
      marks[roi] = is_valid_roi(rois + roi * 5, s) ? s.rois : roi;
    }
  }
};

// Raises ValueError for the first RoI that is_valid_roi refuses. One reduction and one wait for its result; while a
// CUDA graph is recorded there is no waiting, and the kernels alone keep invalid RoIs from reading anything.
template <typename Launcher, typename A>
void check_roi_values(const char* name, const at::Tensor& rois, const RoiPoolSizes& s) {
  if (s.rois == 0 || !Launcher::may_wait()) {
    return;
  }
  const at::Tensor marks = at::empty({s.rois}, rois.options().dtype(at::kLong));
  Launcher::run(s.rois, MarkInvalidRois<A>{s, rois.const_data_ptr<A>(), marks.mutable_data_ptr<int64_t>()});
  const int64_t first = marks.min().item<int64_t>();
  if (first == s.rois) {
    return;
  }
  const at::Tensor row = rois.select(0, first).to(at::kCPU, at::kDouble);
  const at::ArrayRef<double> roi(row.const_data_ptr<double>(), 5);
  const bool index_fits = roi[0] >= 0 && roi[0] < static_cast<double>(s.batch) && roi[0] == std::floor(roi[0]);
  TORCH_CHECK_VALUE(
      index_fits, name, ": rois[", first, "] = ", roi, " has batch index ", roi[0], ", expected an integer in [0, ",
      s.batch, ")");
  TORCH_CHECK_VALUE(
      false, name, ": rois[", first, "] = ", roi, " has coordinates that are not finite, or not once scaled by ",
      s.spatial_scale);
}

}  // namespace dk
