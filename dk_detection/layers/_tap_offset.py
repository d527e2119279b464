"""What layers share that learn where their taps lie, once and for all positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dk_detection.layers._base import RigidAtRest


def rigid_grid(kernel_size: Sequence[int], like: Tensor) -> Tensor:
    """The taps of a rigid kernel from its middle, [kH * kW, 2] = (dy, dx) in units of its dilation."""
    along = [torch.arange(k, dtype=like.dtype, device=like.device) - (k - 1) / 2 for k in kernel_size]
    return torch.cartesian_prod(*along)


class WithTapOffset(RigidAtRest):
    """A `RigidAtRest` with a parameter `tap_offset`, [..., kH * kW, 2]: how far each tap is from its place in the grid.

    At rest it is zero, so weight decay draws taps to the grid. The constructor of a subclass calls `_add_tap_offset`.
    """

    def _add_tap_offset(self, *sets: int) -> None:
        """Adds the parameter: so many sets of taps, (dy, dx) in units of `dilation` pixels."""
        taps = math.prod(self.kernel_size)
        self.tap_offset = nn.Parameter(self.weight.new_empty(*sets, taps, 2))
        self._reset_tap_offset()

    def _reset_tap_offset(self) -> None:
        nn.init.zeros_(self.tap_offset)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Conv2d does, and brings taps and branches back to their start."""
        super().reset_parameters()
        if hasattr(self, "tap_offset"):  # nn.Conv2d's constructor comes through here before there is one
            self._reset_tap_offset()

    def _has_branch(self, state_dict, prefix) -> bool:
        return f"{prefix}tap_offset" in state_dict or super()._has_branch(state_dict, prefix)

    def _take_rigid(self, state_dict, prefix) -> None:
        is_rigid = f"{prefix}weight" in state_dict and not self._has_branch(state_dict, prefix)
        super()._take_rigid(state_dict, prefix)
        if is_rigid:
            state_dict[f"{prefix}tap_offset"] = self._start_like(state_dict[f"{prefix}weight"])

    def _start_like(self, weight: Tensor) -> Tensor:
        """The `tap_offset` that goes with a rigid weight, on that weight's device."""
        return weight.new_zeros(self.tap_offset.shape)
