#include "ops/roi_pool.h"

#include <cmath>
#include <vector>

namespace dk {

namespace {

void check_position_tensor(const char* name, const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_VALUE(
      tensor.device() == input.device(), name, ": ", argument, " is on ", tensor.device(),
      ", expected the device of input, ", input.device());
  TORCH_CHECK_TYPE(
      at::isFloatingType(tensor.scalar_type()), name, ": ", argument, " is ", tensor.scalar_type(),
      ", expected a floating-point type");
}

}  // namespace

void check_roi_pool_pair(const char* name, const char* argument, at::IntArrayRef values) {
  TORCH_CHECK_VALUE(
      values.size() == 2 && values[0] >= 1 && values[1] >= 1, name, ": ", argument,
      " must be two integers of at least 1, got ", values);
}

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
  check_roi_pool_pair(name, "output_size", output_size);
  TORCH_CHECK_VALUE(
      spatial_scale > 0 && std::isfinite(spatial_scale), name, ": spatial_scale must be positive and finite, got ",
      spatial_scale);
  TORCH_CHECK_VALUE(std::isfinite(gamma), name, ": gamma must be finite, got ", gamma);
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name, ": input is ",
      dtype, ", expected float64, float32, float16 or bfloat16");
  check_position_tensor(name, "rois", rois, input);

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
    check_position_tensor(name, "offset", *offset, input);
  }
  if (mask) {
    const std::vector<int64_t> expected = {s.rois, s.classes, s.part_h, s.part_w}, flat = {s.rois, s.part_h, s.part_w};
    TORCH_CHECK_VALUE(
        mask->sizes() == expected || (s.classes == 1 && mask->sizes() == flat), name, ": mask has shape ",
        mask->sizes(), ", expected ", at::IntArrayRef(expected));
    check_position_tensor(name, "mask", *mask, input);
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
  const std::vector<int64_t> expected = {s.rois, s.channels, s.pooled_h, s.pooled_w};
  TORCH_CHECK_VALUE(
      grad_output.sizes() == expected, name, ": grad_output has shape ", grad_output.sizes(), ", expected ",
      at::IntArrayRef(expected));
  TORCH_CHECK_VALUE(
      grad_output.device() == input.device(), name, ": grad_output is on ", grad_output.device(),
      ", expected the device of input, ", input.device());
  TORCH_CHECK_TYPE(
      grad_output.scalar_type() == input.scalar_type(), name, ": grad_output is ", grad_output.scalar_type(),
      ", expected the dtype of input, ", input.scalar_type());
  TORCH_CHECK_VALUE(offset || !output_mask[1], name, ": a gradient of offset is asked for, but there is no offset");
  TORCH_CHECK_VALUE(mask || !output_mask[2], name, ": a gradient of mask is asked for, but there is no mask");
}

}  // namespace dk
