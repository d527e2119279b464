// The contract of kernel_evolution_conv2d: sizes and guards, for all kernels.
//
// Each input channel has `locations` points at which it is read, the same at all output positions. A point between the
// pixels is a weighted sum over a window of pixels: `origin` says where the window begins, `window` holds the weights.
// So the operator is linear in input, window, attention, weight and bias, each by itself.
#pragma once

#include "ops/deform_conv2d.h"

namespace dk {

template <typename I>
struct KernelEvolutionConv2dSizesOf : DeformConv2dSizesOf<I> {
  I locations, window_h, window_w;

  DK_HOST_DEVICE I cells() const { return window_h * window_w; }

  template <typename J>
  KernelEvolutionConv2dSizesOf<J> as() const {
    return {
        DeformConv2dSizesOf<I>::template as<J>(), static_cast<J>(locations), static_cast<J>(window_h),
        static_cast<J>(window_w)};
  }
};

using KernelEvolutionConv2dSizes = KernelEvolutionConv2dSizesOf<int64_t>;

// Checks everything a kernel relies on (shapes, dtypes, devices) and returns the sizes. Raises ValueError or TypeError.
KernelEvolutionConv2dSizes check_kernel_evolution_conv2d(
    const at::Tensor& input,
    const at::Tensor& origin,
    const at::Tensor& window,
    const std::optional<at::Tensor>& attention,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

// Checks the arguments that only the backward has.
void check_kernel_evolution_conv2d_grad(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const std::optional<at::Tensor>& attention,
    const KernelEvolutionConv2dSizes& sizes,
    std::array<bool, 5> output_mask);

// Gradients of input, window, attention, weight and bias, in this order; those not asked for are empty tensors.
using KernelEvolutionConv2dGradients = DeformConv2dGradients;

// The pixel that the first cell of a window lies on at output position 0, along one axis, kept where it is all the
// same: just off the map, on either side, at every output position. What is not finite stays on the map.
template <typename T, typename I>
DK_HOST_DEVICE I first_pixel(T origin, I padding, I out_size, I stride, I window, I size) {
  const I low = -(out_size - 1) * stride - window, high = size;
  const T pixel = origin - static_cast<T>(padding);
  if (!(pixel - pixel == T(0))) {
    return 0;
  }
  return pixel <= static_cast<T>(low) ? low : pixel >= static_cast<T>(high) ? high : static_cast<I>(pixel);
}

}  // namespace dk
