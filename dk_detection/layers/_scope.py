"""What all deformable kernel layers share: a weight that holds more than the taps take from it."""

import torch
from torch import Tensor

from dk_detection.layers._lifted import LiftedAtRest
from dk_detection.ops import resample_kernel


class WithScope(LiftedAtRest):
    """A convolution that samples its kernel out of a larger one, the scope.

    Args:
        args, kwargs: nn.Conv2d's.
        scope_size: (vertical, horizontal) or an int, at least the kernel size. None is one more than the kernel size.
        clip: whether sampling positions are kept within the scope.
    """

    def __init__(self, *args, scope_size, clip, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if scope_size is None:
            scope_size = tuple(size + 1 for size in self.kernel_size)
        self.scope_size = (scope_size, scope_size) if isinstance(scope_size, int) else tuple(scope_size)
        if len(self.scope_size) != 2 or any(s < k for s, k in zip(self.scope_size, self.kernel_size, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: scope_size must be an int or a pair, at least kernel_size={self.kernel_size}, "
                f"got {scope_size}"
            )
        self.clip = clip
        self._lift()

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """A scope whose resampling at rest is exactly the rigid weight: the smallest one in the least-squares sense.

        A single tap that rests between two cells is an exception. The smallest solution makes the two equal; they would
        get equal gradients and stay equal, and the kernel offset would never get a gradient. So they are set apart by
        noise as strong as the weight, drawn with a fixed seed, that the tap in the middle does not see.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW].

        Returns:
            [out_channels, in_channels / groups, scopeH, scopeW].
        """
        weight = rigid_weight.double()
        sizes = list(zip(self.kernel_size, self.scope_size, strict=True))
        spread = [_inverse_of_rest(*size).to(weight.device) for size in sizes]
        lifted = spread[0] @ weight @ spread[1].t()
        generator = torch.Generator().manual_seed(0)
        for axis, (kernel, scope) in enumerate(sizes):
            if kernel == 1 and scope % 2 == 0:
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device="cpu")
                slope = torch.zeros(scope, 1, dtype=weight.dtype, device="cpu")
                slope[scope // 2 - 1], slope[scope // 2] = -1, 1
                sides = spread.copy()
                sides[axis] = slope.to(weight.device)
                strength = weight.square().mean().sqrt()
                lifted += sides[0] @ (strength * noise.to(weight.device)) @ sides[1].t()
        return lifted.to(rigid_weight.dtype)

    def init_weights(self) -> None:
        """Brings the branches to zero and makes a weight that a framework has just drawn that of a rigid convolution.

        Initialisers draw each cell of the scope for itself; resampled at rest that is a blurred kernel, and a weak one.
        So as many cells as the kernel has taps become the rigid kernel, as strong as initialisers make one (they draw
        with a variance of one over the number of cells), and are lifted. A weight that was lifted already stays.
        """
        super().init_weights()
        kernel_h, kernel_w = self.kernel_size
        cells, taps = self.weight[0, 0].numel(), kernel_h * kernel_w
        if cells == taps:
            return
        with torch.no_grad():
            at_rest = resample_kernel(
                self.weight, self.weight.new_zeros(1, 2 * taps), kernel_size=self.kernel_size, clip=self.clip
            )[0]
            # Into the scope and nothing more: what a subclass's lift_weight adds for the modulation is for weights that
            # were trained without it.
            lifted, tolerance = WithScope.lift_weight(self, at_rest), 1e-3 * self.weight.std().item()
            if not torch.allclose(self.weight, lifted, rtol=1e-3, atol=tolerance):
                drawn = self.weight[..., :kernel_h, :kernel_w]
                self.weight.copy_(WithScope.lift_weight(self, (cells / taps) ** 0.5 * drawn))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope_size={self.scope_size}" + ("" if self.clip else ", clip=False")


def _inverse_of_rest(kernel: int, scope: int) -> Tensor:
    """Pseudo-inverse [scope, kernel] of the resampling at rest along one axis, taps at (scope - kernel) / 2 + i."""
    position = torch.arange(kernel, dtype=torch.float64, device="cpu") + (scope - kernel) / 2
    cell = torch.arange(scope, dtype=torch.float64, device="cpu")
    return torch.linalg.pinv((1 - (position[:, None] - cell).abs()).clamp(min=0))
