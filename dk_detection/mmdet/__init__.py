"""What MMDetection needs to see of dk_detection.

Importing this module registers every layer of `dk_detection.layers.table` and makes mmengine count their FLOPs. In a
config file two lines are enough::

    custom_imports = dict(imports=['dk_detection.mmdet'])
    model = dict(
        backbone=dict(
            dcn=dict(type='DkModulatedDeformConv2d', offset_groups=1), stage_with_dcn=(False, True, True, True)))

Networks without a `dcn` slot, such as ResNet-18, take `DkDeformable`. The backbones of the papers are `DkResNetDW`,
`DkMobileNetV2`, `DkAlignedInceptionResNet` and `DkShallow9`. All of these are of `dk_detection.mmengine`; here is what
is about detectors.
"""

try:
    import mmdet.registry
except (ImportError, AssertionError) as error:  # mmdet asserts that mmcv and mmengine fit
    raise ImportError(
        f"dk_detection.mmdet needs MMDetection 3 and the mmcv and mmengine that fit it ({error}). In the project's "
        "folder run `make setup` or `pip install --no-build-isolation -e '.[mmdet]'`."
    ) from error

from dk_detection.mmdet import scope
from dk_detection.mmdet.class_aware_rpn import DkClassAwareRPNHead
from dk_detection.mmdet.contact_sheet import DkContactSheetHook
from dk_detection.mmdet.data_checks import check_data
from dk_detection.mmdet.dilated_c5 import DkReduceLast, DkSingleLevelRPNHead
from dk_detection.mmdet.mimic import DkMimicRCNN
from dk_detection.mmdet.rfcn import DkVoteHead
from dk_detection.mmdet.roi_extractors import DkRoIExtractor
from dk_detection.mmdet.ssd import DkSSDHead
from dk_detection.mmdet.tta import DkTTAModel
from dk_detection.mmdet.visualize_hook import DkVisualizeHook
from dk_detection.mmengine import models

__all__ = [
    "DkClassAwareRPNHead",
    "DkContactSheetHook",
    "DkMimicRCNN",
    "DkReduceLast",
    "DkRoIExtractor",
    "DkSSDHead",
    "DkSingleLevelRPNHead",
    "DkTTAModel",
    "DkVisualizeHook",
    "DkVoteHead",
    "check_data",
]

# So that type='mmdet.DkDeformable' and a plain MODELS.build of MMDetection's work as well.
models.register(mmdet.registry.MODELS)
scope.register()
