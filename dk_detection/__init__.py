"""Deformable Kernels and deformable convolution for any detector.

Importing the package costs nothing: operators, layers and `to_deformable` are loaded when they are first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY_MODULES = ("ops", "layers", "convert", "reference", "mimicking", "datasets")


def __getattr__(name):
    if name == "to_deformable":
        return import_module("dk_detection.convert").to_deformable
    if name in _LAZY_MODULES:
        return import_module(f"dk_detection.{name}")
    raise AttributeError(f"module 'dk_detection' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY_MODULES, "to_deformable"])
