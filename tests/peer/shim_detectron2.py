"""detectron2's tests of its deformable layers over our function.

detectron2 has no CPU kernels (but for one forward) and skips most of this suite without CUDA. Ours has them, so there
the skips are lifted and the suite's "cuda" is the CPU.
"""

from types import ModuleType

import adapter
import detectron2.layers.deform_conv
import torch
from torch import Tensor

import dk_detection.ops

SELECTED = ("test_deformable.py",)
DESELECTED = {"test_repr": "prints detectron2's own modules, which stay: only the operator below them is exchanged"}

_is_available = torch.cuda.is_available
_HAS_CUDA = _is_available()
if not _HAS_CUDA:
    DESELECTED["test_forward_output_on_cpu_equals_output_on_gpu"] = "compares CPU and CUDA, and there is no CUDA"

_ERRORS = {"deform_conv2d: ": (RuntimeError, "")}


# detectron2 passes both numbers of groups; ours follow from the shapes.
def deform_conv(
    input: Tensor, offset: Tensor, weight: Tensor, stride, padding, dilation, groups: int, deformable_groups: int
) -> Tensor:
    with adapter.our_operator(_ERRORS):
        return dk_detection.ops.deform_conv2d(input, offset, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    deformable_groups: int,
) -> Tensor:
    with adapter.our_operator(_ERRORS):
        return dk_detection.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def install() -> None:
    detectron2.layers.deform_conv.deform_conv = deform_conv
    detectron2.layers.deform_conv.modulated_deform_conv = modulated_deform_conv
    if not _HAS_CUDA:
        torch.cuda.is_available = lambda: True  # the suite asks while it is imported


def collected(suite: ModuleType) -> None:
    """Called with the suite's module once it is imported, before its tests run."""
    torch.cuda.is_available = _is_available
    if not _HAS_CUDA:
        suite.torch = adapter.CudaIsCpu()
