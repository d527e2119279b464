"""Conditional convolution, the dynamic baseline of Deformable Kernels."""

import torch
from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._lifted import Lifted
from dk_detection.layers._per_image import conv2d_per_image
from dk_detection.ops._common import overridable, without_autocast


class CondConv2d(Lifted, nn.Conv2d):
    """Convolution whose kernel is mixed for each image out of several experts: Soft Conditional Computation (2019).

    Shapes:
        input: [N, in_channels, H, W].
        output: [N, out_channels, outH, outW], as nn.Conv2d's.
        weight: [out_channels, num_experts * in_channels / groups, kH, kW]: beside one another the kernel at rest, and
            num_experts - 1 directions in which the experts differ. In state dicts it is `lifted_weight`.
        routing: a fully connected layer (written as a 1x1 convolution) from the input's average over all positions to
            [N, num_experts]. Its sigmoid is the share of each expert.

    `routing` starts at zero, and every share is 0.5; the experts add up to twice the kernel at rest. The directions in
    which they differ start as noise as strong as the weight, drawn with a fixed seed, as equal experts would stay equal
    forever. Rigid checkpoints load, with `strict=True` too.

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

    def __init__(self, *args, num_experts=8, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        self._lift()
        self.routing = ZeroConv2d(self.in_channels, num_experts, 1, device=self.weight.device, dtype=self.weight.dtype)

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """The rigid weight, and noise beside it.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW].

        Returns:
            [out_channels, num_experts * in_channels / groups, kH, kW].
        """
        out_channels, _, *kernel_size = rigid_weight.shape
        lifted = self._noise(rigid_weight, out_channels, self.num_experts * rigid_weight.shape[1], *kernel_size)
        lifted[:, : rigid_weight.shape[1]] = rigid_weight
        return lifted

    def _make_basis(self) -> Tensor:
        """[E, E]: expert e is the sum over j of basis[e, j] times part j of the weight.

        The first column is constant, the others are those of Helmert's orthonormal matrix.
        """
        part = torch.arange(self.num_experts, dtype=torch.float64, device="cpu")
        expert = part.unsqueeze(1)
        basis = ((expert < part).double() - part * (expert == part)) / (part * (part + 1)).sqrt()
        basis[:, 0] = 1
        return 2 / self.num_experts * basis

    def experts(self) -> Tensor:
        """The kernels that are mixed, [num_experts, out_channels, in_channels / groups, kH, kW]."""
        return torch.einsum("ej,ojikl->eoikl", self.basis, self.weight.unflatten(1, (self.num_experts, -1)))

    def _from_version_1(self, weight: Tensor) -> Tensor:
        inverse = self._make_basis().inverse().to(weight.device)
        experts = weight.double().unflatten(1, (self.num_experts, -1))
        return torch.einsum("je,oeikl->ojikl", inverse, experts).flatten(1, 2).to(weight.dtype)

    def shares(self, input: Tensor) -> Tensor:
        """The share of each expert, [N, num_experts], from the input [N, in_channels, H, W]."""
        return self.routing(input.mean((-2, -1), keepdim=True)).flatten(-3).sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] or [in_channels, H, W] to the same with out_channels, outH, outW."""
        return _mixed_conv2d(
            input,
            self.shares(input),
            self.weight,
            self.basis,
            groups=self.groups,
            **self._rigid_arguments,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_experts={self.num_experts}"


@overridable
def _mixed_conv2d(input, shares, weight, basis, bias, stride, padding, dilation, groups):
    """Convolution of each image with its own mixture of experts."""
    parts = weight.unflatten(1, (basis.shape[0], -1))  # [O, E, I, kH, kW]

    def kernels(shares):
        with without_autocast(weight.device.type):  # sums of weights stay as precise as weights
            return torch.einsum("nj,ojikl->noikl", shares.to(weight.dtype) @ basis, parts)

    shape = (parts.shape[0], *parts.shape[2:])
    return conv2d_per_image(input, shares, kernels, shape, bias, stride, padding, dilation, groups)
