"""Bilinear sampling in plain torch."""

import torch


def bilinear(maps: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Samples maps at fractional positions (Eq. 3 and 4, Deformable Convolutional Networks).

    Args:
        maps: `[N, C, H, W]`.
        y, x: `[N, ...]` in pixels. Positions that are not finite or outside (-1, H) x (-1, W) give zero.

    Returns:
        `[N, C, ...]`, differentiable by maps, y and x.
    """
    batch, channels, height, width = maps.shape
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, -1), torch.where(inside, x, -1)
    top, left = y.detach().floor(), x.detach().floor()
    result = 0
    for row in (top, top + 1):
        for column in (left, left + 1):
            on_map = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(on_map, row * width + column, 0).long().view(batch, 1, -1)
            value = maps.flatten(2).gather(2, index.expand(-1, channels, -1)).view(batch, channels, *y.shape[1:])
            # G(q, p) = g(q_y, p_y) * g(q_x, p_x) with g(a, b) = max(0, 1 - |a - b|)
            weight = (1 - (row - y).abs()) * (1 - (column - x).abs())
            result = result + torch.where(on_map, weight, 0).unsqueeze(1) * value
    return result


def tent(position: torch.Tensor, length: int) -> torch.Tensor:
    """g(q, p) = max(0, 1 - |q - p|) of Eq. 4, Deformable Convolutional Networks, for all pixels q of an axis.

    Args:
        position: `[...]` in pixels.
        length: number of pixels.

    Returns:
        `[..., length]`, the weights of linear interpolation, differentiable by position.
    """
    pixels = torch.arange(length, dtype=position.dtype, device=position.device)
    return (1 - (pixels - position.unsqueeze(-1)).abs()).clamp(min=0)
