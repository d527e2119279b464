"""Fig. 2 of Differentiable Kernel Evolution, drawn from our operators: python docs/search_path.py [FILE.png].

One pixel of a map is 1, all others are 0, and gradient ascent moves the location of one tap to make its output larger.
The optimum is the pixel. The location is interpolated by the Gaussian of `kernel_evolution_conv2d` or bilinearly, by
`deform_conv2d`; both start alike and move at the same rate.
"""

import sys

import torch
from torch import Tensor

from dk_detection.ops import deform_conv2d, kernel_evolution_conv2d

# The paper's start, mirrored: on a whole pixel, which -1 is, our bilinear gradient is that towards larger coordinates,
# so from +1 it would see nothing of the pixel at 0.
START, RATE, STEPS, NEAR = (-1.0, -0.7), 0.1, 120, 0.05
_MIDDLE = 4


def output(location: Tensor, interpolation: str) -> Tensor:
    """What a tap at `location`, [2] = (dy, dx) from the pixel, reads of it."""
    map = torch.zeros(1, 1, 2 * _MIDDLE + 1, 2 * _MIDDLE + 1, dtype=location.dtype)
    map[..., _MIDDLE, _MIDDLE] = 1
    one = map.new_ones(1, 1, 1)
    if interpolation == "gaussian":
        result = kernel_evolution_conv2d(map, location.view(1, 1, 2), one)
    else:
        offset = location.view(1, 2, 1, 1).expand(-1, -1, *map.shape[2:])
        result = deform_conv2d(map, offset, one.unsqueeze(-1))
    return result[0, 0, _MIDDLE, _MIDDLE]


def search(interpolation: str, start: tuple[float, float] = START, rate: float = RATE, steps: int = STEPS) -> Tensor:
    """The locations on the way, [steps + 1, 2] = (dy, dx); `interpolation` is "gaussian" or "bilinear"."""
    location = torch.tensor(start, dtype=torch.float64)
    path = [location]
    for _ in range(steps):
        location = location.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(output(location, interpolation), location)
        location = location.detach() + rate * gradient
        path.append(location)
    return torch.stack(path)


def steps_to(path: Tensor, near: float = NEAR) -> int | None:
    """The first step from which on a path stays within `near` pixels of the optimum; None if there is none.

    That it stays has to show in 20 steps at least.
    """
    outside = (path.norm(dim=1) >= near).nonzero().flatten()
    first = int(outside[-1]) + 1 if len(outside) else 0
    return first if first + 20 < len(path) else None


def detour(path: Tensor, near: float = NEAR) -> float:
    """The farthest that a path is from the straight way to the optimum, before it first comes within `near` pixels."""
    inside = (path.norm(dim=1) < near).nonzero().flatten()
    part = path[: int(inside[0]) + 1 if len(inside) else None]
    along = path[0] / path[0].norm()
    return float((part[:, 0] * along[1] - part[:, 1] * along[0]).abs().max())


def main(target: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    way, distance = figure.subplots(1, 2)
    for name, color in (("gaussian", "#0b4f9e"), ("bilinear", "#ff595e")):
        path = search(name)
        late = path[-20:].norm(dim=1).max()
        print(
            f"{name}: within {NEAR} pixels for good from step {steps_to(path)}; up to {detour(path):.3f} pixels off "
            f"the straight way; in the last 20 of {STEPS} steps up to {late:.3f} pixels away"
        )
        way.plot(path[:, 1], path[:, 0], ".-", color=color, label=name, markersize=4, linewidth=0.8)
        distance.plot(path.norm(dim=1), color=color, label=name)
    way.plot(0, 0, "*", color="#3ddc84", markersize=12, zorder=0)
    way.set(xlabel="dx (pixels)", ylabel="dy (pixels)", aspect="equal")
    distance.axhline(NEAR, color="#b8b8b8", linewidth=0.8)
    distance.set(xlabel="step", ylabel="distance from the optimum (pixels)")
    for axis in (way, distance):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "search-path.png")
