"""The grammar of configs' file names, which is the same for both frameworks (docs/configs.md)."""

import re
from dataclasses import dataclass, replace

from torch import nn

from dk_detection.layers._base import RigidAtRest
from dk_detection.layers.table import TABLE

LAYERS = {row.token: row.layer for row in TABLE}
_CONVS, _ROI_LAYERS = ("|".join(row.token for row in TABLE if row.kind == kind) for kind in ("conv", "roi"))
_LAYER = re.compile(
    rf"-(?P<token>{_CONVS})(-s(?P<scope>\d))?(?P<pointwise>-1x1)?"
    r"(-c(?P<first>\d)(-c(?P<last>\d))?|-l(?P<number>\d))?(?=-|$)"
)
_STEM = re.compile(
    r"((?P<detector>faster-rcnn|mask-rcnn|rfcn|class-aware-rpn|ssd|deeplab)_)?"
    r"(?P<backbone>r\d+-dw|r\d+|x101-32x8d|air|mobilenet-v2|shallow9|alexnet)"
    rf"(?P<layers>(-({_CONVS})(-1x1|-[csl]\d)*)*)"
    rf"(_(?P<neck>fpn|dc5(-d\d)?))?(_(?P<roi>{_ROI_LAYERS}))?(_(?P<mimic>mimic(-bg|-fgbg)?))?"
    r"_(?P<schedule>1x|16e|90e|\d+(\.\d+)?k)_(?P<dataset>coco|voc0712|voc12aug|cityscapes|deformed-shapes|imagenet)"
)
# Where the stages of MobileNet-V2 end in torchvision's `features`.
_MOBILENET_STAGES = {2: range(1, 4), 3: range(4, 7), 4: range(7, 14), 5: range(14, 19)}


@dataclass(frozen=True)
class Stem:
    """What a file name says. `layers` are (token, scope, size of kernel, stages, how many convolutions from the
    network's end if not all); a classifier has no detector, a segmentor is one."""

    detector: str | None
    backbone: str
    layers: tuple[tuple[str, int | None, int, range, int | None], ...]
    neck: str | None
    roi: str | None
    mimic: str | None
    schedule: str
    dataset: str

    def __str__(self) -> str:
        words = [self.backbone]
        for token, scope, size, stages, number in self.layers:
            words += [token] + ([f"s{scope}"] if scope else []) + (["1x1"] if size == 1 else [])
            if number:
                words.append(f"l{number}")
            elif stages != range(2, 6):
                words += sorted({f"c{stages[0]}", f"c{stages[-1]}"})
        parts = (self.detector, "-".join(words), self.neck, self.roi, self.mimic, self.schedule, self.dataset)
        return "_".join(filter(None, parts))

    def rigid(self) -> "Stem":
        """The stem without anything deformable, and without mimicking; dilation stays."""
        return replace(self, layers=(), roi=None, mimic=None)

    @property
    def dilation(self) -> int:
        """Of the 3x3 convolutions of conv5."""
        return int((self.neck or "").partition("-d")[2] or (2 if self.neck == "dc5" else 1))

    def build(self) -> str:
        """The same for stems whose detectors are built of the same layers: which differ in data, dilation, and how many
        convolutions at the end are deformable."""
        layers = tuple(layer if not layer[4] else (*layer[:3], range(5, 6), None) for layer in self.layers)
        data = dict(schedule="", dataset="") if self.schedule in ("30k", "240k") else {}
        return str(replace(self, layers=layers, neck=self.neck and self.neck.partition("-d")[0], **data))

    def layer(self, size: int, stage: int) -> type[nn.Conv2d] | None:
        """The layer in the convolutions of this kernel size in the blocks of a stage, None for a rigid one."""
        tokens = [token for token, _, kernel, stages, _ in self.layers if kernel == size and stage in stages]
        assert len(tokens) <= 1, "two layers in one place"
        return LAYERS[tokens[0]] if tokens else None

    def check_layers(self, network: nn.Module, options: dict | None = None) -> None:
        """Asserts that the convolutions of a backbone's blocks are what the name says, and all others are rigid."""
        seen, last = set(), self._last(network)
        ours = [name for name, m in network.named_modules() if isinstance(m, RigidAtRest)]
        for name, conv in network.named_modules():
            if not isinstance(conv, nn.Conv2d) or any(name.startswith(f"{layer}.") for layer in ours):
                continue  # a branch
            stage = _stage(name)
            expected = self.layer(conv.kernel_size[0], stage) if stage and (last is None or name in last) else None
            assert (type(conv) if isinstance(conv, RigidAtRest) else None) is expected, name
            if expected:
                seen.add((expected, conv.kernel_size[0], stage))
                for option, value in (options or {}).items():
                    assert getattr(conv, option, value) == value, name
        if last:
            assert len(last) == self.layers[0][4] and {stage for *_, stage in seen} == set(map(_stage, last))
            return
        number = {size: [stage for stage in range(2, 6) if self.layer(size, stage)] for size in (1, 3)}
        assert len(seen) == len(number[1]) + len(number[3])

    def _last(self, network: nn.Module) -> list[str] | None:
        """The names of as many of the last 3x3 convolutions as the name says; None: it does not."""
        (number,) = {layer[4] for layer in self.layers} or {None}
        convs = (name for name, conv in network.named_modules() if getattr(conv, "kernel_size", None) == (3, 3))
        return number and [name for name in convs if _stage(name)][-number:]


def parse(stem: str) -> Stem:
    match = _STEM.fullmatch(stem)
    assert match, f"{stem} does not follow the grammar"
    layers = tuple(
        (
            layer["token"],
            int(layer["scope"]) if layer["scope"] else None,
            1 if layer["pointwise"] else 3,
            range(int(layer["first"]), int(layer["last"] or layer["first"]) + 1) if layer["first"] else range(2, 6),
            int(layer["number"]) if layer["number"] else None,
        )
        for layer in _LAYER.finditer(match["layers"])
    )
    others = ("detector", "backbone", "neck", "roi", "mimic", "schedule", "dataset")
    return Stem(layers=layers, **{name: match[name] for name in others})


def _stage(name: str) -> int | None:
    """The stage of a convolution in a block, by its name in MMDetection, Detectron2 or torchvision."""
    if match := re.search(r"layer(\d)\.\d+\.conv\d$", name):
        return int(match[1]) + 1
    if match := re.search(r"res(\d)\.\d+\.conv\d$", name):
        return int(match[1])
    if match := re.search(r"features\.(\d+)\.(conv\.|0$)", name):
        return next((stage for stage, places in _MOBILENET_STAGES.items() if int(match[1]) in places), None)
    if name.startswith("branches."):  # of Shallow9
        return 3
    return None
