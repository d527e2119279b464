// What the contracts of deform_roi_pool and deform_psroi_pool have in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/host_device.h"

namespace dk {

// I is the type of indices. Where tensors are small enough, a GPU computes with 32 bits.
template <typename I>
struct RoiPoolSizesOf {
  I batch, in_channels, height, width;   // the input
  I rois, channels, pooled_h, pooled_w;  // the output
  // Bins are dealt out to group x group cells: output channel c of cell (i, j) reads input channel (c * group + i) *
  // group + j.
  I group;
  // Offset and mask: each of `classes` runs of consecutive output channels has part_h x part_w parts, which bins are
  // dealt out to.
  I classes, part_h, part_w;
  I samples;  // along each axis of a bin; 0 or less: one for each pixel it covers
  double spatial_scale, gamma;

  DK_HOST_DEVICE I bins() const { return pooled_h * pooled_w; }
  DK_HOST_DEVICE I cells() const { return group * group; }
  DK_HOST_DEVICE I parts() const { return part_h * part_w; }
  DK_HOST_DEVICE I class_channels() const { return channels / classes; }
  DK_HOST_DEVICE I cell(I ph, I pw) const { return ph * group / pooled_h * group + pw * group / pooled_w; }
  DK_HOST_DEVICE I part(I ph, I pw) const { return ph * part_h / pooled_h * part_w + pw * part_w / pooled_w; }

  template <typename J>
  RoiPoolSizesOf<J> as() const {
    const auto j = [](I value) { return static_cast<J>(value); };
    return {j(batch), j(in_channels), j(height), j(width),  j(rois),    j(channels),   j(pooled_h), j(pooled_w),
            j(group), j(classes),     j(part_h), j(part_w), j(samples), spatial_scale, gamma};
  }
};

using RoiPoolSizes = RoiPoolSizesOf<int64_t>;

// Bins are dealt out evenly: bin b of `bins` belongs to part b * parts / bins, rounded down. The first bin of a part:
template <typename I>
DK_HOST_DEVICE I first_bin(I part, I parts, I bins) {
  return (part * bins + parts - 1) / parts;
}

// Gradients of input, offset and mask, in this order; those not asked for are empty tensors.
using RoiPoolGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Three empty tensors, none of which shares memory with another: operators must not return aliases.
inline RoiPoolGradients no_roi_pool_gradients(const at::TensorOptions& options) {
  const auto none = [&] { return at::empty({0}, options); };
  return {none(), none(), none()};
}

// Checks input, rois, output_size and the two factors, and returns the sizes that follow from them; the rest is the
// operator's. What the RoIs hold is checked by check_roi_values. Raises ValueError or TypeError.
RoiPoolSizes check_roi_pool(
    const char* name,
    const at::Tensor& input,
    const at::Tensor& rois,
    at::IntArrayRef output_size,
    double spatial_scale,
    double gamma);

// Checks offset against [rois, 2 * classes, part_h, part_w] and mask against [rois, classes, part_h, part_w]. Where
// there is one class, a mask may go without its second dimension.
void check_roi_pool_parts(
    const char* name,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const RoiPoolSizes& sizes);

// Checks the arguments that only the backward has.
void check_roi_pool_grad(
    const char* name,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const RoiPoolSizes& sizes,
    std::array<bool, 3> output_mask);

}  // namespace dk
