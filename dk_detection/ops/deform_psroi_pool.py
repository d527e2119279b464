"""Deformable position-sensitive RoI pooling (Deformable Convolutional Networks, 2017, Section 2.2)."""

from collections.abc import Sequence

import torch

from dk_detection.ops import _onnx, _rois, flops
from dk_detection.ops._common import autocast, check_tensor, overridable, pair

_NAME = "deform_psroi_pool"


@overridable
def deform_psroi_pool(
    input: torch.Tensor,
    rois: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | tuple[int, int],
    *,
    offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spatial_scale: float = 1.0,
    output_channels: int,
    group_size: int,
    part_size: int | tuple[int, int] | None = None,
    samples_per_part: int = 4,
    gamma: float = 0.1,
) -> torch.Tensor:
    r"""RoI pooling whose bins each read a score map of their own, moved by the offset and scaled by the modulation of
    their part.

    .. math:: y(i, j) = \sum_{p \in \mathrm{bin}(i, j)} x_{i,j}(p_0 + p + \Delta p_{ij}) \cdot \Delta m_{ij} / n_{ij}

    Eq. 6 of Deformable Convolutional Networks on position-sensitive score maps; `mask` as in Eq. 2 of Deformable
    ConvNets v2. The geometry, and so the numbers, are those of the original operator, DeformablePSROIPooling of the
    papers' authors: corners are rounded (halves away from zero) and x2, y2 belong to the RoI, so its size is (x2 - x1 +
    1) * spatial_scale and at least 0.1; the samples of a bin lie at the left and upper edges of their cells. A sample
    more than half a pixel beyond the centres of the outermost pixels is left out of the mean; a nearer one takes the
    value of the nearest point on the map; a bin without samples is 0. An offset that is not finite leaves none.

    Args:
        input: `[N, output_channels * group_size ** 2, H, W]`, float64, float32, float16 or bfloat16, contiguous or
            channels-last (the output follows). Bin (i, j) lies in cell (g, h) = (i * group_size // outH, j * group_size
            // outW), and its channel c reads input channel (c * group_size + g) * group_size + h.
        rois: `[n, 5]` = (batch index, x1, y1, x2, y2) in pixels of the image, or a list of `[k, 4]` = (x1, y1, x2, y2),
            one for each image. Any floating-point type; float32 is best, as float16 rounds coordinates beyond 2048.
            Positions are computed in float32 or wider. No gradient flows to the RoIs.
        output_size: the bins of a RoI, an int or (vertical, horizontal).
        offset: `[n, 2 * classes, partH, partW]`; of each class first x in units of `gamma` * RoI width, then y in units
            of `gamma` * RoI height. The number of classes follows from the shape and divides `output_channels`: class k
            moves channels `[k * output_channels / classes, (k + 1) * output_channels / classes)`. Bin (i, j) belongs to
            part (i * partH // outH, j * partW // outW). Any floating-point type. None is 0 everywhere.
        mask: `[n, classes, partH, partW]`, with one class also `[n, partH, partW]`: the modulation of each part. Any
            floating-point type. None is 1 everywhere.
        spatial_scale: pixels of the map per pixel of the image, such as 1 / stride.
        output_channels: channels of the output.
        group_size: cells along each axis of a RoI that have score maps of their own; 1: all bins read the same maps.
        part_size: parts of a RoI, an int or (vertical, horizontal); None is output_size.
        samples_per_part: samples along each axis of a bin.
        gamma: the paper's factor on the normalised offsets.

    Returns:
        `[n, output_channels, outH, outW]` of input's dtype. Under autocast input is cast as for `conv2d`; rois, offset
        and mask keep their dtype.

    Raises:
        ValueError: a shape, a size, a device or a RoI (its batch index, a coordinate that is not finite) does not fit.
            On CUDA the RoIs are checked without waiting for the GPU: a wrong one gives NaN, and if the error does not
            come from this call, it comes from a later one of a RoI operator and says how many calls ago it was. With
            the environment variable CUDA_LAUNCH_BLOCKING=1 it comes from this call.
        TypeError: a dtype does not fit.
        RuntimeError: the compiled library is missing or was built from other sources; or a second derivative is taken.
    """
    check_tensor(_NAME, "input", input)
    (input,) = autocast(input.device.type, input)
    rois = _rois.as_rois(_NAME, rois, input)
    output_size = pair(_NAME, "output_size", output_size, 1)
    part_size = output_size if part_size is None else pair(_NAME, "part_size", part_size, 1)
    args = (
        *(input, rois, offset, mask, output_size, spatial_scale),
        *(output_channels, group_size, part_size, samples_per_part, gamma),
    )
    return _operator(*args)


