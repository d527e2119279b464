"""Deformable convolution v1 (Deformable Convolutional Networks, Eq. 2) and v2 (Deformable ConvNets v2, Eq. 1)."""

import torch

from dk_detection.ops import _conv, _onnx, flops
from dk_detection.ops._common import autocast, check_tensor, overridable, pair
from dk_detection.ops._operator import Operator

_NAME = "deform_conv2d"


@overridable
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
            Without a batch, `[C, H, W]`, offset and mask have none either, nor has the output.
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
        RuntimeError: the compiled library is missing or was built from other sources.
    """
    check_tensor(_NAME, "input", input)
    single = input.dim() == 3
    if single:
        input, offset, mask = _conv.batch_of_one(_NAME, input, offset=offset, mask=mask)
    input, weight, bias = autocast(input.device.type, input, weight, bias)
    stride, padding = pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0)
    dilation = pair(_NAME, "dilation", dilation, 1)
    output = _operator(input, offset, mask, weight, bias, stride, padding, dilation)
    return output.squeeze(0) if single else output


def _output_shape(input, offset, mask, weight, bias, stride, padding, dilation):
    """Checks the arguments and returns the output's shape, computed from input and weight and never from the offset."""
    _conv.check_weight(_NAME, input, weight, "kH, kW")
    check_tensor(_NAME, "offset", offset, input, same_dtype=False)
    kernel_size = weight.shape[2:]
    shape = _conv.check_convolution(_NAME, input, weight, bias, kernel_size, stride, padding, dilation)
    _conv.check_sampling(_NAME, offset, mask, kernel_size, input, shape)
    return shape


def _multiply_adds(shapes, out_shape):
    # The filter, and every input value a tap of an output position looks at.
    value = flops.SAMPLED_VALUE + (0 if shapes[2] is None else flops.MODULATED_VALUE)
    batch, _, out_h, out_w = out_shape
    out_channels, group_in, kernel_h, kernel_w = shapes[3]
    positions = batch * out_h * out_w * kernel_h * kernel_w
    return positions * (out_channels * group_in + value * shapes[0][1])


def _by_offset(operator, values, direction):
    return _conv.slope_by_offset(operator, values, direction, values["weight"].shape[2:])


def _standard(operator, *arguments):
    return _onnx.deform_conv(*arguments, operator.output_shape(*arguments))


_operator = Operator(
    _NAME,
    _output_shape,
    _multiply_adds,
    differentiable=("input", "offset", "mask", "weight", "bias"),
    slopes={"offset": _by_offset},
    standard=_standard,
)
