"""R-FCN in Detectron2: `DkROIPooler` with `DkRFCNPool` pools, this predictor lets the bins vote."""

from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor

from dk_detection.layers.rfcn_pool import vote


class DkVotePredictor(FastRCNNOutputLayers):
    """The box predictor of R-FCN, without parameters: class scores and box deltas are means over the bins of a RoI.

    Its losses and its inference are `FastRCNNOutputLayers`'. A LazyConfig says::

        model.roi_heads.box_pooler.update(
            _target_=DkROIPooler, pooler_type="DkRFCNPool", channels=1024, output_channels=80 + 1 + 4)
        model.roi_heads.box_head = L(torch.nn.Identity)()
        model.roi_heads.box_predictor.update(_target_=DkVotePredictor)

    Args:
        num_classes: Without the background.
        options: Further arguments of `FastRCNNOutputLayers`, but for `input_shape`; its boxes are class-agnostic.
    """

    def __init__(self, *, num_classes: int, input_shape=None, cls_agnostic_bbox_reg=True, **options) -> None:
        super().__init__(1, num_classes=num_classes, cls_agnostic_bbox_reg=True, **options)
        del self.cls_score, self.bbox_pred

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [n, num_classes + 1] and deltas [n, 4] from what is pooled, [n, num_classes + 5, outH, outW]."""
        if x.shape[1] != self.num_classes + 5:
            raise ValueError(
                f"DkVotePredictor: the pooler must give num_classes + 1 scores and 4 deltas, {self.num_classes + 5} "
                f"channels, got {x.shape[1]}"
            )
        return vote(x)
