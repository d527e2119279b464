"""Test-time augmentation: boxes of several views of an image, averaged on request, and masks."""

import torch
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi, bbox_flip
from mmengine.structures import InstanceData
from torch import Tensor

from dk_detection.evaluation.box_averaging import average_boxes

_FLIPPED_AXES = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}


@MODELS.register_module(force=True)
class DkTTAModel(DetTTAModel):
    """MMDetection's `DetTTAModel` with two additions.

    Masks, which MMDetection refuses: the boxes are those of all views, joined as in `DetTTAModel`. Each view gives a
    mask for each of them, and the mean of their probabilities is the result, as in Detectron2.

    Box averaging: `tta_cfg=dict(nms=..., max_per_img=..., box_averaging=dict(iou_threshold=0.5, iterations=1))`, whose
    options are those of `dk_detection.evaluation.box_averaging.average_boxes`.
    """

    @torch.no_grad()
    def test_step(self, data: dict) -> list[DetDataSample]:
        if not getattr(self.module, "with_mask", False):
            return super().test_step(data)
        head = self.module.roi_head
        if not isinstance(head, StandardRoIHead):
            raise TypeError(f"DkTTAModel: masks need a StandardRoIHead, got {type(head).__name__}")
        views = []  # (feature maps, samples with boxes), for each view of the batch
        for i in range(len(data["inputs"])):
            view = self.module.data_preprocessor({key: value[i] for key, value in data.items()}, False)
            maps = self.module.extract_feat(view["inputs"])
            samples = view["data_samples"]
            proposals = self.module.rpn_head.predict(maps, samples, rescale=False)
            metas = [sample.metainfo for sample in samples]
            boxes = head.predict_bbox(maps, metas, proposals, head.test_cfg, rescale=True)
            views.append((maps, self.module.add_pred_to_datasample(samples, boxes)))

        views_of_metas = [[samples[i].metainfo for _, samples in views] for i in range(len(views[0][1]))]
        merged = self.merge_preds(list(zip(*(samples for _, samples in views), strict=True)))
        for i, (sample, metas) in enumerate(zip(merged, views_of_metas, strict=True)):
            instances = sample.pred_instances
            masks = [
                self._predict_masks([level[i : i + 1] for level in maps], instances.bboxes, meta)
                for (maps, _), meta in zip(views, metas, strict=True)
                if len(instances)
            ]
            mean = torch.stack(masks).mean(0).logit() if masks else None
            whole = dict(ori_shape=sample.ori_shape, scale_factor=(1.0, 1.0))
            (sample.pred_instances,) = head.mask_head.predict_by_feat(
                [mean], [instances], [whole], head.test_cfg, rescale=True
            )
        return merged

    def _predict_masks(self, maps: list[Tensor], boxes: Tensor, meta: dict) -> Tensor:
        """The masks that a view gives for boxes of the whole image, as probabilities. [boxes, classes, H, W]"""
        boxes = boxes * boxes.new_tensor(meta["scale_factor"]).repeat(2)
        if meta["flip"]:
            boxes = bbox_flip(boxes, meta["img_shape"], meta["flip_direction"])
        masks = self.module.roi_head._mask_forward(maps, bbox2roi([boxes]))["mask_preds"].sigmoid()
        return masks.flip(_FLIPPED_AXES[meta["flip_direction"]]) if meta["flip"] else masks

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        everything = [sample.pred_instances for sample in data_samples]
        boxes, scores = self.merge_aug_bboxes(
            [each.bboxes for each in everything],
            [each.scores for each in everything],
            [sample.metainfo for sample in data_samples],
        )
        merged = super()._merge_single_sample(data_samples)
        if (options := self.tta_cfg.get("box_averaging")) is not None:
            kept: InstanceData = merged.pred_instances
            labels = torch.cat([each.labels for each in everything])
            kept.bboxes = average_boxes(kept.bboxes, kept.labels, boxes, scores, labels, **options)
        return merged
