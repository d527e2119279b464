"""Local deformable kernels, alone and with deformable convolution, with their generators."""

import math

from torch import Tensor, nn

from dk_detection.layers._scope import WithScope
from dk_detection.layers.deform_conv2d import WithDataOffset
from dk_detection.ops import deform_kernel_conv2d


class _Local(WithScope):
    """Adds `kernel_offset`, which computes from the layer's input where each tap of each output position samples."""

    def __init__(self, *args, kernel_offset_groups=1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._check_groups("kernel_offset_groups", kernel_offset_groups)
        self.kernel_offset_groups = kernel_offset_groups
        self.kernel_offset = self._branch(2 * kernel_offset_groups * math.prod(self.kernel_size))

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """{"kernel_offset": [N, 2 * kernel_offset_groups * kH * kW, outH, outW]}."""
        return {"kernel_offset": self.kernel_offset(input)}

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return deform_kernel_conv2d(
            input,
            weight=self.scope(),
            **self._rigid_arguments,
            kernel_size=self.kernel_size,
            clip=self.clip,
            **self.sampling(input),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_offset_groups={self.kernel_offset_groups}"


class LocalDeformKernel2d(_Local, nn.Conv2d):
    """Convolution that resamples its kernel at every output position: the local DK of Deformable Kernels (2020), Eq. 7.

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, scopeH, scopeW]. The corner of the kernel's size is the kernel at
            rest; `scope()`, of the same shape, is what the taps sample from. In state dicts it is `lifted_weight`.
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
        parametrisation: "orthonormal", with which the resting layer trains as the rigid convolution does; or "paper",
            the scope itself is the parameter.

    Raises:
        ValueError: An argument breaks its rule.
    """


class DeformKernelConv2d(WithDataOffset, _Local, nn.Conv2d):
    """Local deformable kernel and deformable convolution in one: Deformable Kernels (2020), Eq. 11.

    Both offsets are learned. As `LocalDeformKernel2d`, with a second branch:

    Shapes:
        conv_offset: a convolution of the input, in the layer's own geometry, to
            [N, 2 * offset_groups * kH * kW, outH, outW], in pixels of the input, laid out as the kernel offsets.

    Both branches start at zero. A checkpoint of a `DeformConv2d` loads as well, but for the keys of `kernel_offset`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype,
            scope_size, kernel_offset_groups, clip, parametrisation: As `LocalDeformKernel2d`'s.
        offset_groups: Number of groups of consecutive input channels that share their data offsets. Divides
            `in_channels`.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """That of `LocalDeformKernel2d`, and {"offset": [N, 2 * offset_groups * kH * kW, outH, outW]}.

        With modulation also {"mask": [N, offset_groups * kH * kW, outH, outW]}.
        """
        return _Local.sampling(self, input) | WithDataOffset.sampling(self, input)


class ModulatedDeformKernelConv2d(DeformKernelConv2d, nn.Conv2d):
    """Local deformable kernel and modulated deformable convolution in one: Eq. 11 with the modulation of DCNv2.

    As `DeformKernelConv2d`; `conv_offset` has offset_groups * kH * kW channels more, whose sigmoid is the modulation of
    each tap, as in `ModulatedDeformConv2d`. It is 0.5 at rest, and `scope` is twice as strong for it.
    """

    _values_per_tap = 3
    _gain = 2
