"""MobileNet-V2, with maps of several resolutions."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn
from torchvision.models import mobilenetv2

from dk_detection.backbones._stages import Staged


class MobileNetV2(Staged, mobilenetv2.MobileNetV2):
    """torchvision's MobileNet-V2 as a backbone; the features are the last map of each resolution (Deformable Kernels).

    With width 1 those have 24, 32, 96 and 1280 channels; the one of stride 32 comes behind the last 1x1 convolution.
    torchvision's checkpoints load as they are; without a classifier their keys of it are left over (`strict=False`).

    Args:
        num_classes: Of the classifier. None: there is none, and the network returns its features.
        width_mult: Factor of all widths.
        out_indices: Which maps are the features, 0 (stride 4) to 3 (stride 32), in ascending order. Without a
            classifier the stages behind the last of them are not built.
        frozen_stages: How many stages do not learn, not even the statistics of their normalisations. 0: the stem, the
            first convolution, alone; -1: all of the network learns.
        norm_eval: Whether the statistics of all normalisations stay as they are in training.

    Raises:
        ValueError: An argument is out of its range.
    """

    # Where the stages begin in torchvision's `features`, and where the last one ends.
    _BOUNDS = (1, 4, 7, 14, 19)

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        width_mult: float = 1.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes or 1, width_mult=width_mult)
        self._set_up(
            num_classes=num_classes,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
        )

    def _parts(self) -> list[list[nn.Module]]:
        modules = list(self.features)
        bounds = (0, *self._BOUNDS[: self._BOUNDS.index(len(modules)) + 1])
        return [modules[begin:end] for begin, end in pairwise(bounds)]

    def _drop(self, num_stages: int, classifier: bool) -> None:
        del self.features[self._BOUNDS[num_stages] :]
        if classifier:
            del self.classifier
