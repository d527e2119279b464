"""A detector of MMDetection on pictures of one's own, by MMDetection's inferencer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
from mmdet.apis import DetInferencer

from dk_detection.errors import UserError
from dk_detection.mmdet.visualize import MMDetDetector
from dk_detection.mmengine.checkpoints import check_fits, read_checkpoint
from dk_detection.mmengine.options import load_config
from dk_detection.visualization.detectors import Objects


def predict(
    config: str,
    checkpoint: str,
    pictures: Sequence[Path],
    folder: Path,
    *,
    score: float = 0.3,
    device: str = "cpu",
    options: Sequence[str] = (),
) -> tuple[list[str], Iterator[tuple[tuple[int, int], Objects]]]:
    """Detects the objects in pictures and draws them.

    Args:
        config: A config file of MMDetection.
        checkpoint: The weights.
        pictures: Image files with names that differ.
        folder: Each picture goes into `vis` in it, under its name, with the objects drawn.
        score: The least of an object.
        device: Where the detector runs.
        options: Settings that override the config's, "model.test_cfg.rcnn.score_thr=0.001".

    Returns:
        The names of all classes; and, as they are made, (height, width) and the objects of each picture.

    Raises:
        UserError: Something that the user can put right.
    """
    cfg, weights = load_config(config, list(options)), read_checkpoint(checkpoint)
    for key in ("model", "test_dataloader", "visualizer"):
        if not cfg.get(key):
            raise UserError(f"{config}: the config sets no {key}")
    for picture in pictures:
        if not cv2.haveImageReader(str(picture)):
            raise UserError(f"{picture}: the image cannot be read")
    inferencer = DetInferencer(cfg, checkpoint, device, scope="mmdet", palette="random", show_progress=False)
    check_fits(inferencer.model, weights, checkpoint)
    classes = list(inferencer.model.dataset_meta["classes"])
    detector = MMDetDetector(inferencer.model, classes=classes)

    def run():
        for picture in pictures:
            (result,) = inferencer(
                str(picture), out_dir=str(folder), pred_score_thr=score, return_datasamples=True, no_save_pred=True
            )["predictions"]
            yield tuple(result.ori_shape), detector.objects(result.pred_instances).above(score)

    return classes, run()
