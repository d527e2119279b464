"""Detectron2's detectors, as `dk_detection.visualization` takes them."""

import os

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads, build_model
from detectron2.structures import Boxes
from omegaconf import OmegaConf
from torch import Tensor, nn

from dk_detection.config_files import is_lazy_config
from dk_detection.detectron2.config import add_dk_config
from dk_detection.errors import UserError
from dk_detection.visualization.detectors import Objects, Sample

_TRAINING_ONLY = "mimic.classifier."


def load_detector(
    config: str, checkpoint: str | None = None, options: list[str] | None = None, device: str = "cpu"
) -> "Detectron2Detector":
    """Builds the detector of a config, with the weights of a checkpoint.

    Args:
        config: A config of Detectron2, YAML or LazyConfig.
        checkpoint: Its file. None: random weights.
        options: Settings that override the config's: KEY VALUE ... for YAML, key=value ... for a LazyConfig.
        device: Where it runs.

    Raises:
        UserError: The config is none of a detector, or the checkpoint is of another config.
    """
    options = options or []
    try:
        if is_lazy_config(config):
            cfg = LazyConfig.apply_overrides(LazyConfig.load(config), options)
            network, mapper = instantiate(cfg.model), instantiate(cfg.dataloader.test.mapper)
            data_set = OmegaConf.select(cfg, "dataloader.test.dataset.names")
        else:
            cfg = get_cfg()
            add_dk_config(cfg)
            cfg.merge_from_file(config)
            cfg.merge_from_list(options)
            cfg.MODEL.DEVICE = "cpu"
            network, mapper = build_model(cfg), DatasetMapper(cfg, is_train=False)
            data_set = cfg.DATASETS.TEST
    except Exception as error:  # whatever is wrong with a file that names classes
        raise UserError(f"{config}: the detector cannot be built ({type(error).__name__}: {error})") from error
    if checkpoint:
        _load_weights(network, checkpoint)
    name = data_set if isinstance(data_set, str) or not data_set else data_set[0]
    classes = _class_names(name) if name else None
    return Detectron2Detector(network.to(device).eval().requires_grad_(False), mapper, classes)


def _class_names(name: str) -> list[str] | None:
    """A data set's own, if they are known without its annotations."""
    return MetadataCatalog.get(name).get("thing_classes")


class _StrictCheckpointer(DetectionCheckpointer):
    """Loads a checkpoint that fits, and no other."""

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = [f"{key} is {theirs}, expected {ours}" for key, theirs, ours in incompatible.incorrect_shapes]
        wrong += [f"{key} is missing" for key in incompatible.missing_keys]
        wrong += [f"{key} is not in the model" for key in incompatible.unexpected_keys]
        wrong = [text for text in wrong if not text.startswith(_TRAINING_ONLY)]
        if wrong:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            raise UserError(f"the checkpoint does not fit the model of this config: {'; '.join(wrong[:2])}{more}")


def _load_weights(network: nn.Module, checkpoint: str) -> None:
    if "://" not in checkpoint and not os.path.isfile(checkpoint):
        raise UserError(f"{checkpoint}: there is no such checkpoint")
    try:
        _StrictCheckpointer(network).load(checkpoint, checkpointables=[])
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    except Exception as error:  # depending on where a file ends, nearly any
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{checkpoint}: the checkpoint cannot be read ({reason})") from error


class Detectron2Detector:
    """A detector of Detectron2 behind `dk_detection.visualization.detectors.Detector`.

    Args:
        network: The detector, in evaluation mode.
        mapper: From {"file_name"} to what the detector takes; None: `read` is not needed.
        classes: Their names; None: their numbers.
    """

    def __init__(self, network: nn.Module, mapper: DatasetMapper | None = None, classes=None) -> None:
        self.network, self.mapper, self.classes = network, mapper, classes
        self.backbone = "backbone.bottom_up." if hasattr(network.backbone, "bottom_up") else "backbone."

    def read(self, path: str) -> Sample:
        try:
            image = utils.read_image(path, format="RGB")
            height, width = image.shape[:2]
            return self.sample(self.mapper({"file_name": path}) | {"height": height, "width": width}, image)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the image cannot be read ({error})") from error

    def of_input(self, image: Tensor) -> Sample:
        shown = image.clamp(0, 255).byte().movedim(0, 2).cpu().numpy()
        if self.network.input_format == "BGR":
            shown = shown[..., ::-1]
        data = {"image": image, "height": image.shape[1], "width": image.shape[2]}
        return self.sample(data, np.ascontiguousarray(shown))

    def sample(self, data: dict, image: np.ndarray | None = None) -> Sample:
        """What a data loader hands over of an image: "image" [3, h, w], "height" and "width".

        Args:
            data: That.
            image: [H, W, 3], RGB, the image itself; None: it is read from data["file_name"].
        """
        image = utils.read_image(data["file_name"], format="RGB") if image is None else image
        height, width = data["image"].shape[1:]
        with torch.no_grad():
            batch = self.network.preprocess_image([data])
        return Sample(
            image=image,
            input=getattr(batch, "tensor", batch),
            size=(height, width),
            scale=(width / image.shape[1], height / image.shape[0]),
            data=data,
        )

    def features(self, input: Tensor) -> dict[str, Tensor]:
        return self.network.backbone(input)

    def scores(self, input: Tensor, boxes: Tensor) -> Tensor:
        heads = getattr(self.network, "roi_heads", None)
        if not isinstance(self.network, GeneralizedRCNN) or not isinstance(heads, StandardROIHeads):
            raise UserError(
                "boxes are classified by detectors with StandardROIHeads, this is a "
                f"{type(self.network).__name__}; name a --point instead"
            )
        maps = self.features(input)
        pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], [Boxes(boxes)])
        return heads.box_predictor(heads.box_head(pooled))[0]

    def predict(self, sample: Sample) -> Objects:
        with torch.no_grad():
            (result,) = self.network([sample.data])
        found = result["instances"].to("cpu")
        labels = found.pred_classes.tolist()
        return Objects(
            boxes=found.pred_boxes.tensor,
            labels=[str(label if self.classes is None else self.classes[label]) for label in labels],
            scores=found.scores,
            masks=found.pred_masks.bool() if found.has("pred_masks") else None,
        )
