"""How much a network deforms, in a few figures."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from dk_detection.visualization.locations import kernel_locations
from dk_detection.visualization.paths import Call


class SamplingFigures:
    """Sums up what the deformable layers of a network do over many images.

    Data offsets are in pixels of the layer's input, kernel offsets in cells of the scope. Each figure is the mean over
    the layers that have it:

    - "offset", "kernel_offset": root mean square length of an offset.
    - "offset_varying", "kernel_offset_varying": the same when each tap's mean over all images and positions is taken
      off: what no other rigid choice of the taps' places could do.
    - "clipped": share of the kernel's sampling positions that lay beyond the scope; clipping moved them to its edge.
    - "scope_used": the number of cells of the scope, as its share, over which the bilinear weights of all sampling
      positions would be spread evenly: exp(entropy) / cells. It is 1 where all cells get the same.
    - "modulation": mean of the modulations; "modulation_varying": standard deviation of a tap's.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._counts: dict[tuple[str, str], int] = defaultdict(int)

    def update(self, calls: list[Call]) -> None:
        """Takes in what `listening` saw."""
        for call in calls:
            for kind in ("offset", "kernel_offset", "mask"):
                if (values := call.sampling.get(kind)) is not None:
                    by_channel = values.detach().double().cpu().transpose(0, 1).flatten(1)  # [channels, samples]
                    self._add(call.name, kind, by_channel.sum(1), by_channel.shape[1])
                    self._add(call.name, f"{kind}_square", by_channel.square().sum(1), by_channel.shape[1])
            if "kernel_offset" in call.sampling:
                self._add_scope(call)

    def _add_scope(self, call: Call) -> None:
        layer, offset = call.module, call.sampling["kernel_offset"].detach().double().cpu()
        positions = kernel_locations(layer, offset).movedim(2, -1).flatten(0, -2)  # [P, 2]
        if layer.clip:
            moved = kernel_locations(_Unclipped(layer), offset).movedim(2, -1).flatten(0, -2)
            self._add(call.name, "clipped", (moved != positions).any(1).double().sum(), len(positions))
        along_y, along_x = (
            (1 - (positions[:, axis, None] - torch.arange(cells)).abs()).clamp(min=0)
            for axis, cells in enumerate(layer.scope_size)
        )
        self._add(call.name, "cells", along_y.t() @ along_x, 1)

    def _add(self, layer: str, what: str, value: Tensor, count: int) -> None:
        self._sums[layer, what] = self._sums[layer, what] + value
        self._counts[layer, what] += count

    def figures(self) -> dict[str, float]:
        """The figures of all that was taken in; those that no layer has are left out."""
        found = defaultdict(list)
        for (layer, what), value in self._sums.items():
            mean = value / max(self._counts[layer, what], 1)
            if what in ("offset", "kernel_offset", "mask"):
                square = self._sums[layer, f"{what}_square"] / max(self._counts[layer, what], 1)
                variance = (square - mean.square()).clamp(min=0).mean().item()
                if what == "mask":
                    found["modulation"].append(mean.mean().item())
                    found["modulation_varying"].append(math.sqrt(variance))
                else:  # a location has two coordinates
                    found[what].append(math.sqrt(2 * square.mean().item()))
                    found[f"{what}_varying"].append(math.sqrt(2 * variance))
            elif what == "clipped":
                found[what].append(mean.item())
            elif what == "cells":
                share = value.flatten() / value.sum()
                found["scope_used"].append(torch.special.entr(share).sum().exp().item() / len(share))
        return {name: sum(values) / len(values) for name, values in found.items()}


class _Unclipped:
    """What `kernel_locations` reads of a layer, without its clipping."""

    clip = False

    def __init__(self, layer) -> None:
        self.kernel_size, self.scope_size = layer.kernel_size, layer.scope_size
