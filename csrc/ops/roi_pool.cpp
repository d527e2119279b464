#include "ops/roi_pool.h"

#include <cmath>
#include <vector>

#include "ops/checks.h"

namespace dk {

RoiPoolSizes check_roi_pool(
    const char* name,
    const at::Tensor& input,
    const at::Tensor& rois,
    at::IntArrayRef output_size,
    double spatial_scale,
    double gamma) {
  TORCH_CHECK_VALUE(
      input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, name,
      ": input must be [batch, channels, height, width] with pixels in it, got shape ", input.sizes());
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 5, name, ": rois must be [n, 5] = (batch index, x1, y1, x2, y2), got shape ",
      rois.sizes());
  check_int_pair(name, "output_size", output_size, 1);
  TORCH_CHECK_VALUE(
      spatial_scale > 0 && std::isfinite(spatial_scale), name, ": spatial_scale must be positive and finite, got ",
      spatial_scale);
  TORCH_CHECK_VALUE(std::isfinite(gamma), name, ": gamma must be finite, got ", gamma);
  check_input_dtype(name, input);
  check_tensor(name, "rois", rois, input, false);

  RoiPoolSizes s{};
  s.batch = input.size(0), s.in_channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.rois = rois.size(0), s.channels = s.in_channels, s.pooled_h = output_size[0], s.pooled_w = output_size[1];
  s.group = 1, s.classes = 1, s.part_h = s.pooled_h, s.part_w = s.pooled_w;
  s.spatial_scale = spatial_scale, s.gamma = gamma;
  return s;
}

void check_roi_pool_parts(
    const char* name,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const RoiPoolSizes& s) {
  if (offset) {
    const std::vector<int64_t> expected = {s.rois, 2 * s.classes, s.part_h, s.part_w};
    TORCH_CHECK_VALUE(
        offset->sizes() == expected, name, ": offset has shape ", offset->sizes(), ", expected ",
        at::IntArrayRef(expected));
    check_tensor(name, "offset", *offset, input, false);
  }
  if (mask) {
    const std::vector<int64_t> expected = {s.rois, s.classes, s.part_h, s.part_w}, flat = {s.rois, s.part_h, s.part_w};
    TORCH_CHECK_VALUE(
        mask->sizes() == expected || (s.classes == 1 && mask->sizes() == flat), name, ": mask has shape ",
        mask->sizes(), ", expected ", at::IntArrayRef(expected));
    check_tensor(name, "mask", *mask, input, false);
  }
}

void check_roi_pool_grad(
    const char* name,
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const RoiPoolSizes& s,
    std::array<bool, 3> output_mask) {
  check_grad_output(name, grad_output, input, {s.rois, s.channels, s.pooled_h, s.pooled_w});
  check_asked(name, "offset", offset.has_value(), output_mask[1]);
  check_asked(name, "mask", mask.has_value(), output_mask[2]);
}

}  // namespace dk
