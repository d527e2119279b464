"""MMDetection's detectors, as `dk_detection.visualization` takes them."""

import warnings

import mmcv
import numpy as np
import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.functional import pad

from dk_detection.errors import UserError
from dk_detection.mmengine.checkpoints import check_fits, read_checkpoint
from dk_detection.mmengine.options import load_config
from dk_detection.visualization.detectors import Objects, Sample


def load_detector(
    config: str, checkpoint: str | None = None, options: list[str] | None = None, device: str = "cpu"
) -> "MMDetDetector":
    """Builds the detector of a config, with the weights of a checkpoint.

    Args:
        config: A config of MMDetection.
        checkpoint: Its file. None: the config's own initialisation, without pretrained weights.
        options: Settings that override the config's, "model.backbone.depth=18".
        device: Where it runs.

    Raises:
        UserError: The config is none of a detector, or the checkpoint is of another config.
    """
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    cfg = load_config(config, options)
    for key in ("model", "test_dataloader"):
        if not cfg.get(key):
            raise UserError(f"{config}: the config sets no {key}")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    try:
        model = MODELS.build(cfg.model)
        pipeline = cfg.test_dataloader.dataset.pipeline
        steps = Compose([step for step in pipeline if "LoadAnnotations" not in str(step["type"])])
    except Exception as error:  # whatever is wrong with a file that names classes
        raise UserError(f"{config}: the detector cannot be built ({type(error).__name__}: {error})") from error
    weights = read_checkpoint(checkpoint) if checkpoint else {}
    if checkpoint:
        check_fits(model, weights, checkpoint)
    classes = weights.get("meta", {}).get("dataset_meta", {}).get("classes")
    metainfo = cfg.test_dataloader.dataset.get("metainfo") or {}
    return MMDetDetector(model.to(device).eval().requires_grad_(False), steps, classes or metainfo.get("classes"))


class MMDetDetector:
    """A detector of MMDetection behind `dk_detection.visualization.detectors.Detector`.

    Args:
        network: The detector, in evaluation mode.
        pipeline: From {"img_path", "img_id"} to what the data preprocessor takes; None: `read` is not needed.
        classes: Their names; None: their numbers.
    """

    backbone = "backbone."

    def __init__(self, network: nn.Module, pipeline: Compose | None = None, classes=None) -> None:
        self.network, self.pipeline, self.classes = network, pipeline, classes

    def read(self, path: str) -> Sample:
        try:
            data = self.pipeline(dict(img_path=path, img_id=0))
        except (OSError, AssertionError) as error:  # mmcv asserts that OpenCV can decode it
            raise UserError(f"{path}: the image cannot be read ({error})") from error
        return self.sample(data["inputs"], data["data_samples"])

    def of_input(self, image: Tensor) -> Sample:
        size = tuple(image.shape[1:])
        data = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        shown = image.clamp(0, 255).byte().flip(0).movedim(0, 2).cpu().numpy()  # MMDetection's images are BGR
        return self.sample(image, data, np.ascontiguousarray(shown))

    def sample(self, image: Tensor, data: DetDataSample, shown: np.ndarray | None = None) -> Sample:
        """An image [3, h, w] as a data loader has it, and what belongs to it.

        Args:
            image, data: That.
            shown: [H, W, 3], RGB, the image itself; None: it is read from where `data` says.
        """
        packed = self.network.data_preprocessor(dict(inputs=[image], data_samples=[data.clone()]), False)
        meta = data.metainfo
        return Sample(
            image=mmcv.imread(meta["img_path"], channel_order="rgb") if shown is None else shown,
            input=packed["inputs"],
            size=tuple(meta["img_shape"][:2]),
            scale=tuple(map(float, meta.get("scale_factor", (1.0, 1.0)))),
            data=packed,
        )

    def features(self, input: Tensor):
        return self.network.extract_feat(input)

    def scores(self, input: Tensor, boxes: Tensor) -> Tensor:
        head = getattr(self.network, "roi_head", None)
        if not isinstance(self.network, TwoStageDetector) or not isinstance(head, StandardRoIHead):
            raise UserError(
                "boxes are classified by two-stage detectors with a StandardRoIHead, this is a "
                f"{type(self.network).__name__}; name a --point instead"
            )
        return head._bbox_forward(self.features(input), pad(boxes, (1, 0)))["cls_score"]

    def predict(self, sample: Sample) -> Objects:
        with torch.no_grad():
            (result,) = self.network.predict(sample.input, sample.data["data_samples"], rescale=True)
        return self.objects(result.pred_instances)

    def objects(self, instances: InstanceData) -> Objects:
        """Instances, predicted or annotated, in pixels of the image."""
        labels = instances.labels.tolist()
        masks = instances.get("masks")
        if masks is not None and not isinstance(masks, Tensor):
            masks = torch.from_numpy(masks.to_ndarray())
        return Objects(
            boxes=get_box_tensor(instances.bboxes).cpu(),
            labels=[str(label if self.classes is None else self.classes[label]) for label in labels],
            scores=instances.scores.cpu() if "scores" in instances else None,
            masks=None if masks is None else masks.bool().cpu(),
        )
