"""What the RoI pooling operators share: their RoIs, their checks, the derivative along their offsets."""

import math
from collections.abc import Callable, Sequence

import torch

from dk_detection.ops._common import check_tensor
from dk_detection.ops._operator import Operator


def as_rois(operator: str, rois: torch.Tensor | Sequence[torch.Tensor], input: torch.Tensor) -> torch.Tensor:
    """RoIs in one tensor, `[n, 5]` = (batch index, x1, y1, x2, y2).

    Args:
        operator: who asks, for messages.
        rois: that tensor, which is not checked here, or one tensor `[k, 4]` = (x1, y1, x2, y2) for each image.
        input: `[N, C, H, W]`, the map that the RoIs lie on.

    Raises:
        TypeError: the list holds something else than floating-point tensors.
        ValueError: a shape, the number of images or a device does not fit.
    """
    if not isinstance(rois, (list, tuple)):
        return rois
    if len(rois) != len(input):
        raise ValueError(f"{operator}: rois is for {len(rois)} images, but input holds {len(input)}")
    for image, boxes in enumerate(rois):
        check_tensor(operator, f"rois[{image}]", boxes, input, same_dtype=False)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"{operator}: rois[{image}] must be [k, 4] = (x1, y1, x2, y2), got shape {list(boxes.shape)}"
            )
    numbered = [torch.nn.functional.pad(boxes, (1, 0), value=image) for image, boxes in enumerate(rois)]
    return torch.cat(numbered) if numbered else input.new_zeros(0, 5)


def check_maps_and_rois(operator: str, input: torch.Tensor, rois: torch.Tensor) -> None:
    """Checks that `input` is `[N, C, H, W]` with something on it and `rois` is `[n, 5]`.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device.
    """
    check_tensor(operator, "input", input)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"{operator}: input must be [N, C, H, W] with pixels in it, got shape {list(input.shape)}")
    check_tensor(operator, "rois", rois, input, same_dtype=False)
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(
            f"{operator}: rois must be [n, 5] = (batch index, x1, y1, x2, y2) or a list of [k, 4], one for each image, "
            f"got shape {list(rois.shape)}"
        )


def check_number(operator: str, name: str, value: float, positive: bool) -> None:
    """Checks a finite number.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or not positive though it has to be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{operator}: {name} must be a number, got {value!r}")
    if not (0 if positive else -math.inf) < value < math.inf:
        raise ValueError(f"{operator}: {name} must be {'positive and ' if positive else ''}finite, got {value!r}")


def check_integer(operator: str, name: str, value: int, least: int | None = None) -> None:
    """Checks an integer.

    Raises:
        TypeError: not an int.
        ValueError: below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{operator}: {name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{operator}: {name} must be at least {least}, got {value}")


def check_parts(operator, input, offset, mask, rois, classes, part_size):
    """Checks offset `[n, 2 * classes, *part_size]` and mask `[n, classes, *part_size]`, each if there is one.

    With one class the mask may also be `[n, *part_size]`.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device.
    """
    offset_shape, mask_shape = (rois, 2 * classes, *part_size), (rois, classes, *part_size)
    if offset is not None:
        check_tensor(operator, "offset", offset, input, same_dtype=False)
        if offset.shape != offset_shape:
            raise ValueError(f"{operator}: offset has shape {list(offset.shape)}, expected {list(offset_shape)}")
    if mask is not None:
        check_tensor(operator, "mask", mask, input, same_dtype=False)
        if mask.shape != mask_shape and not (classes == 1 and mask.shape == (rois, *part_size)):
            or_flat = f" or {[rois, *part_size]}" if classes == 1 else ""
            raise ValueError(f"{operator}: mask has shape {list(mask.shape)}, expected {list(mask_shape)}{or_flat}")


def bin_numbers(output_size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """The bins of a RoI, `[outH, outW, 2]` = (column, row), in the data type of `like`."""
    rows, columns = (torch.arange(bins, dtype=like.dtype, device=like.device) for bins in output_size)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)


def pooling(name: str, output_shape: Callable, multiply_adds: Callable, standard: Callable) -> Operator:
    """The operator `name(input, rois, offset, mask, ...)`; the arguments are `Operator`'s."""
    return Operator(
        name,
        output_shape,
        multiply_adds,
        differentiable=("input", "offset", "mask"),
        slopes={"offset": _slope_by_offset},
        standard=standard,
        once=True,
    )


def _slope_by_offset(operator, values, direction):
    """The derivative of RoI pooling along a direction of its `offset`, `[n, 2 * classes, partH, partW]`.

    The backward gives slopes summed over what shares an offset. Here nothing shares one: each channel of the output is
    an image of its own, with RoIs of its own, and each bin is a part.
    """
    input, rois, bins = values["input"], values["rois"], tuple(values["output_size"])
    (images, maps, *size), number = input.shape, len(rois)
    channels = values.get("output_channels", maps)
    classes, *parts = direction.shape[1] // 2, *direction.shape[2:]
    rows, columns = (torch.arange(bins[i], device=rois.device) * parts[i] // bins[i] for i in (0, 1))

    def apart(part, planes):
        """[n, planes * classes, partH, partW] -> [n * channels, planes, outH, outW]."""
        part = part.reshape(number, classes, planes, *parts)[..., rows[:, None], columns]
        return part.repeat_interleave(channels // classes, dim=1).reshape(number * channels, planes, *bins)

    channel = torch.arange(channels, device=rois.device).repeat(number)
    rois = rois.repeat_interleave(channels, dim=0)
    changes = {
        "input": input.reshape(images * channels, maps // channels, *size),
        "rois": torch.cat([rois[:, :1] * channels + channel[:, None], rois[:, 1:]], dim=1),
        "offset": apart(values["offset"], 2),
        "mask": None if values["mask"] is None else apart(values["mask"], 1),
        "output_channels": 1,
        "part_size": bins,
    }
    values = {name: changes.get(name, value) for name, value in values.items()}
    _, slopes, _ = operator.backward(
        grad_output=input.new_ones(len(rois), 1, *bins), output_mask=[False, True, False], **values
    )
    return (slopes * apart(direction, 2)).sum(1).view(number, channels, *bins)
