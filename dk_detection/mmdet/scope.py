"""`_base_ = 'dk_detection::dcnv2/...'` in a config of MMDetection."""

import mmdet.registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

_SCOPE = "dk_detection"


def register() -> None:
    """Lets MMEngine look for configs in this package, in `.mim/configs` as in those of OpenMMLab. May be called again.

    MMEngine has a fixed list of packages whose configs it knows, and no other way in. Where a package lies it asks
    pip's records, which do not tell of an editable installation; a module that is not in them it looks up. What it
    loads from a package is built in its scope: below MMDetection's registries, where ours are registered, too.
    """
    MODULE2PACKAGE[_SCOPE] = "dk_detection.mmdet"
    for parent in vars(mmdet.registry).values():
        if isinstance(parent, Registry) and _SCOPE not in parent.children:
            Registry(parent.name, parent=parent, scope=_SCOPE, locations=["dk_detection.mmdet"])
