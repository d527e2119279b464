"""What every convolution layer shares: nn.Conv2d's face, the rest state, and the way a rigid weight gets in."""

import torch
from torch import Tensor, nn


# These keep MMEngine's initialisers away: they choose by the names of a module's class and of its direct bases.
class _BranchConv2d(nn.Conv2d):
    pass


class _BranchLinear(nn.Linear):
    pass


class _Zero:
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroConv2d(_Zero, _BranchConv2d):
    """An offset branch: nn.Conv2d whose initial state is zero, whoever asks for it to be initialised."""


class ZeroLinear(_Zero, _BranchLinear):
    """The end of an offset branch: nn.Linear whose initial state is zero, whoever asks for it to be initialised."""


class RigidAtRest:
    """Mix-in for convolutions that are the rigid convolution until they have learned something.

    A layer lists it in front of nn.Conv2d, `class MyConv2d(RigidAtRest, nn.Conv2d)`. MMEngine chooses the initialiser
    of a module by the names of its direct bases, so `Conv2d` has to be one of them. Branches that steer the sampling
    are `ZeroConv2d` children.

    The layer is at rest when its branches are zero. Where a resting layer weighs its taps otherwise than the rigid
    convolution does, it says so in one place, `lift_weight`. From that follow `from_rigid`, which `to_deformable`
    calls, and the loading of rigid checkpoints: a state dict with `weight` and without any key of a branch gives the
    lifted weight and zero branches, and no key counts as missing. A state dict with a key of a branch loads as it is.

    Args:
        args, kwargs: nn.Conv2d's. The paddings 'same' and 'valid' are turned into numbers.

    Raises:
        ValueError: `padding_mode` is not 'zeros', 'same' needs more padding on one side than on the other, or a size is
            not an int or a pair in its range.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode must be 'zeros', got {self.padding_mode!r}")
        for argument, minimum in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            value = getattr(self, argument)
            if not isinstance(value, str) and (len(value) != 2 or min(value) < minimum):
                raise ValueError(
                    f"{type(self).__name__}: {argument} must be an int or a pair, at least {minimum}, got {value}"
                )
        if isinstance(self.padding, str):
            self.padding = self._numeric_padding()

    @property
    def rigid_shape(self) -> tuple[int, int, int, int]:
        """Shape of the rigid convolution's weight: (out_channels, in_channels / groups, kH, kW)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _numeric_padding(self) -> tuple[int, int]:
        if self.padding == "valid":
            return 0, 0
        total_h, total_w = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        if total_h % 2 or total_w % 2:
            raise ValueError(
                f"{type(self).__name__}: padding='same' needs an even dilation * (kernel_size - 1), so that both sides "
                f"are padded alike, got kernel_size={self.kernel_size}, dilation={self.dilation}"
            )
        return total_h // 2, total_w // 2

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """The `weight` with which the resting layer computes the rigid convolution.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW], the weight of the rigid convolution.

        Returns:
            A tensor of the shape of this layer's `weight`, in the data type and on the device of `rigid_weight`.
        """
        return rigid_weight

    @classmethod
    def from_rigid(cls, conv: nn.Conv2d, **layer_options) -> "RigidAtRest":
        """A resting layer that computes what `conv` computes.

        Args:
            conv: The rigid convolution. It is left as it is; the new layer shares no memory with it.
            layer_options: Arguments that the layer has and nn.Conv2d has not, such as `offset_groups`.

        Returns:
            The layer, with the device, data type, memory format, training flag and `requires_grad` of `conv`. Its
            branches require gradients in any case.

        Raises:
            ValueError: The layer does not take the geometry or the padding mode of `conv`.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **layer_options,
        )
        # A weight with one tap or one channel is contiguous in both formats and tells nothing about the network's.
        if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
            layer.to(memory_format=torch.channels_last)
        with torch.no_grad():
            layer.weight.copy_(layer.lift_weight(conv.weight))
        layer.weight.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(conv.bias)
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer.train(conv.training)

    def init_weights(self) -> None:
        """Brings the branches back to zero and leaves weight and bias alone.

        MMEngine calls a method of this name after its own initialisers have gone over every convolution of a network.
        """
        for branch in self.children():
            if isinstance(branch, ZeroConv2d):
                branch.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Conv2d does, and brings the branches back to zero."""
        super().reset_parameters()
        self.init_weights()  # nn.Conv2d's constructor comes through here before there is a branch

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        rigid = state_dict.get(f"{prefix}weight")
        branches = {f"{prefix}{name}.": child for name, child in self.named_children() if isinstance(child, ZeroConv2d)}
        if isinstance(rigid, Tensor) and not any(key.startswith(tuple(branches)) for key in state_dict):
            # The dictionary is the loader's own copy, and the branches read their keys from it after this call.
            if rigid.shape == self.rigid_shape:
                state_dict[f"{prefix}weight"] = self.lift_weight(rigid)
            for branch_prefix, branch in branches.items():
                for name, parameter in branch.named_parameters():
                    # On the checkpoint's device: under `assign=True` it may fill a model that lies on the meta device.
                    state_dict[branch_prefix + name] = rigid.new_zeros(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
