// Host registrations of deform_psroi_pool; the kernels are in cpu/roi_pool.h.

#include <torch/library.h>

#include "cpu/roi_pool.h"
#include "ops/deform_psroi_pool.h"

namespace dk {

namespace {

at::Tensor deform_psroi_pool_cpu(
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t output_channels,
    int64_t group_size,
    at::IntArrayRef part_size,
    int64_t samples_per_part,
    double gamma) {
  const auto s = check_deform_psroi_pool(
      input, rois, offset, mask, output_size, spatial_scale, output_channels, group_size, part_size, samples_per_part,
      gamma);
  return roi_pool_cpu<RoundedBins>("deform_psroi_pool", s, input, rois, offset, mask);
}

RoiPoolGradients deform_psroi_pool_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t output_channels,
    int64_t group_size,
    at::IntArrayRef part_size,
    int64_t samples_per_part,
    double gamma,
    std::array<bool, 3> output_mask) {
  const auto s = check_deform_psroi_pool(
      input, rois, offset, mask, output_size, spatial_scale, output_channels, group_size, part_size, samples_per_part,
      gamma);
  return roi_pool_backward_cpu<RoundedBins>(
      "deform_psroi_pool", s, grad_output, input, rois, offset, mask, output_mask);
}

}  // namespace

}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detection, CPU, m) {
  m.impl("deform_psroi_pool", &dk::deform_psroi_pool_cpu);
  m.impl("deform_psroi_pool_backward", &dk::deform_psroi_pool_backward_cpu);
}
