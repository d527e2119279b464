// The contract of deform_psroi_pool: sizes and guards, for all kernels.
#pragma once

#include "ops/roi_pool.h"

namespace dk {

// Checks everything a kernel relies on but the values of the RoIs, and returns the sizes. Raises ValueError or
// TypeError.
RoiPoolSizes check_deform_psroi_pool(
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
    double gamma);

}  // namespace dk
