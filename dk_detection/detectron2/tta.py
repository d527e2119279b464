"""Test-time augmentation: Detectron2's, in LazyConfigs too, and with box averaging on request."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dk_detection.errors import UserError
from dk_detection.evaluation.box_averaging import average_boxes

# Of a LazyConfig that sets no `tta`, or only some of it: multi-scale testing of Deformable ConvNets (2017, Table 5).
DEFAULTS = dict(min_sizes=[480, 576, 688, 864, 1200, 1400], max_size=4000, flip=True, box_averaging=None)


class DkRCNNWithTTA(GeneralizedRCNNWithTTA):
    """Detectron2's `GeneralizedRCNNWithTTA`, whose boxes become means of those of all views.

    Args:
        cfg, model, tta_mapper, batch_size: As there.
        box_averaging: Options of `dk_detection.evaluation.box_averaging.average_boxes`; None: boxes stay.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: DatasetMapperTTA | None = None,
        batch_size: int = 3,
        box_averaging: dict | None = None,
    ) -> None:
        _check_network(getattr(model, "module", model))
        super().__init__(cfg, model, tta_mapper, batch_size)
        self.box_averaging = box_averaging

    def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw) -> Instances:
        merged = super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        if self.box_averaging is not None and len(merged):
            boxes, scores, labels = all_boxes, torch.stack(all_scores), torch.stack(all_classes)
            kept = merged.pred_boxes.tensor
            merged.pred_boxes = Boxes(
                average_boxes(kept, merged.pred_classes, boxes, scores, labels, **self.box_averaging)
            )
        return merged


def _check_network(network: nn.Module) -> None:
    if not isinstance(network, GeneralizedRCNN):
        raise UserError(f"test-time augmentation is for a GeneralizedRCNN, this is a {type(network).__name__}")


def tta_of_yaml(cfg: CfgNode, model: nn.Module) -> DkRCNNWithTTA:
    """A detector that predicts from several views of an image, those of TEST.AUG."""
    options = {name.lower(): value for name, value in cfg.TEST.AUG.BOX_AVERAGING.items()}
    return DkRCNNWithTTA(cfg, model, box_averaging=options)


def check_tta(settings: Mapping) -> None:
    """Refuses a `tta` of a LazyConfig with a key that nothing reads, or that is neither on nor off."""
    known = {"enabled", *DEFAULTS}
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"there is no setting tta.{unknown[0]}; there are {', '.join(sorted(known))}")
    if not isinstance(enabled := settings.get("enabled", False), bool):
        raise UserError(f"tta.enabled is {enabled!r}, expected True or False")


def tta_of_lazy_config(settings: DictConfig, model: nn.Module) -> DkRCNNWithTTA:
    """The same for a LazyConfig, whose settings are brought to the form of YAML, the only one that Detectron2 takes.

    Args:
        settings: `min_sizes`, the shorter sides in pixels; `max_size`, the longest side; `flip`; `box_averaging`,
            options of `average_boxes`. What is left out is as in DEFAULTS.
        model: A `GeneralizedRCNN` with `StandardROIHeads`, also inside DistributedDataParallel.
    """
    settings = OmegaConf.merge(DEFAULTS, settings)
    model = getattr(model, "module", model)
    _check_network(model)
    heads = model.roi_heads
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = heads.mask_on
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = heads.box_predictor.test_nms_thresh
    cfg.TEST.DETECTIONS_PER_IMAGE = heads.box_predictor.test_topk_per_image
    mapper = DatasetMapperTTA(min_sizes=list(settings.min_sizes), max_size=settings.max_size, flip=settings.flip)
    return DkRCNNWithTTA(cfg, model, mapper, box_averaging=settings.box_averaging)
