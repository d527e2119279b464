"""Operators as functions: compiled kernels for CPU and CUDA, autograd, autocast, torch.compile, FLOP counts."""

from dk_detection.ops.deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d"]
