"""Registers the rows of the layer table under their names."""

import functools
import inspect

from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from dk_detection.layers.table import TABLE, Row


def _builder(row: Row):
    """The layer's constructor, which also takes the names that `offset_groups` has in mmcv, now and before."""
    has_offset_groups = "offset_groups" in inspect.signature(row.layer).parameters

    @functools.wraps(row.layer, updated=())
    def build(*args, **kwargs):
        for name in ("deform_groups", "deformable_groups"):
            if name in kwargs and "offset_groups" in kwargs:
                raise TypeError(f"{row.name}: {name} is another name of offset_groups; give one of them")
            if name in kwargs:
                number = kwargs.pop(name)
                if has_offset_groups:
                    kwargs["offset_groups"] = number
                elif number != 1:
                    raise TypeError(f"{row.name}: {name} must be 1, as this layer has no offset groups, got {number}")
        return row.layer(*args, **kwargs)

    return build


def register() -> None:
    """Makes `type='DkModulatedDeformConv2d'` and its like known. May be called again.

    mmcv builds convolutions from the root registry, which sees MMDetection's only while "mmdet" is the default scope,
    as it is under a Runner. Registered in both, the layers are found by a plain `MODELS.build` too.
    """
    for row in TABLE:
        for registry in (MODELS, ROOT_MODELS):
            registry.register_module(name=row.name, module=_builder(row), force=True)
