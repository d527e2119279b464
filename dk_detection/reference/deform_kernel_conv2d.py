"""Local deformable kernels in plain torch."""

import torch

from dk_detection.reference._sampling import bilinear
from dk_detection.reference.resample_kernel import scope_weights


def _pair(value):
    return (value, value) if isinstance(value, int) else value


def deform_kernel_conv2d(
    input, kernel_offset, weight, bias=None, stride=1, padding=0, dilation=1, *, kernel_size, offset=None, mask=None,
    clip=True,
):  # fmt: skip
    """Eq. 11 of Deformable Kernels (2020), tap by tap, with a modulation; without `offset` Eq. 7.

    Every output position gets its own kernel. Shapes as in `dk_detection.ops.deform_kernel_conv2d`.
    """
    (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w) = _pair(stride), _pair(padding), _pair(dilation)
    kernel_h, kernel_w = _pair(kernel_size)
    batch, channels = input.shape[:2]
    out_channels, group_in, *scope_size = weight.shape
    out_h, out_w = kernel_offset.shape[2:]
    groups, taps = channels // group_in, kernel_h * kernel_w
    kernel_offset = kernel_offset.view(batch, -1, 2 * taps, out_h, out_w)
    # W(k + dk) of every position, for the input channels of every kernel offset group
    cells = scope_weights(kernel_offset.permute(0, 1, 3, 4, 2), (kernel_h, kernel_w), scope_size, clip)
    cells = cells.repeat_interleave(channels // cells.shape[1], dim=1)  # [N, C, outH, outW, kH, kW, scopeH, scopeW]
    cells = cells.view(batch, groups, group_in, *cells.shape[2:])

    if offset is None:
        maps = 1 if mask is None else mask.shape[1] // taps
        offset = kernel_offset.new_zeros(batch, 2 * maps * taps, out_h, out_w)
    offset_groups = offset.shape[1] // (2 * taps)
    offset = offset.view(batch, offset_groups, kernel_h, kernel_w, 2, out_h, out_w)
    if mask is not None:
        mask = mask.view(batch, offset_groups, kernel_h, kernel_w, out_h, out_w)
    rest_y = torch.arange(out_h, dtype=offset.dtype, device=offset.device)[:, None] * stride_h - pad_h
    rest_x = torch.arange(out_w, dtype=offset.dtype, device=offset.device) * stride_w - pad_w

    filters = weight.view(groups, out_channels // groups, group_in, *scope_size)
    output = 0
    for i in range(kernel_h):
        for j in range(kernel_w):
            sampled = []
            for d, maps in enumerate(input.chunk(offset_groups, dim=1)):
                dy, dx = offset[:, d, i, j, 0], offset[:, d, i, j, 1]
                values = bilinear(maps, rest_y + i * dil_h + dy, rest_x + j * dil_w + dx)
                if mask is not None:
                    values = values * mask[:, d, i, j, None]
                sampled.append(values)
            sampled = torch.cat(sampled, dim=1).view(batch, groups, group_in, out_h, out_w)
            resampled = torch.einsum("gocyx,ngchwyx->ngochw", filters, cells[..., i, j, :, :])
            output = output + torch.einsum("ngochw,ngchw->ngohw", resampled, sampled).flatten(1, 2)
    return output if bias is None else output + bias.view(-1, 1, 1)
