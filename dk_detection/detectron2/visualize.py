"""Detectron2's detectors, as `dk_detection.visualization` takes them."""

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from dk_detection.detectron2.jobs import load_job, load_weights
from dk_detection.errors import UserError
from dk_detection.visualization.detectors import Objects, Sample


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
    job = load_job(config, options or [])
    network, mapper = job.build_model("cpu"), job.mapper()
    if checkpoint:
        load_weights(network, checkpoint)
    data_sets = job.data()["test"]
    # A data set's own, if they are known without its annotations.
    classes = MetadataCatalog.get(data_sets[0]).get("thing_classes") if data_sets else None
    return Detectron2Detector(network.to(device).eval().requires_grad_(False), mapper, classes)


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
