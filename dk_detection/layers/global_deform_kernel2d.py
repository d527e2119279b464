"""Global deformable kernel with its generator."""

from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._per_image import conv2d_per_image
from dk_detection.layers._scope import WithScope
from dk_detection.ops import resample_kernel


class GlobalDeformKernel2d(WithScope, nn.Conv2d):
    """Convolution that resamples its kernel once for each image: the global DK of Deformable Kernels (2020), Sec. 3.3.

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, scopeH, scopeW].
        kernel_offset: the generator, a fully connected layer (written as a 1x1 convolution) from the input's average
            over all positions to [N, 2 * kH * kW], in cells of the scope: taps row-major, (dy, dx) interleaved.

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
        clip: Whether sampling positions are kept within the scope.

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
        clip=True,
    ) -> None:
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
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.kernel_offset = ZeroConv2d(in_channels, 2 * taps, 1, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        offset = self.kernel_offset(input.mean((2, 3), keepdim=True)).flatten(1)  # [N, 2*K]
        return conv2d_per_image(
            self,
            input,
            offset,
            lambda offset: resample_kernel(self.weight, offset, kernel_size=self.kernel_size, clip=self.clip),
        )
