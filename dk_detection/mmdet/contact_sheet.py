"""One picture of several images: the ground truth on the left, beside it the prediction."""

import os
import warnings

import cv2
import mmcv
import numpy as np
import torch
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmdet.visualization import DetLocalVisualizer
from mmengine.dist import master_only
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.structures import InstanceData
from torch.nn.functional import interpolate


@HOOKS.register_module(force=True)
class DkContactSheetHook(Hook):
    """Leaves `predictions.png` in the work folder after each evaluation. MMDetection's hook writes a file per image.

    Args:
        num_images: How many images are drawn, the first of the data set.
        columns: How many of them side by side.
        score_thr: Predictions with a lower score are not drawn.
        size: Shorter side of an image in the picture, in pixels; small images are enlarged so that labels are readable.
    """

    priority = "LOW"

    def __init__(self, num_images: int = 6, columns: int = 2, score_thr: float = 0.5, size: int = 320) -> None:
        self.num_images, self.columns, self.score_thr, self.size = num_images, columns, score_thr, size
        self._pictures = []

    def before_val_epoch(self, runner) -> None:
        self._pictures = []

    @master_only  # only there does the visualizer know the classes
    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for sample in outputs[: self.num_images - len(self._pictures)]:
            self._pictures.append(self._draw(runner.visualizer, sample.cpu()))

    def after_val_epoch(self, runner, metrics=None) -> None:
        if self._pictures:
            sheet = _tile(self._pictures, self.columns)
            mmcv.imwrite(sheet[..., ::-1], os.path.join(runner.work_dir, "predictions.png"))

    before_test_epoch, after_test_iter, after_test_epoch = before_val_epoch, after_val_iter, after_val_epoch

    def _draw(self, visualizer: DetLocalVisualizer, sample: DetDataSample) -> np.ndarray:
        """Ground truth and prediction of one image with their titles. [height + title, 2 * width, 3], RGB"""
        image = mmcv.imfrombytes(get(sample.img_path), channel_order="rgb")
        factor = self.size / min(image.shape[:2])
        image = mmcv.imrescale(image, factor, interpolation="bicubic")
        predicted = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        classes, palette = (visualizer.dataset_meta.get(key) for key in ("classes", "palette"))
        halves = []
        for title, instances in (
            ("ground truth", sample.get("gt_instances", InstanceData())),
            ("prediction", predicted),
        ):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* is out of bounds")  # it also means: touches the edge
                scaled = _rescale(instances, factor, image.shape[:2])
                half = visualizer._draw_instances(image, scaled, classes, palette)
            half = cv2.copyMakeBorder(half, 22, 0, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            halves.append(cv2.putText(half, title, (2, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA))
        return np.concatenate(halves, axis=1)


def _rescale(instances: InstanceData, factor: float, size: tuple[int, int]) -> InstanceData:
    """What is drawn of some instances, for an image that was rescaled by `factor` to `size` (height, width)."""
    scaled = InstanceData(**{key: instances[key] for key in ("labels", "scores") if key in instances})
    if "bboxes" in instances:
        scaled.bboxes = get_box_tensor(instances.bboxes) * factor
    if "masks" in instances and len(instances):
        masks = instances.masks
        masks = masks if isinstance(masks, torch.Tensor) else torch.from_numpy(masks.to_ndarray())
        scaled.masks = interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0] >= 0.5
    return scaled


def _tile(pictures: list[np.ndarray], columns: int, gap: int = 8) -> np.ndarray:
    """Lays pictures out in rows on white, each in a cell as large as the largest picture."""
    height, width = (max(picture.shape[axis] for picture in pictures) + gap for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height - gap, columns * width - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet
