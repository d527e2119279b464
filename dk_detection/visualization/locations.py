"""Sampling locations: of a node through a stack of layers, of RoI bins, and of deformable kernels in their scope.

Locations in an image are (x, y) in its pixels, the first pixel [0, 1] x [0, 1], as COCO's boxes are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.functional import grid_sample, pad, unfold

from dk_detection.errors import UserError
from dk_detection.visualization.paths import Observation, Step

_MOST_POINTS = 100_000


@dataclass(frozen=True)
class Locations:
    """Where a node looks.

    Attributes:
        points: [P, 2] = (x, y) in the image.
        weights: [P], at least 0; the product of the modulations on the way, or the strength.
        node: (row, column) of the node in its map.
        center: (x, y) of its rest position in the image.
        layers: Names of the layers whose taps fan out, the node's own first.
    """

    points: Tensor
    weights: Tensor
    node: tuple[int, int]
    center: tuple[float, float]
    layers: list[str]

    @property
    def spread(self) -> float:
        """Root of the mean squared distance from the centre of mass, in pixels; weights count."""
        weights = self.weights / self.weights.sum()
        middle = (weights[:, None] * self.points).sum(0)
        return float((weights * (self.points - middle).square().sum(1)).sum().sqrt())


def sampling_locations(
    seen: Observation, node: tuple[int, int], *, levels: int = 3, strength: bool = False
) -> Locations:
    """Where in the image a node looks through a stack of layers: Figures 5 and 6 of Deformable ConvNets (2017).

    From the node on, each of the first `levels` deformable layers fans out into its taps, so that there are 9 to the
    power of n points for n layers of 3x3 taps (more with several offset groups). Layers between and behind them,
    convolutions and poolings, are followed along the middle of their taps, and so are further deformable layers, where
    offsets put that middle. A network that deforms nothing fans out in its convolutions of more than one tap. At
    fractional positions offsets are interpolated bilinearly, outside of the map they are those of its edge.

    Args:
        seen: What `observe` saw; its layer is the node's.
        node: (row, column), from `seen.node_at`.
        levels: Number of layers that fan out.
        strength: Weigh by the effective sampling locations of DCNv2, Section 2.1: the norm of the gradient of the
            node's response (the sum over its channels) by the sampling location, in the last layer that fans out. Of a
            rigid convolution, whose samples lie on the kinks of bilinear interpolation, it is the mean of the
            derivatives on either side. Otherwise a point weighs the product of the modulations on its way.

    Returns:
        The points and their weights.

    Raises:
        UserError: The way to the image cannot be followed, no layer on it has more than one tap, or there are too many
            points.
    """
    fans = _fans(seen, levels)
    device = seen.image.device
    positions = torch.tensor([node], dtype=torch.float64, device=device)
    weights = torch.ones(1, dtype=torch.float64, device=device)
    response = seen.output[0, :, node[0], node[1]].sum()
    for step in seen.path:
        base = positions * torch.tensor(step.stride, device=device)
        taps = step.rest(device)  # [K, 2]
        moved = taps.expand(len(positions), -1, -1)
        if step.is_deformable:
            offsets = _at(step.call.sampling["offset"], positions).unflatten(1, (-1, 2))  # [P, G * K, 2]
            moved = taps.repeat(offsets.shape[1] // len(taps), 1) + offsets
        if step not in fans:
            positions = base + moved.mean(1)
            continue
        if moved.shape[0] * moved.shape[1] > _MOST_POINTS:
            raise UserError(f"{levels} levels make more than {_MOST_POINTS} points: take fewer levels")
        weights = weights.repeat_interleave(moved.shape[1])
        if strength and step is fans[-1]:
            weights = _at(_strength(response, step), positions).flatten()
        elif not strength and step.is_deformable and "mask" in step.call.sampling:
            weights = weights * _at(step.call.sampling["mask"], positions).flatten()
        positions = (base[:, None] + moved).flatten(0, 1)
    return Locations(
        points=(positions.flip(1) + 0.5).cpu(),
        weights=weights.cpu(),
        node=tuple(node),
        center=seen.rest_position(node),
        layers=[step.name for step in fans],
    )


def _fans(seen: Observation, levels: int) -> list[Step]:
    """The layers that fan out."""
    deformable = [step for step in seen.path if step.is_deformable]
    rigid = [step for step in seen.path if step.is_convolution and step.num_taps > 1]
    fans = (deformable or rigid)[: max(levels, 0)]
    if not fans:
        raise UserError(f"{seen.layer}: no layer between it and the image samples more than one location")
    return fans


def _at(field: Tensor, positions: Tensor) -> Tensor:
    """Values [P, C] of a field [1, C, H, W] at positions [P, 2] = (row, column); outside it goes on as at its edge."""
    height, width = field.shape[2:]
    size = positions.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    grid = positions.flip(1) / size * 2 - 1  # (x, y), -1 and 1 the middles of the outer pixels
    values = grid_sample(field.detach().double(), grid[None, None], padding_mode="border", align_corners=True)
    return values[0, :, 0].t()


def _strength(response: Tensor, step: Step) -> Tensor:
    """Norms [1, G * K, outH, outW] of the gradient of a response by a layer's sampling locations."""
    if step.is_deformable:
        (gradient,) = torch.autograd.grad(response, step.call.sampling["offset"], retain_graph=True)
        return gradient.unflatten(1, (-1, 2)).norm(dim=2)
    if step.node is None:
        raise UserError(f"{step.name}: locations of a deformable kernel without data offsets have no gradient")
    (gradient,) = torch.autograd.grad(response, GradientEdge(step.node, 0), retain_graph=True)
    weight, groups = step.node._saved_weight.detach(), step.node._saved_groups
    # dR / d location of tap k at p = sum over c of (sum over o of dR / dy[o, p] * W[o, c, k]) * dx[c] / d location
    by_output = gradient[0].unflatten(0, (groups, -1)).flatten(2)  # [groups, out, L]
    kernels = weight.unflatten(0, (groups, -1)).flatten(3)  # [groups, out, in, K]
    by_sample = torch.einsum("gol,goik->gikl", by_output, kernels).flatten(0, 1)  # [C, K, L]
    input = step.node._saved_input.detach()
    slopes = []
    for dim in (2, 3):
        padded = pad(input, (0, 0, 1, 1) if dim == 2 else (1, 1, 0, 0))
        length = input.shape[dim]
        slope = (padded.narrow(dim, 2, length) - padded.narrow(dim, 0, length)) / 2
        columns = unfold(slope, step.kernel_size, step.dilation, step.padding, step.stride)
        slopes.append((columns.view_as(by_sample) * by_sample).sum(0))  # [K, L]
    return torch.stack(slopes).norm(dim=0).view(1, -1, *gradient.shape[2:])


def bin_locations(
    rois: Tensor,
    output_size: tuple[int, int],
    offset: Tensor | None = None,
    *,
    gamma: float = 0.1,
    position_sensitive: bool = False,
    spatial_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Where in the image the bins of RoI pooling lie.

    Args:
        rois: [n, 4] or [n, 5], the last four (x1, y1, x2, y2) in the image.
        output_size: (vertical, horizontal) number of bins.
        offset: [n, 2 * classes, partH, partW], x, then y, in units of `gamma` * RoI size, as the layers' `sampling` has
            it; None: bins at rest.
        gamma: Factor on the offsets.
        position_sensitive: The geometry of the original position-sensitive pooling: corners are rounded to whole pixels
            and the last pixel belongs to the RoI.
        spatial_scale: Pixels of the map per pixel of the image. A position-sensitive RoI is at least 0.1 pixels of the
            map large.

    Returns:
        Middles (x, y) of the bins, [n, classes, outH, outW, 2], and their sizes (width, height), [n, 2].
    """
    corners = rois[:, -4:].double()
    low, high = corners[:, :2], corners[:, 2:]
    if position_sensitive:
        low, high = (torch.sign(c) * torch.floor(c.abs() + 0.5) for c in (low, high))  # halves away from zero
        high = torch.maximum(high + 1, low + 0.1 / spatial_scale)
    size = high - low
    rows, columns = output_size
    across, down = torch.meshgrid(
        (torch.arange(columns, dtype=torch.float64, device=rois.device) + 0.5) / columns,
        (torch.arange(rows, dtype=torch.float64, device=rois.device) + 0.5) / rows,
        indexing="xy",
    )
    share = torch.stack([across, down], -1)  # [outH, outW, 2]
    middles = (low[:, None, None] + size[:, None, None] * share).unsqueeze(1)  # [n, 1, outH, outW, 2]
    if offset is not None:
        parts = offset.double().unflatten(1, (-1, 2))  # [n, classes, 2, partH, partW]
        part_rows = torch.arange(rows, device=rois.device) * parts.shape[3] // rows
        part_columns = torch.arange(columns, device=rois.device) * parts.shape[4] // columns
        moved = parts[..., part_rows[:, None], part_columns].movedim(2, -1)  # [n, classes, outH, outW, 2]
        middles = middles + gamma * size[:, None, None, None] * moved
    return middles, size / size.new_tensor([columns, rows])


def learned_taps(layer: nn.Module) -> Tensor:
    """Where the taps of a layer lie that has learned it once for all positions: kernel evolution, active convolution.

    Args:
        layer: With `tap_offset`, [..., kH * kW, 2], `kernel_size` and `dilation`.

    Returns:
        [sets, kH * kW, 2] = (row, column) from the middle of the kernel, in pixels of the layer's input.
    """
    offsets = layer.tap_offset.detach().double().cpu()
    along = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in layer.kernel_size]
    grid = torch.cartesian_prod(*along).view(-1, 2)
    return (grid + offsets).view(-1, *grid.shape) * torch.tensor(layer.dilation, dtype=torch.float64)


def kernel_locations(layer: nn.Module, kernel_offset: Tensor) -> Tensor:
    """Where in its scope the taps of a deformable kernel sample: Figure 1 of Deformable Kernels (2020).

    Args:
        layer: With `kernel_size`, `scope_size` and `clip`.
        kernel_offset: [N, 2 * G * kH * kW, ...], what the layer's `sampling` gives.

    Returns:
        [N, G * kH * kW, 2, ...] = (row, column), cell (0, 0) the scope's first.
    """
    offsets = kernel_offset.unflatten(1, (-1, 2))
    (kernel_h, kernel_w), (scope_h, scope_w) = layer.kernel_size, layer.scope_size
    rows = torch.arange(kernel_h, device=offsets.device) + (scope_h - kernel_h) / 2
    columns = torch.arange(kernel_w, device=offsets.device) + (scope_w - kernel_w) / 2
    rest = torch.cartesian_prod(rows, columns).view(-1, 2).repeat(offsets.shape[1] // (kernel_h * kernel_w), 1)
    positions = rest.view(*rest.shape, *[1] * (offsets.dim() - 3)) + offsets
    if layer.clip:
        limits = offsets.new_tensor([scope_h - 1, scope_w - 1]).view(2, *[1] * (offsets.dim() - 3))
        positions = positions.clamp(min=0).minimum(limits)
    return positions
