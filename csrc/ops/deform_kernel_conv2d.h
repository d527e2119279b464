// The contract of deform_kernel_conv2d: sizes, guards and the geometry of the scope, for all kernels.
#pragma once

#include "common/bilinear.h"
#include "ops/deform_conv2d.h"

namespace dk {

// Of what it inherits, kernel_h and kernel_w are the taps of an output position, and offset_groups is 1 where neither
// offset nor mask is given.
template <typename I>
struct DeformKernelConv2dSizesOf : DeformConv2dSizesOf<I> {
  I scope_h, scope_w, kernel_offset_groups;
  bool clip;

  DK_HOST_DEVICE I cells() const { return scope_h * scope_w; }
  DK_HOST_DEVICE I kernel_offset_group_channels() const { return this->in_channels / kernel_offset_groups; }

  template <typename J>
  DeformKernelConv2dSizesOf<J> as() const {
    return {
        DeformConv2dSizesOf<I>::template as<J>(), static_cast<J>(scope_h), static_cast<J>(scope_w),
        static_cast<J>(kernel_offset_groups), clip};
  }
};

using DeformKernelConv2dSizes = DeformKernelConv2dSizesOf<int64_t>;

// Checks everything a kernel relies on (shapes, dtypes, devices) and returns the sizes. Raises ValueError or TypeError.
// The kernel size is not that of `weight`; kernel_offset, [N, kernel_offset_groups, kH, kW, 2, outH, outW], tells it.
DeformKernelConv2dSizes check_deform_kernel_conv2d(
    const at::Tensor& input,
    const at::Tensor& kernel_offset,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool clip);

// Checks the arguments that only the backward has.
void check_deform_kernel_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask,
    const DeformKernelConv2dSizes& sizes,
    std::array<bool, 6> output_mask);

// Gradients of input, kernel_offset, offset, mask, weight and bias, in this order; those not asked for are empty
// tensors.
using DeformKernelConv2dGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A tensor each: an operator's outputs must not share memory.
inline DeformKernelConv2dGradients no_kernel_gradients(const at::Tensor& like) {
  const auto none = [&] { return at::empty({0}, like.options()); };
  return {none(), none(), none(), none(), none(), none()};
}

// The scope's cells that one tap takes its value from, given its kernel offset. At rest the grid of taps lies in the
// middle of the scope, one cell apart.
template <typename T, typename I>
DK_HOST_DEVICE ClippedCorners<T, I> scope_corners(const DeformKernelConv2dSizesOf<I>& s, I tap, T dy, T dx) {
  const T y = static_cast<T>(s.scope_h - s.kernel_h) / 2 + static_cast<T>(tap / s.kernel_w) + dy;
  const T x = static_cast<T>(s.scope_w - s.kernel_w) / 2 + static_cast<T>(tap % s.kernel_w) + dx;
  if (s.clip) {
    return clipped_corners(y, x, s.scope_h, s.scope_w);
  }
  return {bilinear_corners(y, x, s.scope_h, s.scope_w), true, true};
}

// The pixels that one tap of output position (oh, ow) reads, given its data offset; without one it is a single pixel,
// and its neighbours are not touched, not even to be multiplied by zero.
template <typename T, typename I>
DK_HOST_DEVICE Corners<T, I> data_corners(
    const DeformKernelConv2dSizesOf<I>& s, I oh, I ow, I tap, const T* dy, const T* dx) {
  const I row = rest_y(s, oh, tap / s.kernel_w), column = rest_x(s, ow, tap % s.kernel_w);
  if (dy) {
    return bilinear_corners(static_cast<T>(row) + *dy, static_cast<T>(column) + *dx, s.height, s.width);
  }
  const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
  return {{inside ? row * s.width + column : -1, -1, -1, -1}, {T(inside), T(0), T(0), T(0)}, T(0), T(0)};
}

}  // namespace dk
