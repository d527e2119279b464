"""Layers in plain PyTorch. Each convolution keeps nn.Conv2d's arguments and a parameter called `weight`."""

from dk_detection.layers.active_conv2d import ActiveConv2d
from dk_detection.layers.cond_conv2d import CondConv2d
from dk_detection.layers.deform_conv2d import DeformConv2d, ModulatedDeformConv2d
from dk_detection.layers.deform_kernel_conv2d import (
    DeformKernelConv2d,
    LocalDeformKernel2d,
    ModulatedDeformKernelConv2d,
)
from dk_detection.layers.deform_psroi_pool import DeformPSRoIPool
from dk_detection.layers.deform_roi_pool import DeformRoIPool, ModulatedDeformRoIPool
from dk_detection.layers.global_deform_kernel2d import GlobalDeformKernel2d
from dk_detection.layers.kernel_evolution_conv2d import KernelEvolutionConv2d
from dk_detection.layers.rfcn_pool import RFCNPool

__all__ = [
    "ActiveConv2d",
    "CondConv2d",
    "DeformConv2d",
    "DeformKernelConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "GlobalDeformKernel2d",
    "KernelEvolutionConv2d",
    "LocalDeformKernel2d",
    "ModulatedDeformConv2d",
    "ModulatedDeformKernelConv2d",
    "ModulatedDeformRoIPool",
    "RFCNPool",
]
