"""Layers in plain PyTorch. Each convolution keeps nn.Conv2d's arguments and a parameter called `weight`."""

from dk_detection.layers.deform_conv2d import DeformConv2d, ModulatedDeformConv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d"]
