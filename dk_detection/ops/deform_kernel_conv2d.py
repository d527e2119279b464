"""Local deformable kernels, alone or with deformable convolution (Deformable Kernels, 2020, Eq. 7, 11 and 12)."""

import torch
import torch.nn.functional as F

from dk_detection.ops import _conv, _onnx, _scope, flops
from dk_detection.ops._common import autocast, check_tensor, overridable, pair
from dk_detection.ops._operator import Operator

_NAME = "deform_kernel_conv2d"


@overridable
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
            Without a batch, `[C, H, W]`, offsets and mask have none either, nor has the output.
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
        RuntimeError: the compiled library is missing or was built from other sources.
    """
    check_tensor(_NAME, "input", input)
    check_tensor(_NAME, "kernel_offset", kernel_offset)
    single = input.dim() == 3
    if single:
        maps = _conv.batch_of_one(_NAME, input, kernel_offset=kernel_offset, offset=offset, mask=mask)
        input, kernel_offset, offset, mask = maps
    input, weight, bias = autocast(input.device.type, input, weight, bias)
    kernel_size = pair(_NAME, "kernel_size", kernel_size, 1)
    stride, padding = pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0)
    dilation = pair(_NAME, "dilation", dilation, 1)
    # The compiled operator reads the kernel size off the shape, as do those who count FLOPs and see shapes only.
    groups = _conv.count_groups(_NAME, "kernel_offset", kernel_offset, 2, kernel_size)
    kernel_offset = kernel_offset.unflatten(1, (groups, *kernel_size, 2))
    output = _operator(input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip)
    return output.squeeze(0) if single else output


def _output_shape(input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip):
    """Checks the arguments and returns the output's shape, computed from input and geometry and never from offsets."""
    _conv.check_weight(_NAME, input, weight, "scopeH, scopeW")
    kernel_size, scope = kernel_offset.shape[2:4], weight.shape[2:]
    if scope[0] < kernel_size[0] or scope[1] < kernel_size[1]:
        raise ValueError(
            f"{_NAME}: weight has a scope of {scope[0]}x{scope[1]}, expected at least kernel_size = "
            f"{kernel_size[0]}x{kernel_size[1]}"
        )
    shape = _conv.check_convolution(_NAME, input, weight, bias, kernel_size, stride, padding, dilation)
    _conv.check_map(_NAME, "kernel_offset", kernel_offset.flatten(1, 4), 2, kernel_size, input, shape)
    _conv.check_sampling(_NAME, offset, mask, kernel_size, input, shape)
    return shape


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


def _by_offset(operator, values, direction):
    return _conv.slope_by_offset(operator, values, direction, values["kernel_offset"].shape[2:4])


def _standard(operator, input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip):
    """By cells of the scope: what each tap sees is shared out among them, and then they are a kernel of size one."""
    batch, _, out_h, out_w = operator.output_shape(
        input, kernel_offset, offset, mask, weight, bias, stride, padding, dilation, clip
    )
    channels, (groups, kernel_h, kernel_w) = input.shape[1], kernel_offset.shape[1:4]
    dtype, taps = input.dtype, kernel_h * kernel_w
    wide = torch.promote_types(dtype, torch.float32)
    input, weight, bias = (None if t is None else t.to(wide) for t in (input, weight, bias))

    # What each tap sees: a depthwise convolution whose every output is one tap. [N, C * taps, outH, outW]
    pick = torch.eye(taps, dtype=wide, device=input.device).view(taps, 1, kernel_h, kernel_w).repeat(channels, 1, 1, 1)
    if offset is not None:
        shape = (batch, channels * taps, out_h, out_w)
        seen = _onnx.deform_conv(input, offset, mask, pick, None, stride, padding, dilation, shape)
    else:
        seen = F.conv2d(input, pick, None, stride, padding, dilation, channels)
        if mask is not None:
            seen = seen.unflatten(1, (mask.shape[1] // taps, -1, taps)) * mask.unflatten(1, (-1, 1, taps)).to(wide)
    seen = seen.reshape(batch, groups, channels // groups, taps, out_h, out_w)

    cells = _scope.cell_weights(kernel_offset.to(wide).permute(0, 1, 5, 6, 2, 3, 4), weight.shape[2:], clip)
    # [N, groups, outH, outW, C / groups, cells]
    shared = seen.permute(0, 1, 4, 5, 2, 3) @ cells.flatten(4, 5)
    shared = shared.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)  # [N, C * cells, outH, outW]
    return F.conv2d(shared, weight.flatten(1)[..., None, None], bias, groups=channels // weight.shape[1]).to(dtype)


_operator = Operator(
    _NAME,
    _output_shape,
    _multiply_adds,
    differentiable=("input", "kernel_offset", "offset", "mask", "weight", "bias"),
    slopes={"kernel_offset": _conv.slope_by_kernel_offset, "offset": _by_offset},
    standard=_standard,
)
