"""R-FCN in MMDetection: `DkRoIExtractor` with `DkRFCNPool` pools, this head lets the bins vote."""

from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.registry import MODELS
from torch import Tensor

from dk_detection.layers.rfcn_pool import vote


@MODELS.register_module(force=True)
class DkVoteHead(BBoxHead):
    """The box head of R-FCN, without parameters: class scores and box deltas are means over the bins of a RoI.

    Its loss, its box coding and its postprocessing are `BBoxHead`'s. A config says::

        bbox_roi_extractor=dict(
            type='DkRoIExtractor', out_channels=80 + 1 + 4, featmap_strides=[16],
            roi_layer=dict(type='DkRFCNPool', output_size=7, in_channels=1024)),
        bbox_head=dict(type='DkVoteHead', num_classes=80)

    Args:
        num_classes: Without the background.
        options: Further arguments of `BBoxHead`; its boxes are class-agnostic.
    """

    def __init__(self, num_classes: int, **options) -> None:
        super().__init__(num_classes=num_classes, with_avg_pool=True, reg_class_agnostic=True, **options)
        del self.fc_cls, self.fc_reg, self.avg_pool
        self.init_cfg = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [n, num_classes + 1] and deltas [n, 4] from what is pooled, [n, num_classes + 5, outH, outW]."""
        if x.shape[1] != self.num_classes + 5:
            raise ValueError(
                f"DkVoteHead: the RoI extractor must give num_classes + 1 scores and 4 deltas, {self.num_classes + 5} "
                f"channels, got {x.shape[1]}"
            )
        return vote(x)
