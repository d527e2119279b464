"""Active convolution: taps at learned places, the same at all positions."""

from torch import Tensor, nn

from dk_detection.layers._tap_offset import WithTapOffset
from dk_detection.ops import deform_conv2d
from dk_detection.ops._common import overridable


class ActiveConv2d(WithTapOffset, nn.Conv2d):
    """Convolution that learns where its taps lie: the active convolution unit (ACU), Jeon and Kim (2017).

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, kH, kW].
        tap_offset: [kH * kW, 2] = (dy, dx), how far each tap is from its place in the grid, in units of `dilation`
            pixels, for all channels and positions.

    A tap between pixels is interpolated bilinearly. `tap_offset` starts at zero, and then the layer is the rigid
    convolution of the same weight and bias. Rigid checkpoints load, with `strict=True` too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._add_tap_offset()

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """{"offset": [N, 2 * kH * kW, outH, outW]}, in pixels, the same everywhere."""
        return {
            "offset": _everywhere(input, self.tap_offset, self.kernel_size, self.stride, self.padding, self.dilation)
        }

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return deform_conv2d(
            input,
            weight=self.weight,
            **self._rigid_arguments,
            **self.sampling(input),
        )


@overridable
def _everywhere(input, tap_offset, kernel_size, stride, padding, dilation):
    """The offsets of one position, for all output positions of all images."""
    out_size = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input.shape[-2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    pixels = (tap_offset * tap_offset.new_tensor(dilation)).view(-1, 1, 1)
    return pixels.expand(*input.shape[:-3], -1, *out_size)
