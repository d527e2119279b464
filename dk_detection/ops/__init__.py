"""Operators as functions: compiled kernels for CPU and CUDA, autograd, autocast, torch.compile, FLOP counts."""

from dk_detection.ops.deform_conv2d import deform_conv2d
from dk_detection.ops.deform_kernel_conv2d import deform_kernel_conv2d
from dk_detection.ops.deform_psroi_pool import deform_psroi_pool
from dk_detection.ops.deform_roi_pool import deform_roi_pool
from dk_detection.ops.fused import use_fused
from dk_detection.ops.kernel_evolution_conv2d import kernel_evolution_conv2d
from dk_detection.ops.resample_kernel import resample_kernel

__all__ = [
    "deform_conv2d",
    "deform_kernel_conv2d",
    "deform_psroi_pool",
    "deform_roi_pool",
    "kernel_evolution_conv2d",
    "resample_kernel",
    "use_fused",
]
