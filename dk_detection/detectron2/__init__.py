"""What Detectron2 needs to see of dk_detection.

In a LazyConfig::

    from dk_detection.detectron2 import DkDeformable

    model = L(DkDeformable)(
        network=model_zoo.get_config("common/models/mask_rcnn_fpn.py").model,
        exchange=dict(layer="mdconv", select="backbone.bottom_up.res[345].*.conv2"),
    )

For YAML, `add_dk_config(cfg)` before `cfg.merge_from_file` adds our keys, or, without a line of code, the environment
variable DETECTRON2_ENV_MODULE=dk_detection.detectron2.env under Detectron2's own train_net.py::

    MODEL:
      META_ARCHITECTURE: DkDeformable
      DK:
        EXCHANGE:
        - {layer: mdconv, select: "backbone.bottom_up.res[345].*.conv2"}

Importing this module registers what YAML names and makes fvcore count our operators' FLOPs.
"""

try:
    import detectron2.modeling  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"dk_detection.detectron2 needs Detectron2 ({error}). Install it as its installation page says, "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html, with pip's --no-build-isolation."
    ) from error

from dk_detection.detectron2 import data, flops
from dk_detection.detectron2.backbones import DkAlignedInceptionResNet, DkMobileNetV2, DkReduceLast, DkResNetDW
from dk_detection.detectron2.class_aware_rpn import DkClassAwareRPN, DkClassAwareRPNHead
from dk_detection.detectron2.config import add_dk_config, get_config
from dk_detection.detectron2.mimic import DkMimicRCNN
from dk_detection.detectron2.networks import DkDeformable, to_deformable
from dk_detection.detectron2.poolers import DkROIHeads, DkROIPooler
from dk_detection.detectron2.rfcn import DkVotePredictor
from dk_detection.detectron2.rpn import DkRPN
from dk_detection.detectron2.solver import LearningRateFactors
from dk_detection.detectron2.tta import DkRCNNWithTTA
from dk_detection.detectron2.voc import DkVOCEvaluator

__all__ = [
    "DkAlignedInceptionResNet",
    "DkClassAwareRPN",
    "DkClassAwareRPNHead",
    "DkDeformable",
    "DkMimicRCNN",
    "DkMobileNetV2",
    "DkRCNNWithTTA",
    "DkROIHeads",
    "DkROIPooler",
    "DkRPN",
    "DkReduceLast",
    "DkResNetDW",
    "DkVOCEvaluator",
    "DkVotePredictor",
    "LearningRateFactors",
    "add_dk_config",
    "get_config",
    "to_deformable",
]

data.register()
flops.register()
