"""What all deformable kernel layers share: a weight that holds more than the taps take from it."""

import torch
from torch import Tensor

from dk_detection.layers._lifted import Lifted
from dk_detection.ops._common import overridable, without_autocast

PARAMETRISATIONS = ("orthonormal", "paper")


class WithScope(Lifted):
    """A convolution that samples its kernel out of a larger one, the scope.

    With `parametrisation="orthonormal"` the taps at rest see nothing of `weight` but its corner, the rigid kernel:
    `scope` composes the scope of it and of the values beside it (docs/ops/deform_kernel_conv2d.md has the derivation).
    With "paper" the `weight` is the scope itself, and state dicts have it as `scope_weight`. Either loads the other's.

    Args:
        args, kwargs: nn.Conv2d's.
        scope_size: (vertical, horizontal) or an int, at least the kernel size. None is one more than the kernel size.
        clip: whether sampling positions are kept within the scope.
        parametrisation: "orthonormal" or "paper".
    """

    _gain = 1  # what the scope has to be stronger than the rigid kernel, as the taps at rest are weaker

    def __init__(self, *args, scope_size=None, clip=True, parametrisation="orthonormal", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if scope_size is None:
            scope_size = tuple(size + 1 for size in self.kernel_size)
        self.scope_size = (scope_size, scope_size) if isinstance(scope_size, int) else tuple(scope_size)
        if len(self.scope_size) != 2 or any(s < k for s, k in zip(self.scope_size, self.kernel_size, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: scope_size must be an int or a pair, at least kernel_size={self.kernel_size}, "
                f"got {scope_size}"
            )
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(
                f"{type(self).__name__}: parametrisation must be one of {', '.join(PARAMETRISATIONS)}, "
                f"got {parametrisation!r}"
            )
        self.clip = clip
        self.parametrisation = parametrisation
        self._lift()

    def scope(self) -> Tensor:
        """What the taps sample from, [out_channels, in_channels / groups, scopeH, scopeW]."""
        return self.weight if self.basis is None else _compose(self.weight, self.basis)

    def fold(self) -> None:
        """Makes `weight` the scope itself, in place, for inference and export: `parametrisation` is "paper" then."""
        with torch.no_grad():
            self.weight.copy_(self.scope())
        self.parametrisation, self.basis = "paper", None

    @property
    def _key(self) -> str:
        return "scope_weight" if self.parametrisation == "paper" else "lifted_weight"

    def lift_weight(self, rigid_weight: Tensor) -> Tensor:
        """The `weight` whose corner is the rigid weight.

        All else is zero; the scope is then the smallest one, in the least-squares sense, whose resampling at rest is
        the rigid weight. A single tap that rests between two cells is an exception: in the smallest scope the two are
        equal and the kernel offset would never get a gradient. So they are set apart by noise as strong as the weight,
        drawn with a fixed seed, that the tap in the middle does not see.

        Args:
            rigid_weight: [out_channels, in_channels / groups, kH, kW].

        Returns:
            [out_channels, in_channels / groups, scopeH, scopeW].
        """
        (kernel_h, kernel_w), (scope_h, scope_w) = self.kernel_size, self.scope_size
        lifted = self._corner(rigid_weight, *rigid_weight.shape[:2], scope_h, scope_w)
        noise = self._noise(rigid_weight, 2, *rigid_weight.shape)
        if kernel_h == 1 and scope_h % 2 == 0:
            lifted[..., 1, :kernel_w] = noise[0, ..., 0, :]
        if kernel_w == 1 and scope_w % 2 == 0:
            lifted[..., :kernel_h, 1] = noise[1, ..., 0]
        return lifted if self.parametrisation == "orthonormal" else self._in_float64(lifted, self._full_basis())

    def _full_basis(self) -> Tensor:
        """[cells, cells], cells row-major: from the values of `weight` to the cells of the scope, of one kernel."""
        along_y, along_x = (_rest_basis(*sizes) for sizes in zip(self.kernel_size, self.scope_size, strict=True))
        return self._gain * torch.kron(along_y, along_x)

    def _make_basis(self) -> Tensor | None:
        return None if self.parametrisation == "paper" else self._full_basis()

    def _in_float64(self, weight: Tensor, basis: Tensor) -> Tensor:
        return _compose(weight.double(), basis.to(weight.device)).to(weight.dtype)

    def _from_version_1(self, weight: Tensor) -> Tensor:
        return weight if self.parametrisation == "paper" else self._in_float64(weight, self._full_basis().inverse())

    def _take_rigid(self, state_dict, prefix) -> None:
        theirs, ours = (f"{prefix}{key}" for key in ("scope_weight", "lifted_weight"))
        if self.parametrisation == "paper":
            if ours in state_dict:
                state_dict[theirs] = self._in_float64(state_dict.pop(ours), self._full_basis())
        elif theirs in state_dict:
            state_dict[ours] = self._from_version_1(state_dict.pop(theirs))
        super()._take_rigid(state_dict, prefix)

    def _keys(self) -> set[str]:
        return super()._keys() | {"scope_weight", "lifted_weight"}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, scope_size={self.scope_size}" + ("" if self.clip else ", clip=False")
        return text + (f", parametrisation={self.parametrisation!r}" if self.parametrisation == "paper" else "")


@overridable
def _compose(weight: Tensor, basis: Tensor) -> Tensor:
    """Scopes of weights: [out_channels, in_channels / groups, scopeH, scopeW] times [cells, cells]."""
    with without_autocast(weight.device.type):  # sums of weights stay as precise as weights
        return (weight.flatten(2) @ basis.t()).view_as(weight)


def _rest_basis(kernel: int, scope: int) -> Tensor:
    """Along one axis, what each value of `weight` adds to each cell, [scope, scope].

    The taps at rest lie at (scope - kernel) / 2 + i. The first `kernel` columns are the pseudo-inverse of the sampling
    there. The others are orthonormal, and zero for the taps at rest: where these lie between cells, first the one that
    alternates over the cells they see; then a cell each of those they do not see.
    """
    outside, between = divmod(scope - kernel, 2)
    seen = kernel + between
    basis = torch.zeros(scope, scope, dtype=torch.float64, device="cpu")
    if between:
        cell = torch.arange(seen, dtype=torch.float64, device="cpu").unsqueeze(1)
        tap = cell[:kernel].t()
        alternating = 1 - 2 * (cell % 2)
        inverse = 2 * alternating * -alternating[:kernel].t() * ((cell > tap).double() - (kernel - tap) / seen)
        block = torch.cat([inverse, alternating / seen**0.5], 1)
    else:
        block = torch.eye(kernel, dtype=torch.float64, device="cpu")
    basis[outside : outside + seen, :seen] = block
    for column, cell in enumerate([*range(outside), *range(outside + seen, scope)], start=seen):
        basis[cell, column] = 1
    return basis
