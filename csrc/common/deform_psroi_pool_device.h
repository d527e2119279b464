// deform_psroi_pool for devices: the entry points of every backend.
#pragma once

#include "common/roi_pool_device.h"
#include "ops/deform_psroi_pool.h"

namespace dk {

template <typename Launcher>
at::Tensor deform_psroi_pool_device(
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
  const DeviceScope<Launcher> scope(input.device());
  return roi_pool_device<Launcher, RoundedBins>("deform_psroi_pool", s, input, rois, offset, mask);
}

template <typename Launcher>
RoiPoolGradients deform_psroi_pool_backward_device(
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
  const DeviceScope<Launcher> scope(input.device());
  return roi_pool_backward_device<Launcher, RoundedBins>(
      "deform_psroi_pool", s, grad_output, input, rois, offset, mask, output_mask);
}

}  // namespace dk
