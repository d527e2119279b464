"""What the backbones share: maps of several resolutions, and frozen stages."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import ResNet

STRIDES = (4, 8, 16, 32)


class Staged(nn.Module):
    """Makes a classifier of torchvision's a backbone. A subclass lists it in front of that class.

    The network is cut into a stem and four stages, which end in the last maps of the strides 4, 8, 16 and 32 and are
    called c2, c3, c4 and c5. Keys are torchvision's.

    The constructor of a subclass builds torchvision's network and then hands its own arguments to `_set_up`.

    Attributes:
        out_channels, out_strides: Of each of the features.
    """

    def _parts(self) -> list[list[nn.Module]]:
        """The stem and the stages that there are, each as the modules that follow one another."""
        raise NotImplementedError

    def _drop(self, num_stages: int, classifier: bool) -> None:
        """Removes the stages behind the first `num_stages`, and the classifier."""
        raise NotImplementedError

    def _set_up(
        self,
        *,
        num_classes: int | None,
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
    ) -> None:
        """Cuts the network to what is asked for, and freezes.

        Args:
            num_classes: Of the classifier. None: there is none.
            out_indices: Which maps are the features, 0 (stride 4) to 3 (stride 32), in ascending order. Without a
                classifier the stages behind the last of them are not built.
            frozen_stages: How many stages do not learn, not even the statistics of their normalisations. 0: the stem
                alone; -1: all of the network learns.
            norm_eval: Whether the statistics of all normalisations stay as they are in training.

        Raises:
            ValueError: An argument is out of its range.
        """
        name = type(self).__name__
        indices = tuple(out_indices)
        if not indices or list(indices) != sorted(set(indices)) or not set(indices) <= set(range(len(STRIDES))):
            raise ValueError(f"{name}: out_indices must be of 0 to 3 and ascending, got {out_indices}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"{name}: num_classes must be None or at least 1, got {num_classes}")
        self._drop(len(STRIDES) if num_classes else indices[-1] + 1, classifier=num_classes is None)
        if frozen_stages not in range(-1, len(self._parts())):
            raise ValueError(
                f"{name}: frozen_stages must be -1 to {len(self._parts()) - 1}, the number of stages, "
                f"got {frozen_stages}"
            )
        self.num_classes, self.out_indices = num_classes, indices
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        norms = [
            [m for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm2d)] for parts in self._parts()
        ]
        self.out_channels = tuple(norms[i + 1][-1].num_features for i in indices)
        self.out_strides = tuple(STRIDES[i] for i in indices)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def _frozen(self) -> list[nn.Module]:
        return [module for part in self._parts()[: self.frozen_stages + 1] for module in part]

    def train(self, mode: bool = True) -> "Staged":
        """As nn.Module's; frozen stages, and with `norm_eval` all normalisations, stay in evaluation."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward_features(self, input: Tensor) -> tuple[Tensor, ...]:
        """Maps of several resolutions.

        Args:
            input: [N, 3, H, W].

        Returns:
            For each of `out_indices` the map [N, out_channels, H / stride, W / stride], sizes rounded up.
        """
        stem, *stages = self._parts()
        x, features = input, []
        for module in stem:
            x = module(x)
        for index, stage in enumerate(stages):
            for module in stage:
                x = module(x)
            if index in self.out_indices:
                features.append(x)
        return tuple(features)

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[N, 3, H, W] to the scores of the classes [N, num_classes], without a classifier to `forward_features`."""
        return self.forward_features(input) if self.num_classes is None else super().forward(input)


class StagedResNet(Staged, ResNet):
    """torchvision's ResNet with blocks of another kind.

    Args:
        block: What a stage is made of.
        blocks: How many there are in each stage.
        num_classes: Of the classifier, which `_set_up` removes if it is None.

    Raises:
        ValueError: `blocks` is out of its range.
    """

    def __init__(self, block: type[nn.Module], blocks: Sequence[int], num_classes: int | None) -> None:
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"{type(self).__name__}: blocks must be four numbers of at least 1, got {blocks}")
        super().__init__(block, list(blocks), num_classes=num_classes or 1)

    def _parts(self) -> list[list[nn.Module]]:
        stages = [[stage] for name, stage in self.named_children() if name.startswith("layer")]
        return [[self.conv1, self.bn1, self.relu, self.maxpool], *stages]

    def _drop(self, num_stages: int, classifier: bool) -> None:
        for name in [f"layer{i}" for i in range(num_stages + 1, 5)] + (["avgpool", "fc"] if classifier else []):
            delattr(self, name)
