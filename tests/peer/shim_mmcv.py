"""mmcv's tests of its two deformable convolutions over our layers."""

import adapter
import mmcv.ops
from torch import Tensor

import dk_detection.layers

SELECTED = ("test_deform_conv.py", "test_modulated_deform_conv.py")
DESELECTED: dict[str, str] = {}

_ERRORS = {"": (AssertionError, "")}


class DeformConv2dPack(dk_detection.layers.DeformConv2d):
    """Our layer under mmcv's argument names."""

    def __init__(self, *args, deform_groups=1, bias=False, im2col_step=32, **kwargs) -> None:
        # The two assertions of this class are limits of mmcv, not of ours: no bias, and a batch that its step divides.
        assert not bias, "DeformConv2dPack has no bias"
        with adapter.translated(_ERRORS):
            super().__init__(*args, bias=False, offset_groups=deform_groups, **kwargs)
        self.im2col_step = im2col_step

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) % min(self.im2col_step, len(x)) == 0, "batch size must be divisible by im2col_step"
        with adapter.our_operator(_ERRORS):
            return super().forward(x)


class DeformConv2d(DeformConv2dPack):
    """The suite only constructs it; mmcv's has not even an attribute called bias."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        del self.bias


class ModulatedDeformConv2dPack(dk_detection.layers.ModulatedDeformConv2d):
    """Our layer under mmcv's argument names."""

    def __init__(self, *args, deform_groups=1, **kwargs) -> None:
        super().__init__(*args, offset_groups=deform_groups, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        with adapter.our_operator(_ERRORS):
            return super().forward(x)


def install() -> None:
    for shim in (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack):
        setattr(mmcv.ops, shim.__name__, shim)
