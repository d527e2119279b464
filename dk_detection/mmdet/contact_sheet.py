"""One picture of what a run has learned: objects, predictions, and where the detector looks."""

import os

from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from dk_detection.errors import UserError


@HOOKS.register_module(force=True)
class DkContactSheetHook(Hook):
    """Leaves `contact_sheet.png` in the work folder after each evaluation.

    A row each shows a small, a medium and a large object of the data set: the objects in its image, what is predicted,
    and of the node at its centre the sampling locations and the effective receptive field.

    Args:
        num_images: From how many images, the first of the data set, the objects are chosen.
        layer: The module whose nodes are looked at, such as "backbone.layer3.1.conv2"; None: the last convolution of
            more than one tap in the backbone.
        levels: Number of layers whose taps fan out into sampling locations.
        score_thr: Predictions with a lower score are not drawn.
    """

    priority = "LOW"

    def __init__(self, num_images: int = 32, layer: str | None = None, levels: int = 3, score_thr: float = 0.5) -> None:
        self.num_images, self.score_thr = num_images, score_thr
        self.settings = dict(layer=layer, levels=levels)
        self._seen = []

    def before_val_epoch(self, runner) -> None:
        self._seen = []

    @master_only  # only there does the visualizer know the classes
    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        room = self.num_images - len(self._seen)
        self._seen += [
            (image.cpu(), sample.cpu()) for image, sample in zip(data_batch["inputs"], outputs[:room], strict=False)
        ]

    def after_val_epoch(self, runner, metrics=None) -> None:
        if runner.rank != 0:
            return
        # Here, so that a training that draws nothing needs nothing to draw with.
        from dk_detection.mmdet.visualize import MMDetDetector
        from dk_detection.visualization import kinds

        network = runner.model.module if is_model_wrapper(runner.model) else runner.model
        detector = MMDetDetector(network, classes=runner.visualizer.dataset_meta.get("classes"))
        annotated = [
            (image, sample, detector.objects(sample.gt_instances))
            for image, sample in self._seen
            if "gt_instances" in sample
        ]
        entries = []
        for index, number in kinds.objects_of_three_sizes([objects for *_, objects in annotated]):
            image, sample, objects = annotated[index]
            found = detector.objects(sample.pred_instances).above(self.score_thr)
            entries.append((detector.sample(image, sample), objects, number, found))
        self._seen = []
        if not entries:
            runner.logger.warning("no contact sheet: the data set has no annotated objects")
            return
        try:
            figure, _ = kinds.contact_sheet(detector, entries, kinds.Options(**self.settings))
        except UserError as error:
            runner.logger.warning(f"no contact sheet: {error}")
        else:
            figure.savefig(os.path.join(runner.work_dir, "contact_sheet.png"))

    before_test_epoch, after_test_iter, after_test_epoch = before_val_epoch, after_val_iter, after_val_epoch
