"""Slow twins of the operators in plain torch, written from the papers' equations. For tests and for reading."""

from dk_detection.reference.deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d"]
