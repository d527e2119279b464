#include "ops/deform_psroi_pool.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace dk {

namespace {

constexpr const char* kName = "deform_psroi_pool";

void check_at_least_one(const char* argument, int64_t value) {
  TORCH_CHECK_VALUE(value >= 1, kName, ": ", argument, " must be at least 1, got ", value);
}

}  // namespace

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
    double gamma) {
  RoiPoolSizes s = check_roi_pool(kName, input, rois, output_size, spatial_scale, gamma);
  check_at_least_one("output_channels", output_channels);
  check_at_least_one("group_size", group_size);
  check_at_least_one("samples_per_part", samples_per_part);
  check_int_pair(kName, "part_size", part_size, 1);
  // In this order no product can overflow.
  TORCH_CHECK_VALUE(
      group_size <= s.in_channels && output_channels <= s.in_channels &&
          s.in_channels % (group_size * output_channels) == 0 &&
          s.in_channels / (group_size * output_channels) == group_size,
      kName, ": input has ", s.in_channels,
      " channels, expected output_channels * group_size^2 with output_channels=", output_channels,
      ", group_size=", group_size);
  s.channels = output_channels;
  s.group = group_size;
  s.part_h = part_size[0], s.part_w = part_size[1];
  s.samples = samples_per_part;
  if (offset) {
    TORCH_CHECK_VALUE(
        offset->dim() == 4 && offset->size(1) >= 2 && offset->size(1) % 2 == 0, kName,
        ": offset must be [n, 2 * classes, part_h, part_w], got shape ", offset->sizes());
    s.classes = offset->size(1) / 2;
  } else if (mask && mask->dim() == 4) {
    s.classes = mask->size(1);
  }
  TORCH_CHECK_VALUE(
      s.classes >= 1 && s.channels % s.classes == 0, kName, ": ", offset ? "offset" : "mask", " is for ", s.classes,
      " classes, expected a divisor of output_channels=", s.channels);
  check_roi_pool_parts(kName, input, offset, mask, s);
  return s;
}

}  // namespace dk

TORCH_LIBRARY_FRAGMENT(dk_detection, m) {
  m.def(
      "deform_psroi_pool(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int output_channels, int group_size, int[2] part_size, int samples_per_part, "
      "float gamma) -> Tensor");
  m.def(
      "deform_psroi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int output_channels, int group_size, int[2] part_size, "
      "int samples_per_part, float gamma, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}
