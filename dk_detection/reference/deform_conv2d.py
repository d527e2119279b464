"""Deformable convolution in plain torch."""

import torch

from dk_detection.reference._sampling import bilinear


def _pair(value):
    return (value, value) if isinstance(value, int) else value


def deform_conv2d(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """Eq. 1, Deformable ConvNets v2 (2018), tap by tap; without `mask` Eq. 2, Deformable Convolutional Networks (2017).

    Shapes as in `dk_detection.ops.deform_conv2d`.
    """
    (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w) = _pair(stride), _pair(padding), _pair(dilation)
    batch, channels = input.shape[:2]
    out_channels, group_in, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    groups = channels // group_in
    offset_groups = offset.shape[1] // (2 * kernel_h * kernel_w)
    offset = offset.view(batch, offset_groups, kernel_h, kernel_w, 2, out_h, out_w)
    if mask is not None:
        mask = mask.view(batch, offset_groups, kernel_h, kernel_w, out_h, out_w)
    rest_y = torch.arange(out_h, dtype=offset.dtype, device=offset.device)[:, None] * stride_h - pad_h
    rest_x = torch.arange(out_w, dtype=offset.dtype, device=offset.device) * stride_w - pad_w

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
            tap = weight[:, :, i, j].view(groups, out_channels // groups, group_in)
            output = output + torch.einsum("goc,ngchw->ngohw", tap, sampled).reshape(batch, out_channels, out_h, out_w)
    return output if bias is None else output + bias.view(-1, 1, 1)
