"""Pictures and figures of what a network looks at, while it is trained."""

import logging
from collections.abc import Iterable, Mapping

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dk_detection.detectron2.visualize import Detectron2Detector
from dk_detection.errors import UserError
from dk_detection.visualization import kinds, pictures


def hooks_for_pictures(model: nn.Module, loader: Iterable, settings: Mapping) -> list[HookBase]:
    """The hook that a config asks for, in the first of several processes, or none.

    Args:
        model: The detector, also inside DistributedDataParallel.
        loader: Of the training images; the first of them is shown.
        settings: `period` and other arguments of `DkVisualizeHook`; without a period, or with 0, there is no hook.

    Raises:
        UserError: The hook has no such argument.
    """
    if not settings.get("period") or not comm.is_main_process():
        return []
    try:
        return [DkVisualizeHook(model, next(iter(loader))[0], **settings)]
    except TypeError as error:
        raise UserError(f"pictures of what the network looks at: {error}") from error


class DkVisualizeHook(HookBase):
    """Shows every n iterations what a network looks at in an image, and how far its offsets go.

    The picture, `dk_sampling`, and the norms, `offset_norm/<layer>`, go to the trainer's event storage, from where its
    writers take them, TensorBoard's too. Norms are root mean squares: in pixels of the layer's input, for RoI pooling
    in units of gamma * RoI size, for deformable kernels, `<layer>/kernel`, in cells of the scope.

    A config asks for it by `train.dk_visualize = dict(period=500)` (LazyConfig) or DK_VISUALIZE.PERIOD (YAML), which
    this project's tools/train_net.py reads. Other trainers register it in front of the writers, so that these see what
    belongs to their iteration::

        trainer.register_hooks([DkVisualizeHook(model, next(iter(loader))[0], period=500)])

    Args:
        model: The detector, also inside DistributedDataParallel.
        data: What a data loader has of an image: "image" and, where objects are known, "instances".
        period: Number of iterations from one picture to the next.
        layer: The module whose nodes are looked at, such as "backbone.bottom_up.res5.2.conv2"; None: the last
            convolution of more than one tap in the backbone.
        levels: Number of layers whose taps fan out into sampling locations.
        score: Predictions with a lower score are not drawn.
        classes: Names of the classes, as MetadataCatalog has them; None: their numbers are drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        data: dict,
        period: int = 500,
        *,
        layer: str | None = None,
        levels: int = 3,
        score: float = 0.3,
        classes=None,
    ) -> None:
        network = model.module if isinstance(model, DistributedDataParallel) else model
        self.detector = Detectron2Detector(network, classes=classes)
        self.data, self.period = data, period
        self.settings = dict(layer=layer, levels=levels, score=score)
        self.said: set[str] = set()

    def after_step(self) -> None:
        if not comm.is_main_process() or (self.trainer.iter + 1) % self.period:
            return
        objects = self.data.get("instances")
        known = objects is not None and objects.has("gt_boxes")
        figure, norms = kinds.training_picture(
            self.detector,
            self.data["image"],
            objects.gt_boxes.tensor if known else None,
            objects.gt_classes if known else None,
            kinds.Options(**self.settings, say=self._say_once),
        )
        storage = self.trainer.storage
        if figure is not None:
            storage.put_image("dk_sampling", pictures.to_array(figure).transpose(2, 0, 1))
        for name, value in norms.items():
            storage.put_scalar(f"offset_norm/{name}", value, smoothing_hint=False)

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            logging.getLogger(__name__).warning(text)
