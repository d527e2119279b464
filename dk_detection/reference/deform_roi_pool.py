"""Deformable RoI pooling in plain torch."""

import math

import torch

from dk_detection.reference._sampling import tent


def deform_roi_pool(
    input, rois, output_size, *, offset=None, mask=None, spatial_scale=1.0, sampling_ratio=0, gamma=0.1
):  # fmt: skip
    """Eq. 2, Deformable ConvNets v2 (2018), RoI by RoI; without `mask` Eq. 6, Deformable Convolutional Networks (2017).

    Shapes as in `dk_detection.ops.deform_roi_pool`; `rois` is a tensor, `output_size` a pair.
    """
    height, width = input.shape[2:]
    bins_y, bins_x = output_size
    output = []
    for n, roi in enumerate(rois.to(torch.promote_types(input.dtype, torch.float32))):
        x1, y1, x2, y2 = roi[1:] * spatial_scale - 0.5
        move_x, move_y = (0, 0) if offset is None else offset[n]  # [bins_y, bins_x]
        y, inside_y, grid_y = _samples(y1, y2, bins_y, move_y, height, sampling_ratio, gamma, dim=0)
        x, inside_x, grid_x = _samples(x1, x2, bins_x, move_x, width, sampling_ratio, gamma, dim=1)
        rows = tent(y.clamp(0, height - 1), height) * inside_y[..., None]  # [bins_y, bins_x, grid_y, H]
        columns = tent(x.clamp(0, width - 1), width) * inside_x[..., None]  # [bins_y, bins_x, grid_x, W]
        image = input[int(roi[0])].to(rows.dtype)
        pooled = torch.einsum("chw,ijph,ijqw->cij", image, rows, columns) / max(grid_y * grid_x, 1)
        if mask is not None:
            pooled = pooled * mask.view(len(rois), bins_y, bins_x)[n]
        output.append(pooled)
    return torch.stack(output).to(input.dtype)


def _samples(low, high, bins, move, length, ratio, gamma, dim):
    """Positions `[bins_y, bins_x, grid]` along one axis, which of them lie on the map, and the size of the grid.

    Where nothing moves the bins, the positions are the same along the other axis, whose length is then 1.
    """
    size = high - low
    bin_size = size / bins
    grid = ratio if ratio > 0 else max(math.ceil(bin_size), 0)
    number = torch.arange(max(bins, grid), dtype=low.dtype, device=low.device)
    start = (low + number[:bins] * bin_size).unsqueeze(1 - dim)  # [bins_y, 1] or [1, bins_x]
    within = (number[:grid] + 0.5) * bin_size / max(grid, 1)
    position = (start + gamma * size * move)[..., None] + within
    return position, (position >= -1) & (position <= length), grid
