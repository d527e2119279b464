"""Small detectors of Detectron2, and what they are fed with."""

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from dk_detection.detectron2 import add_dk_config

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
HEIGHT, WIDTH = 64, 96
# An image each: left, top, right, bottom.
BOXES = ([[5, 8, 45, 50], [30, 20, 90, 60]], [[10, 4, 70, 40]])


def config(*options, base: str = MASK_RCNN) -> CfgNode:
    """A config of Detectron2's model zoo with narrow layers and few proposals."""
    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(base))
    narrow = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # a detector that has learned nothing is not sure of anything
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "TEST.DETECTIONS_PER_IMAGE": 5,
    }
    cfg.merge_from_list([value for item in narrow.items() for value in item])
    cfg.merge_from_list(list(options))
    return cfg


def detector(*options, exchange=None, **kwargs) -> torch.nn.Module:
    """A detector with normalisations that do something; `exchange` are settings of MODEL.DK.EXCHANGE."""
    if exchange is not None:
        options += ("MODEL.META_ARCHITECTURE", "DkDeformable", "MODEL.DK.EXCHANGE", exchange)
    model = build_model(config(*options, **kwargs))
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, torch.nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def batch() -> list[dict]:
    """Two images with their objects, as a data loader hands them over."""
    inputs = []
    for boxes in BOXES:
        masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = True
        instances = Instances((HEIGHT, WIDTH))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.arange(len(boxes))
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": HEIGHT, "width": WIDTH})
    return inputs
