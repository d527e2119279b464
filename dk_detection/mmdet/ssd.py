"""MMDetection's SSD head, able to detect."""

from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS


@MODELS.register_module(force=True)
class DkSSDHead(SSDHead):
    """`SSDHead`, whose prediction in MMDetection 3.2 and 3.3 asks for a loss that it has not (mmdetection #11063)."""

    loss_cls = None
