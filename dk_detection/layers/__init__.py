"""Layers in plain PyTorch. Each convolution keeps nn.Conv2d's arguments and a parameter called `weight`."""

from dk_detection.layers.deform_conv2d import DeformConv2d, ModulatedDeformConv2d
from dk_detection.layers.deform_psroi_pool import DeformPSRoIPool
from dk_detection.layers.deform_roi_pool import DeformRoIPool, ModulatedDeformRoIPool

__all__ = ["DeformConv2d", "DeformPSRoIPool", "DeformRoIPool", "ModulatedDeformConv2d", "ModulatedDeformRoIPool"]
