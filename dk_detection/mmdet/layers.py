"""Registers the rows of the layer table under their names."""

import functools
import inspect

from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from dk_detection.layers.table import TABLE, Row


def _builder(row: Row):
    """The layer's constructor, which also takes `deform_groups`, mmcv's name of `offset_groups`."""
    takes_offset_groups = "offset_groups" in inspect.signature(row.layer).parameters

    @functools.wraps(row.layer, updated=())
    def build(*args, **kwargs):
        if takes_offset_groups and "deform_groups" in kwargs:
            if "offset_groups" in kwargs:
                raise TypeError(f"{row.name}: deform_groups is another name of offset_groups; give one of them")
            kwargs["offset_groups"] = kwargs.pop("deform_groups")
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
