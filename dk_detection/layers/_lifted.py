"""What layers share whose weight is not of the rigid convolution's shape."""

import torch
from torch import nn

from dk_detection.layers._base import RigidAtRest


class LiftedAtRest(RigidAtRest):
    """A `RigidAtRest` whose `lift_weight` changes the weight's shape.

    Its initial weight is that of nn.Conv2d, lifted, so that a layer that has just been made is a rigid convolution just
    made. The constructor of a subclass calls `_lift` as soon as `lift_weight` works.
    """

    _is_lifted = False

    def _lift(self) -> None:
        self.weight = nn.Parameter(self.lift_weight(self.weight.detach()))
        self._is_lifted = True

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Conv2d does, and brings the branches back to zero."""
        if not self._is_lifted:  # nn.Conv2d's constructor
            super().reset_parameters()
            return
        lifted = self.weight
        self.weight = nn.Parameter(lifted.new_empty(self.rigid_shape))
        super().reset_parameters()
        with torch.no_grad():
            lifted.copy_(self.lift_weight(self.weight))
        self.weight = lifted
