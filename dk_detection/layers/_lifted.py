"""What layers share whose weight is larger than the rigid convolution's."""

import torch
from torch import Tensor, nn

from dk_detection.layers._base import RigidAtRest


class Lifted(RigidAtRest):
    """A `RigidAtRest` whose `weight` holds the rigid one and, beside it, what only a branch can bring to light.

    The rigid weight is the corner `weight[:out_channels, :in_channels / groups, :kH, :kW]`. At rest the layer is the
    rigid convolution of this corner, in its gradient and its weight decay too, so that it trains as the rigid one does
    until its branches have learned something. What its operator takes are combinations of the values in `weight`; the
    buffer `basis` has their coefficients.

    In state dicts the weight is called `lifted_weight`; a `weight` there is always a rigid one, and is lifted on its
    way in. Checkpoints of version 1, which torch notes in the metadata of a state dict, held the operator's weight.

    The constructor of a subclass calls `_lift` as soon as `lift_weight` and `_make_basis` work.
    """

    _version = 2
    _is_lifted = False
    _key = "lifted_weight"

    def _make_basis(self) -> Tensor | None:
        """The coefficients, in float64."""
        raise NotImplementedError

    def _from_version_1(self, weight: Tensor) -> Tensor:
        """This layer's `weight` from the operator's."""
        raise NotImplementedError

    def _lift(self) -> None:
        self.weight = nn.Parameter(self.lift_weight(self.weight.detach()))
        self._is_lifted = True
        self.register_buffer("basis", None, persistent=False)
        self._fill_basis()

    def _fill_basis(self) -> None:
        basis = self._make_basis()
        self.basis = None if basis is None else basis.to(self.weight)

    def _apply(self, *args, **kwargs) -> "Lifted":
        super()._apply(*args, **kwargs)
        self._fill_basis()  # with all the precision of a new type; and real, where a module has left the meta device
        return self

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
        self._fill_basis()

    def _corner(self, rigid_weight: Tensor, *shape: int) -> Tensor:
        """A weight of this shape, zero but for its corner, which is the rigid weight."""
        lifted = rigid_weight.new_zeros(shape)
        lifted[tuple(slice(size) for size in self.rigid_shape)] = rigid_weight
        return lifted

    def _noise(self, rigid_weight: Tensor, *shape: int) -> Tensor:
        """Values as strong as those of the rigid weight, drawn with a fixed seed."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        strength = rigid_weight.double().square().mean().sqrt()
        return (strength * noise.to(rigid_weight.device)).to(rigid_weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self._key] = destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        if local_metadata.get("version", self._version) < 2:
            self._update(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [prefix + self._key if key == f"{prefix}weight" else key for key in missing_keys]
        if self.basis is not None and (self.basis.device, self.basis.dtype) != (self.weight.device, self.weight.dtype):
            self._fill_basis()  # `assign=True` has exchanged the weight

    def _update(self, state_dict, prefix) -> None:
        """Brings a state dict of version 1 up to date. One that lacks a branch is not of this layer."""
        names = (f"{prefix}lifted_weight", f"{prefix}weight")  # in Detectron2, in MMDetection
        old = next((name for name in names if isinstance(state_dict.get(name), Tensor)), None)
        if old and all(any(key.startswith(f"{prefix}{name}.") for key in state_dict) for name in self._branches()):
            state_dict[prefix + self._key] = self._from_version_1(state_dict.pop(old))

    def _take_rigid(self, state_dict, prefix) -> None:
        weight, own = f"{prefix}weight", prefix + self._key
        if own not in state_dict:
            rigid = state_dict.get(weight)
            if isinstance(rigid, Tensor) and self._has_branch(state_dict, prefix):
                if rigid.shape != self.rigid_shape:
                    raise RuntimeError(
                        f"{type(self).__name__}: {weight} has shape {list(rigid.shape)}, expected that of a rigid "
                        f"weight, {list(self.rigid_shape)}; a weight of this layer's own is called {self._key}. "
                        "Checkpoints of dk_detection 0.1 have it under the old name: load them with the metadata that "
                        "torch saves in a state dict"
                    )
                state_dict[weight] = self.lift_weight(rigid)
            super()._take_rigid(state_dict, prefix)
        elif weight in state_dict:
            raise RuntimeError(f"{type(self).__name__}: the state dict has both {weight} and {own}, expected one")
        else:
            state_dict[weight] = state_dict.pop(own)

    def _keys(self) -> set[str]:
        return super()._keys() | {self._key}
