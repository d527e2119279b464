"""Conditional convolution, the dynamic baseline of Deformable Kernels."""

import torch
from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._lifted import LiftedAtRest
from dk_detection.layers._per_image import conv2d_per_image
from dk_detection.ops._common import without_autocast


class CondConv2d(LiftedAtRest, nn.Conv2d):
    """Convolution whose kernel is mixed for each image out of several experts: Soft Conditional Computation (2019).

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, num_experts * in_channels / groups, kH, kW]: the experts' kernels beside one another.
        routing: a fully connected layer (written as a 1x1 convolution) from the input's average over all positions to
            [N, num_experts]. Its sigmoid is the share of each expert.

    `routing` starts at zero, and every share is 0.5. A rigid weight is lifted to experts that add up to twice of it, so
    that the resting layer is the rigid convolution. The experts differ, as equal ones would stay equal forever: to each
    comes noise as strong as the weight, drawn with a fixed seed and adding up to nothing. Rigid checkpoints load that
    way, with `strict=True` too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: As nn.Conv2d's.
            The paddings 'same' and 'valid' are turned into numbers; 'same' has to come out alike on both sides.
        padding_mode: Only 'zeros'.
        num_experts: Number of kernels to mix. The parameter counts of Deformable Kernels, Table 2, are those of 2
            experts in ResNet-50-DW and of 8 in MobileNet-V2, in all 1x1 and 3x3 convolutions of the blocks. (Its FLOP
            counts are those of convolving with every expert, where this layer mixes first and convolves once.)

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
        num_experts=8,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
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
        self.num_experts = num_experts
        self._lift()
        self.routing = ZeroConv2d(in_channels, num_experts, 1, device=device, dtype=dtype)

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """Experts that differ and whose sum is twice the rigid weight.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW].

        Returns:
            [out_channels, num_experts * in_channels / groups, kH, kW].
        """
        out_channels, *rest = rigid_weight.shape
        generator = torch.Generator().manual_seed(0)
        shape = out_channels, self.num_experts, *rest
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(rigid_weight.device)
        weight = rigid_weight.double()
        strength = weight.square().mean().sqrt()
        experts = weight.unsqueeze(1) + strength * (noise - noise.mean(1, keepdim=True))
        return (2 / self.num_experts * experts).flatten(1, 2).to(rigid_weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        shares = self.routing(input.mean((2, 3), keepdim=True)).flatten(1).sigmoid()  # [N, E]
        return conv2d_per_image(self, input, shares, self._mix)

    def _mix(self, shares: Tensor) -> Tensor:
        """Kernels of images: [n, E] -> [n, out_channels, in_channels / groups, kH, kW]."""
        out_channels, _, *kernel_size = self.weight.shape
        experts = self.weight.view(out_channels, self.num_experts, -1, *kernel_size).transpose(
            0, 1
        )  # [E, O, I, kH, kW]
        with without_autocast(self.weight.device.type):  # sums of weights stay as precise as weights
            return (shares.to(experts.dtype) @ experts.flatten(1)).view(-1, *experts.shape[1:])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_experts={self.num_experts}"
