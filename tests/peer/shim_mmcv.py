"""mmcv's tests of its deformable convolutions and of its deformable RoI pooling over our layers.

mmcv has no CPU kernels of the pooling and skips those tests without CUDA. Ours has them, so there the skips are lifted
and the suite's "cuda" is the CPU.
"""

from types import ModuleType

import adapter
import mmcv.ops
import mmcv.utils
import torch
from torch import Tensor

import dk_detection.layers

_ROI_SUITE = "test_deform_roi_pool.py"
SELECTED = ("test_deform_conv.py", "test_modulated_deform_conv.py", _ROI_SUITE)
DESELECTED: dict[str, str] = {}

_HAS_CUDA = torch.cuda.is_available()

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


class _RoIPoolPack:
    """Our layers under mmcv's names, with its branch; both take the same arguments."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, branch="mmcv", **kwargs)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        with adapter.our_operator(_ERRORS):
            return super().forward(input, rois)

    def to(self, device: str) -> "_RoIPoolPack":
        return super().to(device) if _HAS_CUDA else self

    def cuda(self) -> "_RoIPoolPack":
        return self.to("cuda")


class DeformRoIPoolPack(_RoIPoolPack, dk_detection.layers.DeformRoIPool):
    pass


class ModulatedDeformRoIPoolPack(_RoIPoolPack, dk_detection.layers.ModulatedDeformRoIPool):
    pass


def install() -> None:
    for shim in (
        DeformConv2d,
        DeformConv2dPack,
        ModulatedDeformConv2dPack,
        DeformRoIPoolPack,
        ModulatedDeformRoIPoolPack,
    ):
        setattr(mmcv.ops, shim.__name__, shim)


def collecting(name: str) -> None:
    """Called with the name of a file of the suite before it is imported."""
    mmcv.utils.IS_CUDA_AVAILABLE = _HAS_CUDA or name == _ROI_SUITE


def collected(suite: ModuleType) -> None:
    """Called with the suite's module once it is imported, before its tests run."""
    if not _HAS_CUDA and suite.__name__ == _ROI_SUITE.removesuffix(".py"):
        suite.torch = adapter.CudaIsCpu()
