"""What every convolution layer shares: nn.Conv2d's face, the rest state, and the way a rigid weight gets in."""

import re

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
    of a module by the names of its direct bases, so `Conv2d` has to be one of them. The layer's constructor names its
    own options and passes all else on. Branches that steer it are children that are a `ZeroConv2d` or end in one; the
    layer is at rest when that is zero, and then it computes the rigid convolution. Where the branches steer an operator
    of ours, `sampling` is what they compute for it.

    A state dict that has `weight` and no key of a branch is that of a rigid convolution: the layer takes its weight by
    `lift_weight` and comes to rest, and no key counts as missing. One with a key of a branch loads as it is. The name
    `conv_offset_mask` of the DCNv2 repositories is understood. Any other key beside the layer's own is an error, also
    where the loader is not strict: what it holds would be lost.

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

    @property
    def _rigid_arguments(self) -> dict:
        """What an operator takes of the rigid convolution, besides its weight."""
        return dict(bias=self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation)

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

    def _check_groups(self, name: str, groups: int) -> None:
        if groups < 1 or self.in_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: {name} must be positive and divide in_channels, "
                f"got {name}={groups}, in_channels={self.in_channels}"
            )

    def _branch(self, channels: int) -> ZeroConv2d:
        """A branch in the layer's own geometry, from its input to so many values for each output position."""
        return ZeroConv2d(
            self.in_channels,
            channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """What the layer's branches make of `input`: the arguments of its operator that say where it looks.

        Args:
            input: [N, in_channels, H, W], or an image without a batch, [in_channels, H, W].

        Returns:
            Of "offset", "mask" and "kernel_offset" those that the operator takes, in its layout.
        """
        raise NotImplementedError(f"{type(self).__name__} steers none of our operators")

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
            branches learn if the weight of `conv` does: what is frozen stays as it is.

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
        layer.requires_grad_(conv.weight.requires_grad)
        with torch.no_grad():
            layer.weight.copy_(layer.lift_weight(conv.weight))
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
                layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Conv2d does, and brings the branches back to zero."""
        super().reset_parameters()
        for branch in self._branches().values():  # nn.Conv2d's constructor comes through here before there is one
            for module in branch.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def _branches(self) -> dict[str, nn.Module]:
        """The children that are at rest or end in something that is."""
        return {
            name: child
            for name, child in self.named_children()
            if any(isinstance(module, _Zero) for module in child.modules())
        }

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # The dictionary is the loader's own copy, and the branches read their keys from it after this call.
        self.translate_names(state_dict, prefix)
        self._refuse_unknown_names([*state_dict, *unexpected_keys], prefix)
        self._take_rigid(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_rigid(self, state_dict, prefix) -> None:
        """Lifts the weight of a rigid convolution, and completes its state dict with branches at rest.

        Whatever else the layer has learned, such as the hidden layers of a branch, stays as it is.
        """
        known = ("weight", "bias")
        rigid = state_dict.get(f"{prefix}weight")
        if not isinstance(rigid, Tensor) or self._has_branch(state_dict, prefix):
            return
        if rigid.shape == self.rigid_shape:
            state_dict[f"{prefix}weight"] = self.lift_weight(rigid)
        own = {name: parameter for name, parameter in self.named_parameters(recurse=False) if name not in known}
        for name, branch in self._branches().items():
            for place, module in branch.named_modules(prefix=name):
                for key, parameter in module.named_parameters(recurse=False):
                    # On the checkpoint's device: under `assign=True` it may fill a model that lies on the meta device.
                    at_rest = rigid.new_zeros(parameter.shape) if isinstance(module, _Zero) else parameter
                    own[f"{place}.{key}"] = at_rest
        for name, value in own.items():
            state_dict[prefix + name] = value.detach()

    def _has_branch(self, state_dict, prefix) -> bool:
        return any(key.startswith(tuple(f"{prefix}{name}." for name in self._branches())) for key in state_dict)

    def translate_names(self, state_dict, prefix) -> None:
        """Gives an offset branch of another repository the name it has here, in a state dict about to be loaded."""
        if "conv_offset" not in self._branches():
            return
        old_names = [f"{prefix}conv_offset_mask."]  # the repositories of DCNv2
        if prefix:
            old_names.append(f"{prefix[:-1]}_offset.")  # Detectron2 and MMDetection 1, beside the layer
        for old in old_names:
            for key in [key for key in state_dict if key.startswith(old)]:
                state_dict[f"{prefix}conv_offset.{key.removeprefix(old)}"] = state_dict.pop(key)

    def _refuse_unknown_names(self, names, prefix) -> None:
        """Raises RuntimeError if there is anything beside the layer's tensors, or a branch beside the layer."""
        known = {*self._keys(), *(name for name, _ in self.named_children())}
        beside = re.compile(re.escape(prefix[:-1]) + r"_\w*(offset|mask)") if prefix else None
        for name in names:
            inside = name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] not in known
            if inside or (beside and beside.match(name)):
                raise RuntimeError(
                    f"{type(self).__name__}: the state dict has {name!r}, which would be lost. This layer knows "
                    f"{', '.join(sorted(known))}. dk_detection.translate_names(network) makes a network understand the "
                    "offset branches of Detectron2 and MMDetection 1; rename others, and remove what is of other layers"
                )

    def _keys(self) -> set[str]:
        """Names that a state dict may have for the layer's own tensors."""
        return {name for name, _ in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))}
