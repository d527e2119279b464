"""How the cells of a scope make up the taps of a kernel (Deformable Kernels, 2020, Eq. 12)."""

import torch


def cell_weights(kernel_offset: torch.Tensor, scope: tuple[int, int], clip: bool) -> torch.Tensor:
    """What each cell contributes to each tap.

    Args:
        kernel_offset: `[..., kH, kW, 2]` in cells of the scope, (dy, dx).
        scope: (vertical, horizontal) number of cells.
        clip: whether to keep sampling positions within the scope.

    Returns:
        `[..., kH, kW, scopeH * scopeW]`, differentiable.
    """
    kernel_h, kernel_w = kernel_offset.shape[-3:-1]
    dy, dx = kernel_offset.unbind(-1)
    along_y = _tents(_rest(kernel_h, scope[0], dy)[:, None] + dy, scope[0], clip)  # [..., kH, kW, scopeH]
    along_x = _tents(_rest(kernel_w, scope[1], dx) + dx, scope[1], clip)  # [..., kH, kW, scopeW]
    return (along_y.unsqueeze(-1) * along_x.unsqueeze(-2)).flatten(-2)


def _rest(kernel, scope, like):
    """Where taps lie in the scope without offset, along one axis."""
    return torch.arange(kernel, dtype=like.dtype, device=like.device) + (scope - kernel) / 2


def _tents(position, cells, clip):
    """The bilinear weight of each cell along one axis: [...] -> [..., cells]."""
    if clip:  # not with clamp: on a bound, where taps may rest, its derivative is 0 from PyTorch 2.14 on
        position = torch.where(position < 0, 0, torch.where(position > cells - 1, cells - 1, position))
    inside = (position > -1) & (position < cells)  # false for NaN
    position = torch.where(inside, position, 0)
    lower = position.detach().floor()
    if clip:
        lower = lower.clamp(max=max(cells - 2, 0))  # the last cell ends an interval, so its slope comes from inside
    fraction = position - lower
    if clip and cells == 1:
        fraction = fraction.detach()
    lower, inside = lower.unsqueeze(-1), inside.unsqueeze(-1)
    cell = torch.arange(cells, device=position.device)
    fraction = fraction.unsqueeze(-1)
    return ((cell == lower) & inside) * (1 - fraction) + ((cell == lower + 1) & inside) * fraction
