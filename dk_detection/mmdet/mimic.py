"""R-CNN feature mimicking in MMDetection's two-stage detectors."""

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox2roi
from torch import Tensor

from dk_detection.mimicking import FeatureMimicking, calls_of, frozen_statistics


class DkMimicRoIHead(StandardRoIHead):
    """The RoI head of `DkMimicRCNN`: it tells what its box head's classifier sees of a RoI, the feature f of Eq. 3."""

    def bbox_loss(self, x: tuple[Tensor], sampling_results: list[SamplingResult]) -> dict:
        with calls_of(self.bbox_head.fc_cls) as calls:
            results = super().bbox_loss(x, sampling_results)
        background = self.bbox_head.num_classes
        labels = [
            torch.cat([result.pos_gt_labels, result.neg_inds.new_full((len(result.neg_inds),), background)])
            for result in sampling_results
        ]
        rois = bbox2roi([result.priors for result in sampling_results])
        self._sampled = dict(rois=rois, labels=torch.cat(labels), features=calls[0][0])
        return results

    def pop_sampled(self) -> dict[str, Tensor]:
        """The RoIs [n, 5], labels [n] and features [n, D] that the last `loss` was computed from, once."""
        sampled, self._sampled = self._sampled, None
        return sampled

    def box_features(self, x: tuple[Tensor], rois: Tensor) -> Tensor:
        """Features [n, D] of RoIs [n, 5] on the maps of a batch."""
        with calls_of(self.bbox_head.fc_cls) as calls:
            self._bbox_forward(x, rois)
        return calls[0][0]


@MODELS.register_module(force=True)
class DkMimicRCNN(TwoStageDetector):
    """Faster or Mask R-CNN that learns with R-CNN feature mimicking (Section 3.3, Deformable ConvNets v2, 2018).

    It takes the settings of MMDetection's `FasterRCNN` and `MaskRCNN`, is the same network and predicts the same. A
    config that inherits one of them adds::

        model = dict(type='DkMimicRCNN')

    In training, each batch is also seen as patches of its RoIs. Patch and RoI pass the same backbone, neck, RoI layers
    and box head; on a feature pyramid the patch is pooled from the level to which the RoI extractor assigns a box of
    the patch's size. Normalisations see the patches with their running statistics and do not learn from them.

    The log shows `loss_mimic`, `loss_mimic_cls` and `mimic_cosine`. Checkpoints have the keys of the detector without
    mimicking, plus `mimic.classifier.*`, which only a continued training needs.

    Args:
        roi_head: A `StandardRoIHead`, whose box head may be any that classifies by a `fc_cls`.
        mimic: Arguments of `dk_detection.mimicking.FeatureMimicking`, such as `regions='both'` or `chunk_size=16`.
        options: Arguments of `TwoStageDetector`.

    Raises:
        ValueError: The RoI head is another one, or has no classifier; a setting of `mimic` breaks its rule; or a part
            of the network has `with_cp`. It would compute the patches anew in the backward pass, where normalisations
            learn again, and DistributedDataParallel allows it to be used only once in an iteration. To save memory take
            `mimic=dict(chunk_size=...)`.
    """

    def __init__(self, *, roi_head: dict, mimic: dict | None = None, **options) -> None:
        if roi_head["type"] not in ("StandardRoIHead", "mmdet.StandardRoIHead", StandardRoIHead, DkMimicRoIHead):
            raise ValueError(f"DkMimicRCNN: roi_head must be of type StandardRoIHead, got {roi_head['type']!r}")
        super().__init__(roi_head={**roi_head, "type": DkMimicRoIHead}, **options)
        box_head = self.roi_head.bbox_head
        if not getattr(box_head, "with_cls", False):
            raise ValueError(f"DkMimicRCNN: the box head must have a classifier fc_cls, got {type(box_head).__name__}")
        for name, module in self.named_modules():
            if getattr(module, "with_cp", False):
                raise ValueError(
                    f"DkMimicRCNN: {name} has with_cp=True, which does not go with feature mimicking; to save memory "
                    "set mimic=dict(chunk_size=...)"
                )
        self.mimic = FeatureMimicking(box_head.fc_cls.in_features, box_head.num_classes, **(mimic or {}))

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict:
        """The detector's losses and those of the R-CNN branch, from images [N, 3, H, W] and their annotations."""
        losses = super().loss(batch_inputs, batch_data_samples)
        return losses | self.mimic(batch_inputs, **self.roi_head.pop_sampled(), extract=self._patch_features)

    def _patch_features(self, patches: Tensor, rois: Tensor) -> Tensor:
        with frozen_statistics(self):
            return self.roi_head.box_features(self.extract_feat(patches), rois)
