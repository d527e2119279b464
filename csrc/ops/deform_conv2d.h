// The contract of deform_conv2d: sizes and guards, for all kernels.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/host_device.h"

namespace dk {

struct DeformConv2dSizes {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t groups, offset_groups;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  DK_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  DK_HOST_DEVICE int64_t positions() const { return out_h * out_w; }
  DK_HOST_DEVICE int64_t group_in() const { return in_channels / groups; }
  DK_HOST_DEVICE int64_t group_out() const { return out_channels / groups; }
  DK_HOST_DEVICE int64_t offset_group_channels() const { return in_channels / offset_groups; }
};

// Checks and sizes of any convolution, operator `name`: all but offset_groups. `weight` has 4 dimensions and is not
// empty.
DeformConv2dSizes check_convolution(
    const char* name,
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    std::array<int64_t, 2> kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

// Checks what moves and modulates the samples of the data, and sets offset_groups: 1 where there is neither.
void check_sampling(
    const char* name,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    DeformConv2dSizes& sizes);

// Checks everything a kernel relies on (shapes, dtypes, devices) and returns the sizes. Raises ValueError or TypeError.
DeformConv2dSizes check_deform_conv2d(
    const at::Tensor& input,
    const at::Tensor& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

// Checks the arguments that only the backward has.
void check_deform_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& mask,
    const DeformConv2dSizes& sizes,
    std::array<bool, 5> output_mask);

// Gradients of input, offset, mask, weight and bias, in this order; those not asked for are empty tensors.
using DeformConv2dGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A tensor each: an operator's outputs must not share memory.
inline DeformConv2dGradients no_gradients(const at::Tensor& like) {
  const auto none = [&] { return at::empty({0}, like.options()); };
  return {none(), none(), none(), none(), none()};
}

// Where one tap looks when nothing deforms it: output position (oh, ow), tap (i, j).
DK_HOST_DEVICE int64_t rest_y(const DeformConv2dSizes& s, int64_t oh, int64_t i) {
  return oh * s.stride_h - s.padding_h + i * s.dilation_h;
}
DK_HOST_DEVICE int64_t rest_x(const DeformConv2dSizes& s, int64_t ow, int64_t j) {
  return ow * s.stride_w - s.padding_w + j * s.dilation_w;
}

}  // namespace dk
