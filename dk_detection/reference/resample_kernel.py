"""Resampling of a convolution's kernel in plain torch."""

import torch


def _pair(value):
    return (value, value) if isinstance(value, int) else value


def tent(position, cells, clip):
    """Bilinear weights of all cells along one axis: max(0, 1 - |position - cell|), Eq. 12 of Deformable Kernels (2020).

    The slope at whole numbers is the one towards larger positions (Eq. 13), except at the end of a clipped axis, where
    it is the one from inside.

    Args:
        position: [...], in cells.
        cells: their number.
        clip: move positions to the nearest in [0, cells - 1]. Otherwise those outside (-1, cells) weigh nothing. NaN
            weighs nothing in any case.

    Returns:
        [..., cells], differentiable by position.
    """
    if clip:  # on a bound the derivative is 1, that of clamp depends on PyTorch's version
        position = torch.where(position < 0, 0, torch.where(position > cells - 1, cells - 1, position))
    inside = (position > -1) & (position < cells)
    position = torch.where(inside, position, -1).unsqueeze(-1)
    lower = position.detach().floor()
    if clip:
        lower = lower.clamp(max=max(cells - 2, 0))
    cell = torch.arange(cells, device=position.device)
    weight = torch.where(cell == lower, 1 - (position - lower), 0) + torch.where(cell == lower + 1, position - lower, 0)
    if clip and cells == 1:
        weight = torch.ones_like(weight)  # nowhere else to go
    return torch.where(inside.unsqueeze(-1), weight, 0)


def scope_weights(kernel_offset, kernel_size, scope_size, clip):
    """What each cell of the scope contributes to each tap.

    Args:
        kernel_offset: [..., 2 * kH * kW], (dy, dx) interleaved.
        kernel_size, scope_size: (vertical, horizontal).

    Returns:
        [..., kH, kW, scopeH, scopeW].
    """
    dy, dx = kernel_offset.unflatten(-1, (*kernel_size, 2)).unbind(-1)
    rest_y, rest_x = (
        torch.arange(kernel, dtype=kernel_offset.dtype, device=kernel_offset.device) + (scope - kernel) / 2
        for kernel, scope in zip(kernel_size, scope_size, strict=True)
    )
    along_y = tent(rest_y[:, None] + dy, scope_size[0], clip)
    along_x = tent(rest_x + dx, scope_size[1], clip)
    return along_y.unsqueeze(-1) * along_x.unsqueeze(-2)


def resample_kernel(weight, kernel_offset, *, kernel_size, clip=True):
    """Eq. 12 of Deformable Kernels (2020), cell by cell. Shapes as in `dk_detection.ops.resample_kernel`."""
    scope_size = weight.shape[2:]
    cells = scope_weights(kernel_offset, _pair(kernel_size), scope_size, clip)  # [N, kH, kW, scopeH, scopeW]
    kernel = 0
    for i in range(scope_size[0]):
        for j in range(scope_size[1]):
            kernel = kernel + cells[:, None, None, :, :, i, j] * weight[:, :, i, j, None, None]
    return kernel
