"""Slow twins of the operators in plain torch, written from the papers' equations. For tests and for reading."""

from dk_detection.reference.deform_conv2d import deform_conv2d
from dk_detection.reference.deform_kernel_conv2d import deform_kernel_conv2d
from dk_detection.reference.deform_psroi_pool import deform_psroi_pool
from dk_detection.reference.deform_roi_pool import deform_roi_pool
from dk_detection.reference.kernel_evolution_conv2d import kernel_evolution_conv2d
from dk_detection.reference.resample_kernel import resample_kernel

__all__ = [
    "deform_conv2d",
    "deform_kernel_conv2d",
    "deform_psroi_pool",
    "deform_roi_pool",
    "kernel_evolution_conv2d",
    "resample_kernel",
]
