"""The generalised convolution of Differentiable Kernel Evolution (2019), Eq. 9, 10 and 16."""

import math

import torch
import torch.nn.functional as F

from dk_detection.ops import _conv, flops
from dk_detection.ops._common import autocast, check_tensor, overridable, pair, without_autocast
from dk_detection.ops._operator import Operator

_NAME = "kernel_evolution_conv2d"


@overridable
def kernel_evolution_conv2d(
    input: torch.Tensor,
    location: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    *,
    kernel_size: int | tuple[int, int] = (1, 1),
    attention: torch.Tensor | None = None,
    radius: float = 2.0,
    alpha: float = 2.0,
) -> torch.Tensor:
    r"""Convolution that reads each input channel at locations of its own, the same at all positions.

    .. math:: y(x) = \sum_c \sum_k a_k(x) \cdot w_{c,k} \cdot f_c(x + y_{c,k}), \quad
        f_c(x + y) = \sum_{\|s - y\| \le r} G(s, y) \cdot f_c(x + s), \quad
        G(s, y) = \frac{1}{C} \exp(-\alpha \|s - y\|^2)

    Eq. 16, 10 and 14 of Differentiable Kernel Evolution; without `attention` Eq. 9. The sums run over whole pixels s;
    those off the map count as zero, and C makes the weights of a location, on the map or off it, add up to one. The
    gradient of a location is the paper's rule, :math:`\partial G / \partial y = 2 \alpha G \cdot (s - y)` (Eq. 15): C
    is taken as constant, so each pixel pulls straight towards itself or pushes straight away. Where the pixels around a
    location lie symmetrically this is the derivative of the output, elsewhere not quite.

    Args:
        input: `[N, C, H, W]`, float64, float32, float16 or bfloat16, contiguous or channels-last (the output follows).
            Without a batch, `[C, H, W]`, attention has none either, nor has the output.
        location: `[C, K, 2]`, (dy, dx) from the middle of the kernel, in units of `dilation` pixels of the input. The
            rigid kernel 3x3 has (-1, -1), (-1, 0), ... (1, 1). Any floating-point type; computed with in float32 or
            wider. May lie anywhere, but has to be finite.
        weight: `[out_channels, C / groups, K]`, of input's dtype. The number of groups follows from the shape.
        bias: `[out_channels]`, of input's dtype.
        stride: an int or (vertical, horizontal).
        padding: zeros around the input, an int or (vertical, horizontal).
        dilation: pixels from location 0 to location 1, an int or (vertical, horizontal).
        kernel_size: that of the rigid convolution whose output size this one has, and in whose middle location (0, 0)
            lies, an int or (vertical, horizontal). K need not be its number of taps.
        attention: `[N, K, outH, outW]`, a factor on what each location reads, for all channels; None is 1 everywhere.
            Any floating-point type.
        radius: pixels farther from a location do not count, r; at least the square root of a half, so that there is
            always one.
        alpha: how fast the weights fall with the distance in pixels, positive. A very large one leaves the nearest.

    Returns:
        `[N, out_channels, outH, outW]` of input's dtype. Under autocast input, weight and bias are cast as for
        `conv2d`; location and attention keep their dtype.

    Raises:
        ValueError: a shape, a size or a device does not fit, radius or alpha is out of its range, or a location is not
            finite. CUDA is not waited for: such a location makes the output NaN there.
        TypeError: a dtype does not fit.
        RuntimeError: the compiled library is missing or was built from other sources.
    """
    check_tensor(_NAME, "input", input)
    single = input.dim() == 3
    if single:
        input, attention = _conv.batch_of_one(_NAME, input, attention=attention)
    input, weight, bias = autocast(input.device.type, input, weight, bias)
    stride, padding = pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0)
    dilation, kernel_size = pair(_NAME, "dilation", dilation, 1), pair(_NAME, "kernel_size", kernel_size, 1)
    check_window(_NAME, radius, alpha)
    # What the operator gets is made from location, so this is checked first.
    _check_weight(input, weight)
    _conv.check_convolution(_NAME, input, weight, bias, kernel_size, stride, padding, dilation)
    _check_location(input, location, weight)
    with without_autocast(input.device.type):
        origin, window = _windows(location, input.dtype, kernel_size, dilation, radius, alpha)
    output = _operator(input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation)
    return output.squeeze(0) if single else output


