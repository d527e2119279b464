"""What the backbones share: maps of several resolutions, frozen stages, deformable layers in chosen places."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from dk_detection.convert import to_deformable

# What goes into one kind of places: a token; a token, its stages and options of the layer; or several of those.
Layers = str | dict | Sequence[str | dict] | None

STRIDES = (4, 8, 16, 32)


class Staged(nn.Module):
    """Makes a classifier of torchvision's a backbone. A subclass lists it in front of that class.

    The network is cut into a stem and four stages, which end in the last maps of the strides 4, 8, 16 and 32 and are
    called c2, c3, c4 and c5. Deformable layers stand in the 3x3 and in the 1x1 convolutions of the blocks; those of the
    stem and of shortcuts stay rigid. Keys are torchvision's.

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
        conv3x3: Layers,
        conv1x1: Layers,
    ) -> None:
        """Cuts the network to what is asked for, puts the layers in their places, and freezes.

        Args:
            num_classes: Of the classifier. None: there is none.
            out_indices: Which maps are the features, 0 (stride 4) to 3 (stride 32), in ascending order. Without a
                classifier the stages behind the last of them are not built.
            frozen_stages: How many stages do not learn, not even the statistics of their normalisations. 0: the stem
                alone; -1: all of the network learns.
            norm_eval: Whether the statistics of all normalisations stay as they are in training.
            conv3x3, conv1x1: What stands in the 3x3 and in the 1x1 convolutions: None, nothing; the token of a layer,
                such as "dk"; `dict(layer="dk", stages="c3-c5", scope_size=4)`, where `stages` (default: all of them)
                says in which and the rest are options of the layer; or several of those for different stages.

        Raises:
            ValueError: An argument is out of its range, names a stage that is not there, or one stage twice; or
                `to_deformable` raises it.
            TypeError: `to_deformable` raises it.
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
        for argument, size, layers in (("conv3x3", (3, 3), conv3x3), ("conv1x1", (1, 1), conv1x1)):
            self._exchange(argument, size, layers)
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def _exchange(self, argument: str, size: tuple[int, int], layers: Layers) -> None:
        taken = set()
        for layer in [layers] if isinstance(layers, str | dict) else layers or ():
            options = dict(layer=layer) if isinstance(layer, str) else dict(layer)
            if "layer" not in options:
                raise ValueError(f"{type(self).__name__}: {argument} lacks the token of a layer, layer=..., in {layer}")
            stages = self._stages(argument, options.pop("stages", None))
            if twice := taken.intersection(stages):
                raise ValueError(f"{type(self).__name__}: {argument} names c{min(twice) + 1} twice, in {layers}")
            taken.update(stages)
            parts = self._parts()
            inside = {m for stage in stages for part in parts[stage] for m in part.modules()}
            to_deformable(
                self,
                select=lambda name, conv, inside=inside: (
                    conv in inside and conv.kernel_size == size and "downsample" not in name
                ),
                **options,
            )

    def _stages(self, argument: str, stages: str | None) -> range:
        """The stages, from 1 on, that "c3-c5" or "c5" names."""
        last = len(self._parts()) - 1
        if stages is None:
            return range(1, last + 1)
        name = re.fullmatch(r"c(\d)(?:-c(\d))?", stages) if isinstance(stages, str) else None
        first, end = (int(name[1]) - 1, int(name[2] or name[1]) - 1) if name else (0, 0)
        if not 1 <= first <= end <= last:
            raise ValueError(
                f"{type(self).__name__}: {argument} has stages={stages!r}, expected one or a range of c2 to "
                f"c{last + 1}, such as 'c3-c{last + 1}'"
            )
        return range(first, end + 1)

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
