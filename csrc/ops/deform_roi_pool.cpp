#include "ops/deform_roi_pool.h"

#include <torch/library.h>

namespace dk {

RoiPoolSizes check_deform_roi_pool(
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma) {
  constexpr const char* kName = "deform_roi_pool";
  RoiPoolSizes s = check_roi_pool(kName, input, rois, output_size, spatial_scale, gamma);
  s.samples = sampling_ratio;
  check_roi_pool_parts(kName, input, offset, mask, s);
  return s;
}

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool[3] output_mask) -> (Tensor, "
      "Tensor, Tensor)");
}
