"""Deformable Kernels and deformable convolution for any detector.

Importing the package costs nothing: everything is loaded when it is first used.
"""

from importlib import import_module

__version__ = "0.2.0"

_LAZY_MODULES = ("ops", "layers", "convert", "reference", "mimicking", "datasets", "onnx")
_LAZY_FUNCTIONS = ("to_deformable", "fold_scopes", "translate_names")


def __getattr__(name):
    if name in _LAZY_FUNCTIONS:
        return getattr(import_module("dk_detection.convert"), name)
    if name in _LAZY_MODULES:
        return import_module(f"dk_detection.{name}")
    raise AttributeError(f"module 'dk_detection' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY_MODULES, *_LAZY_FUNCTIONS])
