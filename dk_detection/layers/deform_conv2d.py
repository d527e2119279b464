"""Deformable convolution (DCNv1) and modulated deformable convolution (DCNv2) with their offset branches."""

import math

from torch import Tensor, nn

from dk_detection.layers._base import RigidAtRest
from dk_detection.ops import deform_conv2d


class WithDataOffset(RigidAtRest):
    """Adds `conv_offset`, which computes from the layer's input what each tap needs at each output position."""

    _values_per_tap = 2  # 3: the last third of the channels is, through a sigmoid, the modulation

    def __init__(self, *args, offset_groups=1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._check_groups("offset_groups", offset_groups)
        self.offset_groups = offset_groups
        self.conv_offset = self._branch(self._values_per_tap * offset_groups * math.prod(self.kernel_size))

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """{"offset": [N, 2 * G * kH * kW, outH, outW], "mask": [N, G * kH * kW, outH, outW]}, G the offset groups.

        There is no mask without modulation.
        """
        values = self.conv_offset(input)
        if self._values_per_tap == 2:
            return {"offset": values}
        taps = values.shape[-3] // 3
        offset, mask = values.split([2 * taps, taps], dim=-3)
        return {"offset": offset, "mask": mask.sigmoid()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"


class _DeformConv(WithDataOffset):
    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return deform_conv2d(input, weight=self.weight, **self._rigid_arguments, **self.sampling(input))


class DeformConv2d(_DeformConv, nn.Conv2d):
    """Deformable convolution that learns its own offsets: DCNv1, Eq. 2 of Deformable Convolutional Networks (2017).

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, kH, kW].
        conv_offset: a convolution of the input to [N, 2 * offset_groups * kH * kW, outH, outW], in pixels of the input:
            groups contiguous, taps row-major, (dy, dx) interleaved.

    `conv_offset` starts at zero, and then the layer is the rigid convolution of the same weight and bias. Rigid
    checkpoints load, with `strict=True` too; those of MMCV's `DCN` load key for key.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.
        offset_groups: Number of groups of consecutive input channels that share their offsets. Divides `in_channels`.

    Raises:
        ValueError: An argument breaks its rule.
    """


class ModulatedDeformConv2d(_DeformConv, nn.Conv2d):
    """Deformable convolution that learns offsets and modulation: DCNv2, Eq. 1 of Deformable ConvNets v2 (2018).

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, kH, kW].
        conv_offset: a convolution of the input to [N, 3 * offset_groups * kH * kW, outH, outW]. The first
            2 * offset_groups * kH * kW channels are offsets as `DeformConv2d`'s. The others, one a group and tap, go
            through a sigmoid and are the modulation, in (0, 1).

    `conv_offset` starts at zero. The modulation is then 0.5 at every tap, so the resting layer is the rigid convolution
    of half its weight. `lift_weight` doubles a rigid weight on its way in, and rigid checkpoints load that way, with
    `strict=True` too; those of MMCV's `DCNv2` load key for key. The paper trains `conv_offset` at 0.1 of the learning
    rate.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.
        offset_groups: Number of groups of consecutive input channels that share their offsets and their modulation.
            Divides `in_channels`.

    Raises:
        ValueError: An argument breaks its rule.
    """

    _values_per_tap = 3

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """Twice the rigid weight, [out_channels, in_channels / groups, kH, kW]: at rest each tap counts sigmoid(0)."""
        return 2 * rigid_weight
