"""The layer of Differentiable Kernel Evolution."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._tap_offset import WithTapOffset, rigid_grid
from dk_detection.ops import kernel_evolution_conv2d
from dk_detection.ops._common import overridable
from dk_detection.ops.kernel_evolution_conv2d import check_window

# How much a pixel of a map has in common with its neighbour, where a rigid weight is carried over to a kernel that
# smooths: between that of noise, 0, and that of images, near 1.
_CORRELATION = 0.5


class KernelEvolutionConv2d(WithTapOffset, nn.Conv2d):
    """Convolution that learns where it reads each input channel: Differentiable Kernel Evolution (2019), Eq. 16.

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, in_channels / groups, kH, kW].
        tap_offset: [in_channels, kH * kW, 2] = (dy, dx), how far each location is from its place in the rigid grid, in
            units of `dilation` pixels. The paper's locations are `location()`, the grid plus this.
        attention: a 1x1 convolution of the input to [N, kH * kW, outH, outW]. One plus it is the paper's attention
            score, a factor on what each location reads.

    A location between pixels reads a Gaussian mean of the pixels around it, and on a pixel too; so the layer smooths,
    on the grid as well. A rigid weight is on its way in exchanged for the one whose smoothed kernel comes closest, by
    `lift_weight`. How close that is depends on `alpha`: docs/kernel_evolution.md. Rigid checkpoints load that way, with
    `strict=True` too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.
        use_attention: Whether there is an attention.
        start: "grid", locations start on the rigid kernel's taps; or "normal", they are drawn from a standard normal
            distribution, as in the paper, and rigid weights are taken as they are.
        radius: Pixels farther from a location do not count; at least the square root of a half.
        alpha: How fast weights fall with the distance in pixels. The paper finds 1 to 10 to do as well.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        *args,
        use_attention: bool = True,
        start: str = "grid",
        radius: float = 2.0,
        alpha: float = 2.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if start not in ("grid", "normal"):
            raise ValueError(f"{type(self).__name__}: start must be 'grid' or 'normal', got {start!r}")
        self.start, self.radius, self.alpha = start, radius, alpha
        check_window(type(self).__name__, radius, alpha)
        self._add_tap_offset(self.in_channels)
        self.attention = None
        if use_attention:
            taps = self.tap_offset.shape[1]
            self.attention = ZeroConv2d(
                self.in_channels, taps, 1, self.stride, device=self.weight.device, dtype=self.weight.dtype
            )

    def _reset_tap_offset(self) -> None:
        if self.start == "grid":
            super()._reset_tap_offset()
            return
        nn.init.normal_(self.tap_offset)
        with torch.no_grad():
            self.tap_offset -= rigid_grid(self.kernel_size, self.tap_offset)

    def _start_like(self, weight: Tensor) -> Tensor:
        return super()._start_like(weight) if self.start == "grid" else self.tap_offset.detach()

    def location(self) -> Tensor:
        """Where each input channel is read, [in_channels, kH * kW, 2] = (dy, dx) in units of `dilation` pixels."""
        return _on_grid(self.tap_offset, self.kernel_size)

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """The weight with which the layer, its locations on the grid, comes closest to a rigid convolution.

        The least squares are those of the output, on maps whose pixels correlate by 0.5 to the power of their distance.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW].

        Returns:
            A tensor of the same shape.
        """
        if self.start != "grid":
            return rigid_weight
        matrix = self._unsmooth().to(rigid_weight.device)  # [K, K]
        return (rigid_weight.double().flatten(2) @ matrix.T).view_as(rigid_weight).to(rigid_weight.dtype)

    def _unsmooth(self) -> Tensor:
        """[K, K]: the lifted weight from the rigid one, of one pair of channels."""
        reach = int(self.radius)
        geometry = list(zip(self.kernel_size, self.dilation, strict=True))
        sides = [torch.arange(-reach, d * (k - 1) + reach + 1, device="cpu") for k, d in geometry]
        pixels = torch.cartesian_prod(*sides).double()  # [P, 2], all that the smoothed kernel touches
        taps = torch.cartesian_prod(*(torch.arange(k, device="cpu") * d for k, d in geometry)).double()  # [K, 2]
        distance = torch.cdist(pixels, taps)  # [P, K]
        smoothed = torch.where(distance <= self.radius, torch.exp(-self.alpha * distance.square()), 0)
        smoothed = smoothed / smoothed.sum(0)  # what a tap of weight 1 does
        rigid = (distance == 0).double()
        correlation = _CORRELATION ** torch.cdist(pixels, pixels)  # [P, P]
        return torch.linalg.solve(smoothed.T @ correlation @ smoothed, smoothed.T @ correlation @ rigid)

    def sampling(self, input: Tensor) -> dict[str, Tensor]:
        """{"location": [in_channels, kH * kW, 2]}, and with attention {"attention": [N, kH * kW, outH, outW]}."""
        if self.attention is None:
            return {"location": self.location()}
        # The scores of output positions are those of the pixels in the middle of the rigid kernel.
        ahead = [d * (k - 1) // 2 - p for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)]
        behind = [
            2 * p - d * (k - 1) + a
            for k, d, p, a in zip(self.kernel_size, self.dilation, self.padding, ahead, strict=True)
        ]
        if any(ahead) or any(behind):
            input = pad(input, (-ahead[1], behind[1], -ahead[0], behind[0]))
        return {"location": self.location(), "attention": 1 + self.attention(input)}

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return kernel_evolution_conv2d(
            input,
            weight=self.weight.flatten(2),
            **self._rigid_arguments,
            kernel_size=self.kernel_size,
            radius=self.radius,
            alpha=self.alpha,
            **self.sampling(input),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, start={self.start!r}, radius={self.radius}, alpha={self.alpha}"


@overridable
def _on_grid(tap_offset, kernel_size):
    return rigid_grid(kernel_size, tap_offset) + tap_offset
