"""R-CNN feature mimicking in Detectron2's Faster and Mask R-CNN."""

from collections.abc import Mapping

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from dk_detection.detectron2.config import arguments
from dk_detection.mimicking import FeatureMimicking, calls_of, frozen_statistics


@META_ARCH_REGISTRY.register()
class DkMimicRCNN(GeneralizedRCNN):
    """Faster or Mask R-CNN that learns with R-CNN feature mimicking (Section 3.3, Deformable ConvNets v2, 2018).

    It takes the settings of `GeneralizedRCNN`, is the same network and predicts the same. A LazyConfig changes a model
    into this one by `model._target_ = DkMimicRCNN`; in YAML it is a META_ARCHITECTURE or MODEL.DK.NETWORK, with the
    settings of MODEL.DK.MIMIC.

    In training, each batch is also seen as patches of its RoIs. Patch and RoI pass the same backbone, RoI pooling and
    box head; on a feature pyramid the patch is pooled from the level to which the pooler assigns a box of the patch's
    size. Normalisations see the patches with their running statistics and do not learn from them.

    The losses are `loss_mimic` and `loss_mimic_cls`, and the event storage gets `mimic_cosine`. Checkpoints have the
    keys of the detector without mimicking, plus `mimic.classifier.*`, which only a continued training needs.

    Args:
        mimic: Arguments of `dk_detection.mimicking.FeatureMimicking`, such as `regions="both"` or `chunk_size=16`.
        options: Arguments of `GeneralizedRCNN`, whose `roi_heads` are `StandardROIHeads` or a subclass with one stage.

    Raises:
        ValueError: The RoI heads are of another kind or train on predicted boxes; a setting of `mimic` breaks its rule;
            or the backbone does not take images of the patches' size.
    """

    @configurable
    def __init__(self, *, mimic: Mapping | None = None, **options) -> None:
        super().__init__(**options)
        heads = self.roi_heads
        classifier = getattr(getattr(heads, "box_predictor", None), "cls_score", None)
        if not isinstance(classifier, nn.Linear) or not hasattr(heads, "box_pooler"):
            raise ValueError(
                "DkMimicRCNN: roi_heads must have a box_pooler, a box_head and a box_predictor with a linear "
                f"cls_score, as StandardROIHeads has, got {type(heads).__name__}"
            )
        if getattr(heads, "train_on_pred_boxes", False):
            raise ValueError("DkMimicRCNN: roi_heads must not have train_on_pred_boxes=True")
        self.mimic = FeatureMimicking(classifier.in_features, heads.num_classes, **(mimic or {}))
        multiple = self.backbone.size_divisibility
        if multiple and self.mimic.patch_size % multiple:
            raise ValueError(
                f"DkMimicRCNN: patch_size must be a multiple of {multiple}, which the backbone needs, "
                f"got {self.mimic.patch_size}"
            )

    @classmethod
    def from_config(cls, cfg):
        """Arguments from YAML."""
        return super().from_config(cfg) | {"mimic": arguments(cfg.MODEL.DK.MIMIC)}

    def forward(self, batched_inputs: list[dict]):
        """In training a dictionary of losses, else the predictions, as `GeneralizedRCNN`."""
        if not self.training:
            return super().forward(batched_inputs)
        heads = self.roi_heads
        predictor = heads.box_predictor
        with calls_of(self.backbone) as backbone, calls_of(heads) as roi_heads, calls_of(predictor) as boxes:
            losses = super().forward(batched_inputs)
        sampled = roi_heads[0][1][0]
        losses |= self.mimic(
            images=backbone[0][0],
            rois=convert_boxes_to_pooler_format([proposals.proposal_boxes for proposals in sampled]),
            labels=torch.cat([proposals.gt_classes for proposals in sampled]),
            features=boxes[0][0],
            extract=self._patch_features,
        )
        if "mimic_cosine" in losses:  # Detectron2 sums whatever the dictionary holds
            get_event_storage().put_scalar("mimic_cosine", losses.pop("mimic_cosine").item())
        return losses

    def _patch_features(self, patches: Tensor, rois: Tensor) -> Tensor:
        heads = self.roi_heads
        with frozen_statistics(self):
            features = self.backbone(patches)
            boxes = [Boxes(roi[None, 1:]) for roi in rois]
            return heads.box_head(heads.box_pooler([features[name] for name in heads.box_in_features], boxes))