def _output_shape(
    input,
    rois,
    offset,
    mask,
    output_size,
    spatial_scale,
    output_channels,
    group_size,
    part_size,
    samples_per_part,
    gamma,
):
    """Checks the arguments and returns the output's shape."""
    _rois.check_maps_and_rois(_NAME, input, rois)
    _rois.check_number(_NAME, "spatial_scale", spatial_scale, positive=True)
    _rois.check_number(_NAME, "gamma", gamma, positive=False)
    _rois.check_integer(_NAME, "output_channels", output_channels, 1)
    _rois.check_integer(_NAME, "group_size", group_size, 1)
    _rois.check_integer(_NAME, "samples_per_part", samples_per_part, 1)
    if input.shape[1] != output_channels * group_size**2:
        raise ValueError(
            f"{_NAME}: input has {input.shape[1]} channels, expected output_channels * group_size^2 = "
            f"{output_channels * group_size**2} (output_channels={output_channels}, group_size={group_size})"
        )
    for name, tensor in (("offset", offset), ("mask", mask)):
        if tensor is not None:
            check_tensor(_NAME, name, tensor, input, same_dtype=False)
    if offset is not None and (offset.dim() != 4 or offset.shape[1] < 2 or offset.shape[1] % 2):
        raise ValueError(f"{_NAME}: offset must be [n, 2 * classes, partH, partW], got shape {list(offset.shape)}")
    classes = _classes(offset, mask)
    if classes < 1 or output_channels % classes:
        source = "offset" if offset is not None else "mask"
        raise ValueError(
            f"{_NAME}: {source} is for {classes} classes, expected a divisor of output_channels={output_channels}"
        )
    _rois.check_parts(_NAME, input, offset, mask, rois.shape[0], classes, tuple(part_size))
    return rois.shape[0], output_channels, *output_size


def _classes(offset, mask):
    if offset is not None:
        return offset.shape[1] // 2
    return mask.shape[1] if mask is not None and mask.dim() == 4 else 1


def _multiply_adds(shapes, out_shape):
    # Every sample of every output, 4 x 4 of them where the counting tool does not pass the number on, and the
    # modulation of each output.
    samples = shapes[9] if isinstance(shapes[9], int) else 4
    rois, channels, out_h, out_w = out_shape
    modulation = 0 if shapes[3] is None else flops.MODULATED_VALUE
    return rois * channels * out_h * out_w * (samples**2 * flops.SAMPLED_VALUE + modulation)


def _standard(operator, *arguments):
    """By aligned RoI pooling: each sample that lies on the map is an RoI without extent, the others are left out."""
    operator.output_shape(*arguments)
    input, rois, offset, mask, output_size, spatial_scale, *position_sensitive = arguments
    output_channels, group_size, part_size, samples_per_part, gamma = position_sensitive
    wide, count, bins = torch.promote_types(input.dtype, torch.float32), rois.shape[0], tuple(output_size)
    classes = _classes(offset, mask)
    rois = rois.to(wide)
    corners = rois[:, 1:].sign() * (rois[:, 1:].abs() + 0.5).floor()
    low = corners[:, :2] * spatial_scale - 0.5  # [n, 2], (x, y)
    size = ((corners[:, 2:] + 1) * spatial_scale - 0.5 - low).clamp(min=0.1)
    low, size = low[:, None, None, None], size[:, None, None, None]
    low = low + _rois.bin_numbers(bins, rois) * (size / size.new_tensor(bins[::-1]))  # [n, 1, outH, outW, 2]

    def of_bins(parts):
        """[..., partH, partW] -> [..., outH, outW]."""
        rows, columns = (torch.arange(bins[i], device=rois.device) * part_size[i] // bins[i] for i in (0, 1))
        return parts.to(wide)[..., rows[:, None], columns]

    if offset is not None:
        moves = of_bins(offset.unflatten(1, (classes, 2))).movedim(2, -1)  # [n, classes, outH, outW, 2]
        low = low + gamma * size * moves
    low = low.expand(-1, classes, -1, -1, -1)

    # Each image is cut into those that one class and one cell of the group read.
    channels = output_channels // classes
    maps = input.to(wide).unflatten(1, (classes, channels, group_size, group_size)).movedim(2, 4).flatten(0, 3)
    cell_y, cell_x = (torch.arange(bins[i], device=rois.device) * group_size // bins[i] for i in (0, 1))
    image = rois[:, 0].long()[:, None, None, None] * classes + torch.arange(classes, device=rois.device)[:, None, None]
    image = ((image * group_size + cell_y[:, None]) * group_size + cell_x).flatten()  # of each bin of each class

    (height, width), step = input.shape[2:], size / size.new_tensor(bins[::-1]) / samples_per_part
    total, on_map = 0, 0
    for row in range(samples_per_part):
        for column in range(samples_per_part):
            x, y = (low + step * step.new_tensor([column, row])).unbind(-1)
            inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)  # false for NaN
            x, y = (torch.where(inside, x, 0).clamp(0, width - 1), torch.where(inside, y, 0).clamp(0, height - 1))
            position = torch.stack([x, y], -1).flatten(0, 3)
            value = _onnx.roi_align(_NAME, maps, image, position, torch.zeros_like(position), (1, 1), 1)
            value = value.reshape(count, classes, *bins, channels)
            total, on_map = total + value * inside.unsqueeze(-1), on_map + inside
    output = total / on_map.clamp(min=1).unsqueeze(-1)
    if mask is not None:
        output = output * of_bins(mask.view(count, classes, *part_size)).unsqueeze(-1)
    return output.movedim(-1, 2).flatten(1, 2).to(input.dtype)


_operator = _rois.pooling(_NAME, _output_shape, _multiply_adds, _standard)
