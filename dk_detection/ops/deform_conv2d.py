"""Deformable convolution v1 (Deformable Convolutional Networks, Eq. 2) and v2 (Deformable ConvNets v2, Eq. 1)."""

import torch

from dk_detection import _extension
from dk_detection.ops import flops
from dk_detection.ops._common import (
    autocast,
    check_tensor,
    conv_output_size,
    empty_like_input,
    pair,
    refuse_double_backward,
)

_NAME = "deform_conv2d"


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Convolution whose taps look where the offsets send them, each scaled by its modulation.

    .. math:: y(p) = \sum_k w_k \cdot x(p + p_k + \Delta p_k(p)) \cdot \Delta m_k(p)

    Eq. 1 of Deformable ConvNets v2; without `mask` Eq. 2 of Deformable Convolutional Networks. `x` is sampled
    bilinearly. A position with -1 < h < H and -1 < w < W sees the map, corners outside it count as zero; every other
    position, and every offset that is not finite, contributes nothing and gets no gradient. A drop-in for
    `torchvision.ops.deform_conv2d`.

    Args:
        input: `[N, C, H, W]`, float64, float32, float16 or bfloat16, contiguous or channels-last (the output follows).
        offset: `[N, 2 * offset_groups * kH * kW, outH, outW]` in pixels of the input: taps row-major, (dy, dx)
            interleaved, groups contiguous. Any floating-point type; positions are computed in float32 or wider. The
            number of offset groups follows from the shape; group g moves input channels
            `[g * C / offset_groups, (g + 1) * C / offset_groups)`.
        weight: `[out_channels, C / groups, kH, kW]`, of input's dtype. The number of groups follows from the shape.
        bias: `[out_channels]`, of input's dtype.
        stride: an int or (vertical, horizontal).
        padding: zeros around the input, an int or (vertical, horizontal).
        dilation: distance between taps, an int or (vertical, horizontal).
        mask: `[N, offset_groups * kH * kW, outH, outW]`, the modulation of each tap; None is 1 everywhere.

    Returns:
        `[N, out_channels, outH, outW]` of input's dtype. Under autocast input, weight and bias are cast as for
        `conv2d`; offset and mask keep their dtype.

    Raises:
        ValueError: a shape, a size or a device does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the compiled library is missing; or a second derivative is taken.
    """
    _extension.require(_NAME)
    check_tensor(_NAME, "input", input)
    input, weight, bias = autocast(input.device.type, input, weight, bias)
    stride, padding = pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0)
    dilation = pair(_NAME, "dilation", dilation, 1)
    _output_shape(input, offset, mask, weight, bias, stride, padding, dilation)
    return torch.ops.dk_detection.deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation)


def _output_shape(input, offset, mask, weight, bias, stride, padding, dilation):
    """Checks the arguments and returns the output's shape, computed from input and weight and never from the offset."""
    check_tensor(_NAME, "weight", weight, input)
    check_tensor(_NAME, "offset", offset, input, same_dtype=False)
    if input.dim() != 4:
        raise ValueError(f"{_NAME}: input must be [N, C, H, W], got shape {list(input.shape)}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"{_NAME}: weight must be [out_channels, C / groups, kH, kW], got shape {list(weight.shape)}")
    if offset.dim() != 4:
        raise ValueError(f"{_NAME}: offset must have 4 dimensions, got shape {list(offset.shape)}")
    batch, channels, height, width = input.shape
    out_channels, group_in, kernel_h, kernel_w = weight.shape
    if channels == 0 or channels % group_in:
        raise ValueError(f"{_NAME}: input has {channels} channels, expected a multiple of weight.shape[1] = {group_in}")
    groups = channels // group_in
    if out_channels % groups:
        raise ValueError(
            f"{_NAME}: weight has {out_channels} output channels, expected a multiple of groups = {groups}"
        )

    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"{_NAME}: offset has {offset.shape[1]} channels, expected 2 * offset_groups * kH * kW = "
            f"{2 * taps * max(offset_groups, 1)} (offset_groups={max(offset_groups, 1)}, kernel {kernel_h}x{kernel_w}, "
            f"offset shape {list(offset.shape)})"
        )
    if channels % offset_groups:
        raise ValueError(
            f"{_NAME}: offset has {offset.shape[1]} channels, so offset_groups = {offset_groups}, which does not "
            f"divide the {channels} channels of input"
        )
    out_h = conv_output_size(height, kernel_h, stride[0], padding[0], dilation[0])
    out_w = conv_output_size(width, kernel_w, stride[1], padding[1], dilation[1])
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{_NAME}: input {height}x{width} with padding {padding} is smaller than the kernel {kernel_h}x{kernel_w} "
            f"with dilation {dilation}: the output would be empty"
        )
    _check_map("offset", "2 * offset_groups * kH * kW", offset, (batch, 2 * offset_groups * taps, out_h, out_w))
    if mask is not None:
        check_tensor(_NAME, "mask", mask, input, same_dtype=False)
        _check_map("mask", "offset_groups * kH * kW", mask, (batch, offset_groups * taps, out_h, out_w))
    if bias is not None:
        check_tensor(_NAME, "bias", bias, input)
        if bias.shape != (out_channels,):
            raise ValueError(f"{_NAME}: bias has shape {list(bias.shape)}, expected [{out_channels}]")
    return batch, out_channels, out_h, out_w


def _check_map(name, channels, tensor, expected):
    if tensor.shape != expected:
        raise ValueError(
            f"{_NAME}: {name} has shape {list(tensor.shape)}, expected {list(expected)} = [N, {channels}, outH, outW]"
        )


def _multiply_adds(shapes, out_shape):
    # The filter, and every input value a tap of an output position looks at.
    value = flops.SAMPLED_VALUE + (0 if shapes[2] is None else flops.MODULATED_VALUE)
    batch, _, out_h, out_w = out_shape
    out_channels, group_in, kernel_h, kernel_w = shapes[3]
    positions = batch * out_h * out_w * kernel_h * kernel_w
    return positions * (out_channels * group_in + value * shapes[0][1])


def _register():
    @torch.library.register_fake("dk_detection::deform_conv2d")
    def fake(input, offset, mask, weight, bias, stride, padding, dilation):
        return empty_like_input(input, _output_shape(input, offset, mask, weight, bias, stride, padding, dilation))

    @torch.library.register_fake("dk_detection::deform_conv2d_backward")
    def fake_backward(grad_output, input, offset, mask, weight, stride, padding, dilation, output_mask):
        gradients = (
            lambda: empty_like_input(input, input.shape),
            lambda: offset.new_empty(offset.shape),
            lambda: mask.new_empty(mask.shape),
            lambda: weight.new_empty(weight.shape),
            lambda: weight.new_empty(weight.shape[0]),
        )
        return tuple(
            make() if wanted else input.new_empty(0) for make, wanted in zip(gradients, output_mask, strict=True)
        )

    def setup_context(ctx, inputs, output):
        input, offset, mask, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(input, offset, mask, weight)

    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:5])
        gradients = torch.ops.dk_detection.deform_conv2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None

    torch.library.register_autograd("dk_detection::deform_conv2d", backward, setup_context=setup_context)
    refuse_double_backward(_NAME)
    flops.register(_NAME, _multiply_adds)


if _extension.is_available():
    _register()