def check_window(owner: str, radius: float, alpha: float) -> None:
    """Checks what the weights of pixels around a location depend on.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    always = "at least the square root of 0.5, so that it always holds a pixel, and finite"
    rules = (("radius", radius, math.sqrt(0.5), always), ("alpha", alpha, math.ulp(0.0), "positive and finite"))
    for name, value, least, rule in rules:
        if not isinstance(value, (int, float)):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
        if not least <= value < math.inf:
            raise ValueError(f"{owner}: {name} must be {rule}, got {value}")


def _check_location(input, location, weight):
    check_tensor(_NAME, "location", location, input, same_dtype=False)
    expected = (input.shape[1], weight.shape[2], 2)
    if location.shape != expected:
        raise ValueError(
            f"{_NAME}: location has shape {list(location.shape)}, expected {list(expected)} = [in_channels, K, 2]"
        )


def _windows(location, dtype, kernel_size, dilation, radius, alpha):
    """Where the window of pixels around each location begins, and the weight of each pixel in it.

    Returns:
        [C, K, 2], whole pixels from where the rigid kernel's first tap lies, and [C, K, rows, columns].
    """
    wide = torch.promote_types(torch.promote_types(dtype, location.dtype), torch.float32)
    before, after = (
        math.floor(radius),
        math.ceil(radius),
    )  # pixels that may be near enough, seen from the one at or before
    positions, squares = [], []
    for axis, (size, step) in enumerate(zip(kernel_size, dilation, strict=True)):
        position = location[..., axis].to(wide) * step + step * (size - 1) / 2  # [C, K]
        whole = position.detach().floor()
        pixel = torch.arange(-before, after + 1, dtype=wide, device=location.device)
        positions.append(whole - before)
        squares.append((pixel - (position - whole).unsqueeze(-1)).square())  # [C, K, pixels]
    distance = squares[0].unsqueeze(-1) + squares[1].unsqueeze(-2)  # [C, K, rows, columns], squared
    nearest = distance.detach().amin((-2, -1), keepdim=True)  # cancels, and keeps the largest weight from vanishing
    # Eq. 14. C is a constant here, and that makes autograd's gradient Eq. 15.
    weights = torch.where(distance <= radius**2, torch.exp(alpha * (nearest - distance)), 0)
    window = weights / weights.detach().sum((-2, -1), keepdim=True)
    return torch.stack(positions, -1), window


def _check_weight(input, weight):
    check_tensor(_NAME, "weight", weight, input)
    if weight.dim() != 3 or weight.numel() == 0:
        raise ValueError(f"{_NAME}: weight must be [out_channels, C / groups, K], got shape {list(weight.shape)}")


def _output_shape(input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation):
    """Checks the arguments and returns the output's shape, computed from input and weight."""
    _check_weight(input, weight)
    shape = _conv.check_convolution(_NAME, input, weight, bias, kernel_size, stride, padding, dilation)
    if attention is not None:
        check_tensor(_NAME, "attention", attention, input, same_dtype=False)
        expected = (shape[0], weight.shape[2], *shape[2:])
        if attention.shape != expected:
            raise ValueError(
                f"{_NAME}: attention has shape {list(attention.shape)}, expected {list(expected)} = [N, K, outH, outW]"
            )
    return shape


def _multiply_adds(shapes, out_shape):
    # The filter, and for every input value a location reads at an output position its pixels, as many as a disc of the
    # radius holds on average, and its attention.
    batch, _, out_h, out_w = out_shape
    out_channels, group_in, locations = shapes[4]
    rows, columns = shapes[2][2:]
    value = round(math.pi / 4 * (rows - 1) * (columns - 1)) + (0 if shapes[3] is None else flops.MODULATED_VALUE)
    return batch * out_h * out_w * locations * (out_channels * group_in + value * shapes[0][1])


def _standard(
    operator, input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation
):  # fmt: skip
    """Location by location: each channel moved by whole pixels, and a depthwise convolution with its window."""
    channels, locations, *sides = window.shape
    _, _, *out_size = operator.output_shape(
        input, origin, window, attention, weight, bias, kernel_size, stride, padding, dilation
    )
    dtype, wide = input.dtype, window.dtype
    maps, values = input.to(wide), []
    for k in range(locations):
        moved = maps
        for axis in (0, 1):
            length, size = (out_size[axis] - 1) * stride[axis] + sides[axis], input.shape[2 + axis]
            first = origin[:, k, axis, None].long() - padding[axis]
            index = first + torch.arange(length, device=input.device)  # [C, length], pixels of the map
            on_map = (index >= 0) & (index < size)
            shape = (channels, -1, 1) if axis == 0 else (channels, 1, -1)
            index = torch.where(on_map, index, 0).view(shape)
            index = index.expand(*moved.shape[:2], *((-1, moved.shape[3]) if axis == 0 else (moved.shape[2], -1)))
            moved = moved.gather(2 + axis, index) * on_map.view(shape)
        values.append(F.conv2d(moved, window[:, k, None], stride=stride, groups=channels))
    values = torch.stack(values, 2)  # [N, C, K, outH, outW]
    if attention is not None:
        values = values * attention.to(wide).unsqueeze(1)
    weight, bias = weight.to(wide).flatten(1)[..., None, None], None if bias is None else bias.to(wide)
    return F.conv2d(values.flatten(1, 2), weight, bias, groups=channels // (weight.shape[1] // locations)).to(dtype)


_operator = Operator(
    _NAME,
    _output_shape,
    _multiply_adds,
    differentiable=("input", "window", "attention", "weight", "bias"),
    slopes={},  # linear in each of them
    standard=_standard,
)
