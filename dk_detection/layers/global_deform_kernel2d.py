"""Global deformable kernel with its generator."""

from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._per_image import conv2d_per_image
from dk_detection.layers._scope import WithScope
from dk_detection.ops import resample_kernel
from dk_detection.ops._common import overridable


class GlobalDeformKernel2d(WithScope, nn.Conv2d):
    """Convolution that resamples its kernel once for each image: the global DK of Deformable Kernels (2020), Sec. 3.3.

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, scopeH, scopeW]. The corner of the kernel's size is the kernel at
            rest; `scope()`, of the same shape, is what the taps sample from. In state dicts it is `lifted_weight`.
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
        parametrisation: "orthonormal", with which the resting layer trains as the rigid convolution does; or "paper",
            the scope itself is the parameter.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.kernel_offset = ZeroConv2d(
            self.in_channels, 2 * taps, 1, device=self.weight.device, dtype=self.weight.dtype
        )

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """{"kernel_offset": [N, 2 * kH * kW]}."""
        return {"kernel_offset": self.kernel_offset(input.mean((-2, -1), keepdim=True)).flatten(-3)}

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return _resampled_conv2d(
            input,
            weight=self.scope(),
            **self._rigid_arguments,
            groups=self.groups,
            kernel_size=self.kernel_size,
            clip=self.clip,
            **self.sampling(input),
        )


@overridable
def _resampled_conv2d(input, kernel_offset, weight, bias, stride, padding, dilation, groups, kernel_size, clip):
    """Convolution of each image with the kernel that its offset samples from `weight`."""

    def kernels(offset):
        return resample_kernel(weight, offset, kernel_size=kernel_size, clip=clip)

    shape = (*weight.shape[:2], *kernel_size)
    return conv2d_per_image(input, kernel_offset, kernels, shape, bias, stride, padding, dilation, groups)
