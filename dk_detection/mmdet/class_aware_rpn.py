"""Class-aware RPN in MMDetection: its `SingleStageDetector`, with this head."""

from mmdet.models.dense_heads import AnchorHead, RPNHead
from mmdet.registry import MODELS


@MODELS.register_module(force=True)
class DkClassAwareRPNHead(AnchorHead):
    """The head of a region proposal network, with a score for each class and the background in place of two.

    The detector that Deformable Convolutional Networks (2017, Section 2.3) calls category-aware RPN. `RPNHead`'s
    layers, a 3x3 convolution and two of 1x1; `AnchorHead`'s labels, losses and detections, among them non-maximum
    suppression class by class. With a softmax a config says::

        model = dict(
            type='SingleStageDetector',
            bbox_head=dict(
                type='DkClassAwareRPNHead', num_classes=20, in_channels=1024, feat_channels=512,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False)))

    Its arguments are `AnchorHead`'s: `num_classes` without the background, `feat_channels` of the 3x3 convolution.
    """

    num_convs = 1
    _init_layers = RPNHead._init_layers
    forward_single = RPNHead.forward_single
