"""Local deformable kernels, alone and with deformable convolution, with their generators."""

from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._scope import WithScope
from dk_detection.ops import deform_kernel_conv2d


class _Local(WithScope):
    """Adds `kernel_offset`, which computes from the layer's input where each tap of each output position samples."""

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
        scope_size=None,
        kernel_offset_groups=1,
        clip=True,
    ) -> None:
        self._check_groups("kernel_offset_groups", kernel_offset_groups, in_channels)
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
            scope_size=scope_size,
            clip=clip,
        )
        self.kernel_offset_groups = kernel_offset_groups
        self.kernel_offset = self._branch(2 * kernel_offset_groups)

    def _check_groups(self, name: str, groups: int, in_channels: int) -> None:
        if groups < 1 or in_channels % groups:
            raise ValueError(
                f"{type(self).__name__}: {name} must be positive and divide in_channels, "
                f"got {name}={groups}, in_channels={in_channels}"
            )

    def _branch(self, values_per_tap: int) -> ZeroConv2d:
        return ZeroConv2d(
            self.in_channels,
            values_per_tap * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_offset_groups={self.kernel_offset_groups}"


class LocalDeformKernel2d(_Local, nn.Conv2d):
    """Convolution that resamples its kernel at every output position: the local DK of Deformable Kernels (2020), Eq. 7.

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, scopeH, scopeW].
        kernel_offset: the generator, a convolution of the input, in the layer's own geometry, to
            [N, 2 * kernel_offset_groups * kH * kW, outH, outW], in cells of the scope: groups contiguous, taps
            row-major, (dy, dx) interleaved.

    `kernel_offset` starts at zero. The taps then lie in the middle of the scope, and the layer is the rigid convolution
    with the kernel found there. Rigid weights are lifted into the scope on their way in, and rigid checkpoints load
    that way, with `strict=True` too. The paper trains the generator at 0.01 (ResNet) or 0.1 (MobileNet) of the
    learning rate.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.
        scope_size: (vertical, horizontal) or an int, at least the kernel size. None is one more than the kernel size,
            the paper's choice: 4x4 for 3x3 kernels, 2x2 for 1x1.
        kernel_offset_groups: Number of groups of consecutive input channels that share their kernel offsets. Divides
            `in_channels`. The paper has one.
        clip: Whether sampling positions are kept within the scope.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def forward(self, input: Tensor) -> Tensor:
        return deform_kernel_conv2d(
            input,
            self.kernel_offset(input),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            kernel_size=self.kernel_size,
            clip=self.clip,
        )


class DeformKernelConv2d(_Local, nn.Conv2d):
    """Local deformable kernel and deformable convolution in one: Deformable Kernels (2020), Eq. 11.

    Both offsets are learned. As `LocalDeformKernel2d`, with a second branch:

    Shapes:
        conv_offset: a convolution of the input, in the layer's own geometry, to
            [N, 2 * offset_groups * kH * kW, outH, outW], in pixels of the input, laid out as the kernel offsets. If
            `modulated`, offset_groups * kH * kW channels more follow; their sigmoid is the modulation of each tap, as
            in `ModulatedDeformConv2d`.

    Both branches start at zero. The modulation is then 0.5 at every tap, so `lift_weight` doubles a rigid weight if
    the layer is `modulated`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype,
            scope_size, kernel_offset_groups, clip: As `LocalDeformKernel2d`'s.
        offset_groups: Number of groups of consecutive input channels that share their data offsets and their
            modulation. Divides `in_channels`.
        modulated: Whether taps are modulated.

    Raises:
        ValueError: An argument breaks its rule.
    """

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
        scope_size=None,
        kernel_offset_groups=1,
        offset_groups=1,
        modulated=False,
        clip=True,
    ) -> None:
        self._check_groups("offset_groups", offset_groups, in_channels)
        self.modulated = modulated
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
            scope_size=scope_size,
            kernel_offset_groups=kernel_offset_groups,
            clip=clip,
        )
        self.offset_groups = offset_groups
        self.conv_offset = self._branch((3 if modulated else 2) * offset_groups)

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """As `LocalDeformKernel2d`'s, and twice that if modulated: at rest each tap counts sigmoid(0)."""
        lifted = super().lift_weight(rigid_weight)
        return 2 * lifted if self.modulated else lifted

    def forward(self, input: Tensor) -> Tensor:
        offset, mask = self.conv_offset(input), None  # [N, 2*D*K or 3*D*K, outH, outW]
        if self.modulated:
            taps = offset.shape[1] // 3
            offset, mask = offset.split([2 * taps, taps], dim=1)
            mask = mask.sigmoid()
        return deform_kernel_conv2d(
            input,
            self.kernel_offset(input),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            kernel_size=self.kernel_size,
            offset=offset,
            mask=mask,
            clip=self.clip,
        )

    def extra_repr(self) -> str:
        modulated = ", modulated=True" if self.modulated else ""
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}{modulated}"
