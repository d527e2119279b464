"""Local deformable kernels, alone or with deformable convolution (Deformable Kernels, 2020, Eq. 7, 11 and 12)."""

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

_NAME = "deform_kernel_conv2d"


def deform_kernel_conv2d(
    input: torch.Tensor,
    kernel_offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    *,
    kernel_size: int | tuple[int, int],
    offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    clip: bool = True,
) -> torch.Tensor:
    r"""Convolution whose taps take their values from wherever in the filter the kernel offsets send them.

    .. math:: y(p) = \sum_k m_k(p) \cdot x(p + k + \Delta j_k(p)) \cdot W(k + \Delta k_k(p))

    Eq. 7 of Deformable Kernels; with `offset` Eq. 11, which adds the data offsets of deformable convolution, and with
    `mask` each tap is modulated besides. `W`, the scope, has at least as many cells as there are taps. It is sampled
    bilinearly (Eq. 12). Without kernel offset the taps form a grid of spacing one in the middle of the scope: tap
    (i, j) lies at ((scopeH - kH) / 2 + i, (scopeW - kW) / 2 + j).

    With `clip` a sampling position beyond the scope is moved to its edge: the kernel offset then has no influence and
    its gradient is zero, as that of `torch.clamp`; an infinite offset is beyond the scope like any other. On the very
    edge the gradient is the one from inside. Without `clip`, cells outside the scope count as zero, and positions
    outside (-1, scopeH) x (-1, scopeW), infinite ones too, contribute nothing and get no gradient. NaN contributes
    nothing either way. Data offsets are treated as in `deform_conv2d`.

    Args:
        input: `[N, C, H, W]`, float64, float32, float16 or bfloat16, contiguous or channels-last (the output follows).
        kernel_offset: `[N, 2 * kernel_offset_groups * kH * kW, outH, outW]` in cells of the scope: taps row-major,
            (dy, dx) interleaved, groups contiguous. Any floating-point type; positions are computed in float32 or
            wider. The number of groups follows from the shape; group g resamples the filter for input channels
            `[g * C / kernel_offset_groups, (g + 1) * C / kernel_offset_groups)`.
        weight: `[out_channels, C / groups, scopeH, scopeW]`, of input's dtype: dense, grouped or depthwise. The number
            of groups follows from the shape.
        bias: `[out_channels]`, of input's dtype.
        stride: an int or (vertical, horizontal).
        padding: zeros around the input, an int or (vertical, horizontal).
        dilation: distance between taps on the map, an int or (vertical, horizontal).
        kernel_size: (kH, kW) or an int, the taps of an output position; not larger than the scope.
        offset: `[N, 2 * offset_groups * kH * kW, outH, outW]` in pixels of the input, laid out as `kernel_offset`;
            None leaves the taps where a rigid convolution has them.
        mask: `[N, offset_groups * kH * kW, outH, outW]`, the modulation of each tap; None is 1 everywhere.
        clip: whether to keep sampling positions within the scope.

    Returns:
        `[N, out_channels, outH, outW]` of input's dtype. Under autocast input, weight and bias are cast as for
        `conv2d`; offsets and mask keep their dtype.

    Raises:
        ValueError: a shape, a size or a device does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the compiled library is missing; or a second derivative is taken.
    """
    _extension.require(_NAME)
    check_tensor(_NAME, "input", input)
    input, weight, bias = autocast(input.device.type, input, weight, bias)
    kernel_size = pair(_NAME, "kernel_size", kernel_size, 1)
    stride, padding = pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0)
    dilation = pair(_NAME, "dilation", dilation, 1)
    _output_shape(input, kernel_offset, offset, mask, weight, bias, kernel_size, stride, padding, dilation)
    # The compiled operator reads the kernel size off the shape, as do those who count FLOPs and see shapes only.
    batch, channels, *out_size = kernel_offset.shape
    groups = channels // (2 * kernel_size[0] * kernel_size[1])
    kernel_offset = kernel_offset.view(batch, groups, *kernel_size, 2, *out_size)
    return torch.ops.dk_detection.deform_kernel_conv2d(
        input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip
    )


