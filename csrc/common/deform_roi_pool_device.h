// deform_roi_pool for devices: the entry points of every backend.
#pragma once

#include "common/roi_pool_device.h"
#include "ops/deform_roi_pool.h"

namespace dk {

template <typename Launcher>
at::Tensor deform_roi_pool_device(
    const at::Tensor& input,
    const at::Tensor& rois,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    at::IntArrayRef output_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const DeviceScope<Launcher> scope(input.device());
  return roi_pool_device<Launcher, AlignedBins>("deform_roi_pool", s, input, rois, offset, mask);
}

template <typename Launcher>
RoiPoolGradients deform_roi_pool_backward_device(
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
  const DeviceScope<Launcher> scope(input.device());
  return roi_pool_backward_device<Launcher, AlignedBins>(
      "deform_roi_pool", s, grad_output, input, rois, offset, mask, output_mask);
}

}  // namespace dk
