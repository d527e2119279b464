// Host registrations of deform_roi_pool; the kernels are in cpu/roi_pool.h.

#include <torch/library.h>

#include "cpu/roi_pool.h"
#include "ops/deform_roi_pool.h"

namespace dk {

namespace {

at::Tensor deform_roi_pool_cpu(
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool_cpu<AlignedBins>("deform_roi_pool", s, input, rois, offset, mask);
}

RoiPoolGradients deform_roi_pool_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    std::array<bool, 3> output_mask) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool_backward_cpu<AlignedBins>("deform_roi_pool", s, grad_output, input, rois, offset, mask, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("deform_roi_pool", &dk::deform_roi_pool_cpu);
  m.impl("deform_roi_pool_backward", &dk::deform_roi_pool_backward_cpu);
}