def _output_shape(input, kernel_offset, offset, mask, weight, bias, kernel_size, stride, padding, dilation):
    """Checks the arguments and returns the output's shape, computed from input and geometry and never from offsets."""
    check_tensor(_NAME, "weight", weight, input)
    check_tensor(_NAME, "kernel_offset", kernel_offset, input, same_dtype=False)
    if input.dim() != 4:
        raise ValueError(f"{_NAME}: input must be [N, C, H, W], got shape {list(input.shape)}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"{_NAME}: weight must be [out_channels, C / groups, scopeH, scopeW], got shape {list(weight.shape)}"
        )
    batch, channels, height, width = input.shape
    out_channels, group_in, scope_h, scope_w = weight.shape
    kernel_h, kernel_w = kernel_size
    if scope_h < kernel_h or scope_w < kernel_w:
        raise ValueError(
            f"{_NAME}: weight has a scope of {scope_h}x{scope_w}, expected at least kernel_size = {kernel_h}x{kernel_w}"
        )
    if channels == 0 or channels % group_in:
        raise ValueError(f"{_NAME}: input has {channels} channels, expected a multiple of weight.shape[1] = {group_in}")
    groups = channels // group_in
    if out_channels % groups:
        raise ValueError(
            f"{_NAME}: weight has {out_channels} output channels, expected a multiple of groups = {groups}"
        )
    out_h = conv_output_size(height, kernel_h, stride[0], padding[0], dilation[0])
    out_w = conv_output_size(width, kernel_w, stride[1], padding[1], dilation[1])
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{_NAME}: input {height}x{width} with padding {padding} is smaller than the kernel {kernel_h}x{kernel_w} "
            f"with dilation {dilation}: the output would be empty"
        )

    out_size = (batch, out_h, out_w)
    _check_map("kernel_offset", "kernel_offset_groups", kernel_offset, 2, kernel_size, channels, out_size)
    if offset is not None:
        check_tensor(_NAME, "offset", offset, input, same_dtype=False)
        _check_map("offset", "offset_groups", offset, 2, kernel_size, channels, out_size)
    if mask is not None:
        check_tensor(_NAME, "mask", mask, input, same_dtype=False)
        _check_map("mask", "offset_groups", mask, 1, kernel_size, channels, out_size)
        if offset is not None and offset.shape[1] != 2 * mask.shape[1]:
            raise ValueError(
                f"{_NAME}: mask has {mask.shape[1]} channels, expected offset_groups * kH * kW = "
                f"{offset.shape[1] // 2}, half of those of offset"
            )
    if bias is not None:
        check_tensor(_NAME, "bias", bias, input)
        if bias.shape != (out_channels,):
            raise ValueError(f"{_NAME}: bias has shape {list(bias.shape)}, expected [{out_channels}]")
    return batch, out_channels, out_h, out_w


def _check_map(name, groups_name, tensor, values, kernel_size, channels, out_size):
    """Checks a map of `values` numbers for each group of channels, tap and output position."""
    if tensor.dim() != 4:
        raise ValueError(f"{_NAME}: {name} must have 4 dimensions, got shape {list(tensor.shape)}")
    kernel_h, kernel_w = kernel_size
    per_group = values * kernel_h * kernel_w
    rule = f"{groups_name} * kH * kW" if values == 1 else f"{values} * {groups_name} * kH * kW"
    groups = tensor.shape[1] // per_group
    if groups == 0 or tensor.shape[1] % per_group:
        raise ValueError(
            f"{_NAME}: {name} has {tensor.shape[1]} channels, expected {rule} = {per_group * max(groups, 1)} "
            f"({groups_name}={max(groups, 1)}, kernel {kernel_h}x{kernel_w}, {name} shape {list(tensor.shape)})"
        )
    if channels % groups:
        raise ValueError(
            f"{_NAME}: {name} has {tensor.shape[1]} channels, so {groups_name} = {groups}, which does not divide the "
            f"{channels} channels of input"
        )
    expected = (out_size[0], groups * per_group, *out_size[1:])
    if tensor.shape != expected:
        raise ValueError(
            f"{_NAME}: {name} has shape {list(tensor.shape)}, expected {list(expected)} = [N, {rule}, outH, outW]"
        )


def _multiply_adds(shapes, out_shape):
    (_, channels, *_), (_, _, kernel_h, kernel_w, *_), offset, mask, (_, group_in, scope_h, scope_w), *_ = shapes
    batch, out_channels, out_h, out_w = out_shape
    values = channels * kernel_h * kernel_w  # those an output position looks at
    # A depthwise filter has one value for each of them; any other is multiplied cell by cell of its scope. Either way
    # the resampling of the kernel costs once for each value. With data offsets that of the map does, too, and with a
    # mask the modulation.
    depthwise = group_in == 1 and out_channels == channels
    filter_values = values if depthwise else out_channels * group_in * scope_h * scope_w
    resampled = values if offset is None else 2 * values
    modulated = 0 if mask is None else values
    value_costs = flops.SAMPLED_VALUE * resampled + flops.MODULATED_VALUE * modulated
    return batch * out_h * out_w * (filter_values + value_costs)


def _register():
    @torch.library.register_fake("dk_detection::deform_kernel_conv2d")
    def fake(input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip):
        kernel_size = kernel_offset.shape[2:4]
        geometry = kernel_size, stride, padding, dilation
        shape = _output_shape(input, kernel_offset.flatten(1, 4), offset, mask, weight, bias, *geometry)
        return empty_like_input(input, shape)

    @torch.library.register_fake("dk_detection::deform_kernel_conv2d_backward")
    def fake_backward(
        grad_output, input, kernel_offset, offset, mask, weight, stride, padding, dilation, clip, output_mask
    ):
        gradients = (
            lambda: empty_like_input(input, input.shape),
            lambda: kernel_offset.new_empty(kernel_offset.shape),
            lambda: offset.new_empty(offset.shape),
            lambda: mask.new_empty(mask.shape),
            lambda: weight.new_empty(weight.shape),
            lambda: weight.new_empty(weight.shape[0]),
        )
        return tuple(
            make() if wanted else input.new_empty(0) for make, wanted in zip(gradients, output_mask, strict=True)
        )

    def setup_context(ctx, inputs, output):
        input, kernel_offset, offset, mask, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(input, kernel_offset, offset, mask, weight)

    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:6])
        gradients = torch.ops.dk_detection.deform_kernel_conv2d_backward(
            grad, *ctx.saved_tensors, *ctx.geometry, wanted
        )
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * len(ctx.geometry)

    torch.library.register_autograd("dk_detection::deform_kernel_conv2d", backward, setup_context=setup_context)
    refuse_double_backward(_NAME)
    flops.register(_NAME, _multiply_adds)


if _extension.is_available():
    _register()
