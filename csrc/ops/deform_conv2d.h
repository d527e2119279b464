// The contract of deform_conv2d: sizes and guards, for all kernels.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/host_device.h"

namespace dk {

// I is the type of indices. Where tensors are small enough, a GPU computes with 32 bits.
template <typename I>
struct DeformConv2dSizesOf {
  I batch, in_channels, height, width;
  I out_channels, kernel_h, kernel_w, out_h, out_w;
  I groups, offset_groups;
  I stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  DK_HOST_DEVICE I taps() const { return kernel_h * kernel_w; }
  DK_HOST_DEVICE I positions() const { return out_h * out_w; }
  DK_HOST_DEVICE I group_in() const { return in_channels / groups; }
  DK_HOST_DEVICE I group_out() const { return out_channels / groups; }
  DK_HOST_DEVICE I offset_group_channels() const { return in_channels / offset_groups; }
  DK_HOST_DEVICE bool depthwise() const { return group_in() == 1 && group_out() == 1; }

  // Larger than any coordinate that a tap at rest has.
  int64_t reach() const {
    const int64_t down = out_h * stride_h + padding_h + kernel_h * dilation_h + height;
    const int64_t across = out_w * stride_w + padding_w + kernel_w * dilation_w + width;
    return down > across ? down : across;
  }

  template <typename J>
  DeformConv2dSizesOf<J> as() const {
    const auto j = [](I value) { return static_cast<J>(value); };
    return {j(batch),    j(in_channels), j(height),    j(width),      j(out_channels),  j(kernel_h),
            j(kernel_w), j(out_h),       j(out_w),     j(groups),     j(offset_groups), j(stride_h),
            j(stride_w), j(padding_h),   j(padding_w), j(dilation_h), j(dilation_w)};
  }
};

using DeformConv2dSizes = DeformConv2dSizesOf<int64_t>;

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
template <typename I>
DK_HOST_DEVICE I rest_y(const DeformConv2dSizesOf<I>& s, I oh, I i) {
  return oh * s.stride_h - s.padding_h + i * s.dilation_h;
}
template <typename I>
DK_HOST_DEVICE I rest_x(const DeformConv2dSizesOf<I>& s, I ow, I j) {
  return ow * s.stride_w - s.padding_w + j * s.dilation_w;
}

}  // namespace dk
