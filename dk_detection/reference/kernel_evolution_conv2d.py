"""The generalised convolution of Differentiable Kernel Evolution in plain torch."""

import math

import torch
from torch.nn.functional import pad

from dk_detection.reference.deform_conv2d import _pair


def kernel_evolution_conv2d(
    input,
    location,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    *,
    kernel_size=1,
    attention=None,
    radius=2.0,
    alpha=2.0,
):
    """Eq. 16 of Differentiable Kernel Evolution (2019), location by location and pixel by pixel.

    Shapes as in `dk_detection.ops.kernel_evolution_conv2d`. A location gets the gradient of Eq. 15.
    """
    if input.dim() == 3:
        attention = None if attention is None else attention[None]
        output = kernel_evolution_conv2d(
            input[None], location, weight, bias, stride, padding, dilation,
            kernel_size=kernel_size, attention=attention, radius=radius, alpha=alpha,
        )  # fmt: skip
        return output[0]
    (stride_h, stride_w), (pad_h, pad_w), dilation = _pair(stride), _pair(padding), _pair(dilation)
    kernel_size = _pair(kernel_size)
    channels, height, width = input.shape[1:]
    out_channels, group_in, locations = weight.shape
    span_h, span_w = (d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
    out_h, out_w = (height + 2 * pad_h - span_h) // stride_h + 1, (width + 2 * pad_w - span_w) // stride_w + 1
    rows = torch.arange(out_h, device=input.device) * stride_h - pad_h
    columns = torch.arange(out_w, device=input.device) * stride_w - pad_w

    output = 0
    for c in range(channels):
        group_out = out_channels * group_in // channels
        first = c // group_in * group_out
        for k in range(locations):
            y, x = (
                location[c, k, axis].to(torch.promote_types(location.dtype, torch.float32)) * dilation[axis]
                + dilation[axis] * (kernel_size[axis] - 1) / 2
                for axis in (0, 1)
            )
            read = 0
            for weight_of_pixel, sy, sx in _gaussian(y, x, radius, alpha):
                row, column = rows + sy, columns + sx
                on_map = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))
                values = input[:, c][:, row.clamp(0, height - 1)][:, :, column.clamp(0, width - 1)]
                read = read + weight_of_pixel * torch.where(on_map, values, 0)  # Eq. 10
            if attention is not None:
                read = read * attention[:, k]
            term = weight[first : first + group_out, c % group_in, k].view(-1, 1, 1) * read[:, None]
            output = output + pad(term, (0, 0, 0, 0, first, out_channels - first - group_out))  # zeros elsewhere
    return output if bias is None else output + bias.view(-1, 1, 1)


def _gaussian(y, x, radius, alpha):
    """(G(s, y), s_y, s_x) of the whole pixels within the radius of a location, Eq. 14.

    G's derivative is 2 * alpha * G * (s - y), Eq. 15: its normaliser is a constant.
    """
    pixels = []
    here_y, here_x = float(y.detach()), float(x.detach())
    for sy in range(math.ceil(here_y - radius), math.floor(here_y + radius) + 1):
        for sx in range(math.ceil(here_x - radius), math.floor(here_x + radius) + 1):
            if (sy - here_y) ** 2 + (sx - here_x) ** 2 <= radius**2:
                pixels.append((torch.exp(-alpha * ((sy - y) ** 2 + (sx - x) ** 2)), sy, sx))
    normaliser = sum(weight.detach() for weight, _, _ in pixels)
    return [(weight / normaliser, sy, sx) for weight, sy, sx in pixels]
