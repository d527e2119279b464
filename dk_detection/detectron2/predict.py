"""A detector of Detectron2 on pictures of one's own, with Detectron2's mapper and visualiser."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from detectron2.utils.visualizer import Visualizer

from dk_detection.detectron2.visualize import load_detector
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
        config: A config file of Detectron2, YAML or LazyConfig.
        checkpoint: The weights.
        pictures: Image files with names that differ.
        folder: Each picture goes into `vis` in it, under its name, with the objects drawn.
        score: The least of an object.
        device: Where the detector runs.
        options: Settings that override the config's: KEY VALUE ... for YAML, key=value ... for a LazyConfig.

    Returns:
        The names of all classes, none if the config's data set has none; and, as they are made, (height, width) and the
        objects of each picture.

    Raises:
        UserError: Something that the user can put right.
    """
    detector = load_detector(config, checkpoint, list(options), device)
    drawn = folder / "vis"
    drawn.mkdir(parents=True, exist_ok=True)

    def run():
        for picture in pictures:
            sample = detector.read(str(picture))
            objects = detector.predict(sample).above(score)
            visualizer = Visualizer(sample.image)
            visualizer.overlay_instances(
                boxes=objects.boxes,
                masks=None if objects.masks is None else objects.masks.numpy(),
                labels=[f"{label} {score:.0%}" for label, score in zip(objects.labels, objects.scores, strict=True)],
            )
            visualizer.get_output().save(str(drawn / picture.name))
            yield sample.image.shape[:2], objects

    return list(detector.classes or ()), run()
