"""What the convolutions share: their checks, and the derivatives along the positions at which they sample."""

import math

import torch

from dk_detection.ops._common import check_tensor


def batch_of_one(operator: str, input: torch.Tensor, **maps: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Puts a batch dimension before an image `[C, H, W]` and its maps `[channels, outH, outW]`.

    Raises:
        TypeError: a map is not a floating-point tensor.
        ValueError: a map is on another device or has another number of dimensions.
    """
    for name, value in maps.items():
        if value is None:
            continue
        check_tensor(operator, name, value, input, same_dtype=False)
        if value.dim() != 3:
            raise ValueError(
                f"{operator}: {name} has shape {list(value.shape)}, expected 3 dimensions, since input is one image "
                f"without a batch, of shape {list(input.shape)}"
            )
    return tuple(None if value is None else value.unsqueeze(0) for value in (input, *maps.values()))


def check_convolution(
    operator: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Checks what every convolution has, and returns the output's shape; `weight` has 4 dimensions.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a size or a device does not fit.
    """
    if input.dim() != 4:
        raise ValueError(f"{operator}: input must be [N, C, H, W] or [C, H, W], got shape {list(input.shape)}")
    batch, channels, *size = input.shape
    out_channels, group_in = weight.shape[:2]
    if channels == 0 or channels % group_in:
        raise ValueError(
            f"{operator}: input has {channels} channels, expected a multiple of weight.shape[1] = {group_in}"
        )
    groups = channels // group_in
    if out_channels % groups:
        raise ValueError(
            f"{operator}: weight has {out_channels} output channels, expected a multiple of groups = {groups}"
        )
    out_h, out_w = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{operator}: input {size[0]}x{size[1]} with padding {padding} is smaller than the kernel "
            f"{kernel_size[0]}x{kernel_size[1]} with dilation {dilation}: the output would be empty"
        )
    if bias is not None:
        check_tensor(operator, "bias", bias, input)
        if bias.shape != (out_channels,):
            raise ValueError(f"{operator}: bias has shape {list(bias.shape)}, expected [{out_channels}]")
    return batch, out_channels, out_h, out_w


def check_weight(operator: str, input: torch.Tensor, weight: torch.Tensor, cells: str) -> None:
    """Checks that `weight` is `[out_channels, C / groups, <cells>]`, of the dtype and on the device of input.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    check_tensor(operator, "weight", weight, input)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"{operator}: weight must be [out_channels, C / groups, {cells}], got shape {list(weight.shape)}"
        )


def count_groups(operator: str, name: str, map: torch.Tensor, values: int, kernel_size: tuple[int, int]) -> int:
    """How many groups of channels a map `[N, values * groups * kH * kW, outH, outW]` is for.

    Raises:
        ValueError: another number of dimensions, or of channels.
    """
    if map.dim() != 4:
        raise ValueError(f"{operator}: {name} must have 4 dimensions, got shape {list(map.shape)}")
    per_group = values * kernel_size[0] * kernel_size[1]
    groups = map.shape[1] // per_group
    if groups == 0 or map.shape[1] % per_group:
        raise ValueError(
            f"{operator}: {name} has {map.shape[1]} channels, expected {_rule(name, values)} = "
            f"{per_group * max(groups, 1)} ({_groups(name)}={max(groups, 1)}, kernel "
            f"{kernel_size[0]}x{kernel_size[1]}, {name} shape {list(map.shape)})"
        )
    return groups


def check_map(
    operator: str,
    name: str,
    map: torch.Tensor,
    values: int,
    kernel_size: tuple[int, int],
    input: torch.Tensor,
    output_shape: tuple[int, int, int, int],
) -> None:
    """Checks a map of `values` numbers for each group of input channels, tap and output position.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: a shape, a number of groups or a device does not fit.
    """
    check_tensor(operator, name, map, input, same_dtype=False)
    groups = count_groups(operator, name, map, values, kernel_size)
    if input.shape[1] % groups:
        raise ValueError(
            f"{operator}: {name} has {map.shape[1]} channels, so {_groups(name)} = {groups}, which does not divide the "
            f"{input.shape[1]} channels of input"
        )
    batch, _, out_h, out_w = output_shape
    expected = (batch, map.shape[1], out_h, out_w)
    if map.shape != expected:
        raise ValueError(
            f"{operator}: {name} has shape {list(map.shape)}, expected {list(expected)} = "
            f"[N, {_rule(name, values)}, outH, outW]"
        )


def check_sampling(operator, offset, mask, kernel_size, input, output_shape) -> None:
    """Checks the maps that move and modulate the samples of input, each if there is one, and that they fit together.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: a shape, a number of groups or a device does not fit.
    """
    if offset is not None:
        check_map(operator, "offset", offset, 2, kernel_size, input, output_shape)
    if mask is None:
        return
    check_map(operator, "mask", mask, 1, kernel_size, input, output_shape)
    if offset is not None and offset.shape[1] != 2 * mask.shape[1]:
        raise ValueError(
            f"{operator}: mask has {mask.shape[1]} channels, expected offset_groups * kH * kW = "
            f"{offset.shape[1] // 2}, half of those of offset"
        )


def _groups(name):
    return "kernel_offset_groups" if name == "kernel_offset" else "offset_groups"


def _rule(name, values):
    return f"{'' if values == 1 else f'{values} * '}{_groups(name)} * kH * kW"


def slope_by_offset(operator, values, direction, kernel_size):
    """The derivative of a convolution along a direction of its `offset`, `[N, 2 * groups * kH * kW, outH, outW]`."""
    batch, channels, *out_size = direction.shape
    groups = channels // (2 * kernel_size[0] * kernel_size[1])
    y, x = (
        torch.arange(kernel_size[i], device=direction.device)[:, None] * values["dilation"][i]
        + torch.arange(out_size[i], device=direction.device) * values["stride"][i]
        - values["padding"][i]
        for i in (0, 1)
    )  # [kH, outH], [kW, outW]
    rest = y[:, None, :, None], x[None, :, None, :]
    offset, direction = (t.reshape(batch, groups, *kernel_size, 2, *out_size) for t in (values["offset"], direction))
    mask = 1 if values["mask"] is None else values["mask"].view(batch, groups, *kernel_size, *out_size)
    slope = 0
    for sign, moved, modulation in _neighbours(offset, direction, rest):
        changes = {
            "offset": moved.reshape(batch, channels, *out_size),
            "mask": (mask * modulation).reshape(batch, channels // 2, *out_size),
        }
        slope = slope + sign * operator.forward(**values | changes)
    return slope


def slope_by_kernel_offset(operator, values, direction):
    """The derivative of a convolution along a direction of its `kernel_offset`, `[N, groups, kH, kW, 2, outH, outW]`.

    A value of the filter is multiplied by one of the input: what it is to be multiplied by besides may modulate that.
    """
    batch, groups, *kernel_size, _, out_h, out_w = direction.shape
    scope = values["weight"].shape[2:]
    y, x = (
        torch.arange(kernel_size[i], device=direction.device) + (scope[i] - kernel_size[i]) / 2 for i in (0, 1)
    )  # [kH], [kW]
    rest = y[:, None, None, None], x[:, None, None]

    def grouped(map, values):
        """[N, groups * values, outH, outW] -> [N, groups, values, outH, outW]."""
        return map.reshape(batch, map.shape[1] // values, values, out_h, out_w)

    taps = kernel_size[0] * kernel_size[1]
    offset = None if values["offset"] is None else grouped(values["offset"], 2 * taps)
    mask = None if values["mask"] is None else grouped(values["mask"], taps)
    # All numbers of groups divide that of the channels.
    common = math.lcm(groups, *(map.shape[1] for map in (offset, mask) if map is not None))

    def spread(map):
        """[N, groups, values, outH, outW] -> [N, common * values, outH, outW]."""
        map = map.unsqueeze(2).expand(-1, -1, common // map.shape[1], -1, -1, -1)
        return map.reshape(batch, common * map.shape[3], out_h, out_w)

    changes = {} if offset is None else {"offset": spread(offset)}
    mask = 1 if mask is None else spread(mask)
    slope = 0
    clip = scope if values["clip"] else None
    for sign, moved, modulation in _neighbours(values["kernel_offset"], direction, rest, clip):
        modulation = spread(modulation.reshape(batch, groups, taps, out_h, out_w))
        changes |= {"kernel_offset": moved, "mask": mask * modulation}
        slope = slope + sign * operator.forward(**values | changes)
    return slope


def _neighbours(offset, direction, rest, clip=None):
    """Takes the slopes of bilinear samples along a direction apart into samples.

    Between two rows of a grid a bilinear sample is linear along y: its slope is the sample at the same x on the lower
    row less that on the upper one. Alike along x. On a row, and beyond the ends of the grid, it is the backward's.

    Args:
        offset, direction: `[N, groups, kH, kW, 2, outH, outW]`.
        rest: The positions without offset along y and along x.
        clip: The size of a grid within which positions are kept; None, if it is surrounded by zeros.

    Yields:
        For each of four samples its sign, its offset, and what it is to be multiplied by, `[N, groups, kH, kW, outH,
        outW]`.
    """
    for axis in (0, 1):
        position = rest[axis] + offset.select(4, axis)
        low = position.floor()
        if clip is None:
            follows = position > -1  # false for NaN; beyond the other end both neighbours are zeros
        else:
            last = clip[axis] - 1
            follows = (position >= 0) & (position <= last)
            low = low.clamp(max=last - 1)  # at the last cell the slope is the one from inside
        factor = torch.where(follows, direction.select(4, axis), 0)
        for sign, cell in ((1, low + 1), (-1, low)):
            moved = list(offset.unbind(4))
            moved[axis] = cell - rest[axis]
            yield sign, torch.stack(moved, dim=4), factor
