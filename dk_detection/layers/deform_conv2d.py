"""Deformable convolution (DCNv1) and modulated deformable convolution (DCNv2) with their offset branches."""

from torch import Tensor, nn

from dk_detection.layers._base import RigidAtRest, ZeroConv2d
from dk_detection.ops import deform_conv2d


class _WithOffsetBranch(RigidAtRest):
    """Adds `conv_offset`, which computes from the layer's input what each tap needs at each output position."""

    _values_per_tap: int

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        offset_groups=1,
    ) -> None:
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(
                f"{type(self).__name__}: offset_groups must be positive and divide in_channels, "
                f"got offset_groups={offset_groups}, in_channels={in_channels}"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.offset_groups = offset_groups
        self.conv_offset = ZeroConv2d(
            in_channels,
            self._values_per_tap * offset_groups * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"


class DeformConv2d(_WithOffsetBranch, nn.Conv2d):
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

    _values_per_tap = 2

    def forward(self, input: Tensor) -> Tensor:
        offset = self.conv_offset(input)  # [N, 2*G*K, outH, outW]
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation)


class ModulatedDeformConv2d(_WithOffsetBranch, nn.Conv2d):
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

    def forward(self, input: Tensor) -> Tensor:
        values = self.conv_offset(input)  # [N, 3*G*K, outH, outW]
        taps = values.shape[1] // 3
        offset, mask = values.split([2 * taps, taps], dim=1)  # [N, 2*G*K, outH, outW], [N, G*K, outH, outW]
        mask = mask.sigmoid()
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
