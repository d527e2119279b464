"""Deformable position-sensitive RoI pooling in plain torch."""

import torch

from dk_detection.reference._sampling import tent


def deform_psroi_pool(
    input, rois, output_size, *, offset=None, mask=None, spatial_scale=1.0, output_channels, group_size, part_size=None,
    samples_per_part=4, gamma=0.1,
):  # fmt: skip
    """Eq. 6, Deformable Convolutional Networks (2017), on position-sensitive score maps, bin by bin.

    Shapes as in `dk_detection.ops.deform_psroi_pool`; `rois` is a tensor, `output_size` and `part_size` are pairs.
    """
    bins_y, bins_x = output_size
    parts_y, parts_x = part_size or output_size
    classes = 1
    if offset is not None:
        classes = offset.shape[1] // 2
    elif mask is not None and mask.dim() == 4:
        classes = mask.shape[1]
    if offset is not None:
        offset = offset.view(len(rois), classes, 2, parts_y, parts_x)
    if mask is not None:
        mask = mask.view(len(rois), classes, parts_y, parts_x)
    maps = input.unflatten(1, (classes, output_channels // classes, group_size, group_size))
    rois = rois.to(torch.promote_types(input.dtype, torch.float32))

    bins = rois.new_tensor([bins_x, bins_y])
    steps = torch.arange(samples_per_part, dtype=rois.dtype, device=rois.device)
    values = []
    for n, roi in enumerate(rois):
        low = _round(roi[1:3]) * spatial_scale - 0.5  # x, y
        size = ((_round(roi[3:5]) + 1) * spatial_scale - 0.5 - low).clamp(min=0.1)
        for cls in range(classes):
            for i in range(bins_y):
                for j in range(bins_x):
                    u, v = i * parts_y // bins_y, j * parts_x // bins_x  # the bin's part
                    start = low + size / bins * low.new_tensor([j, i])
                    if offset is not None:
                        start = start + gamma * size * offset[n, cls, :, u, v]
                    step = size / bins / samples_per_part
                    scores = maps[int(roi[0]), cls, :, i * group_size // bins_y, j * group_size // bins_x]  # [C, H, W]
                    rows = _mean_weights(start[1] + steps * step[1], scores.shape[1])
                    columns = _mean_weights(start[0] + steps * step[0], scores.shape[2])
                    value = torch.einsum("chw,h,w->c", scores.to(rows.dtype), rows, columns)
                    values.append(value if mask is None else value * mask[n, cls, u, v])
    output = torch.stack(values).view(len(rois), classes, bins_y, bins_x, output_channels // classes)
    return output.permute(0, 1, 4, 2, 3).reshape(len(rois), output_channels, bins_y, bins_x).to(input.dtype)


def _round(value):
    """To the nearest integer, halves away from zero, as C's round; torch.round takes halves to even numbers."""
    return torch.sign(value) * torch.floor(value.abs() + 0.5)


def _mean_weights(position, length):
    """Weights `[length]` of the pixels in the mean over those samples that lie on the map."""
    inside = (position >= -0.5) & (position <= length - 0.5)
    weights = tent(position.clamp(0, length - 1), length) * inside[:, None]
    return weights.sum(0) / inside.sum().clamp(min=1)
