"""The grammar of configs' file names, which is the same for both frameworks (docs/configs.md)."""

import re
from dataclasses import dataclass, replace

from torch import nn

from dk_detection.layers._base import RigidAtRest
from dk_detection.layers.table import TABLE

LAYERS = {row.token: row.layer for row in TABLE}
_CONVS, _ROI_LAYERS = ("|".join(row.token for row in TABLE if row.kind == kind) for kind in ("conv", "roi"))
_LAYER = re.compile(
    rf"-(?P<token>{_CONVS})(-s(?P<scope>\d))?(?P<pointwise>-1x1)?(-c(?P<first>\d)(-c(?P<last>\d))?)?(?=-|$)"
)
_STEM = re.compile(
    r"((?P<detector>faster-rcnn|mask-rcnn|rfcn|ssd)_)?(?P<backbone>r\d+-dw|r\d+|x101-32x8d|air|mobilenet-v2|shallow9|alexnet)"
    rf"(?P<layers>(-({_CONVS})(-1x1|-[cs]\d)*)*)"
    rf"(_(?P<neck>fpn|dc5))?(_(?P<roi>{_ROI_LAYERS}))?(_(?P<mimic>mimic(-bg|-fgbg)?))?"
    r"_(?P<schedule>1x|16e|90e|\d+(\.\d+)?k)_(?P<dataset>coco|deformed-shapes|imagenet)"
)
# Where the stages of MobileNet-V2 end in torchvision's `features`.
_MOBILENET_STAGES = {2: range(1, 4), 3: range(4, 7), 4: range(7, 14), 5: range(14, 19)}


@dataclass(frozen=True)
class Stem:
    """What a file name says. `layers` are (token, scope, size of kernel, stages); a classifier has no detector."""

    detector: str | None
    backbone: str
    layers: tuple[tuple[str, int | None, int, range], ...]
    neck: str | None
    roi: str | None
    mimic: str | None
    schedule: str
    dataset: str

    def __str__(self) -> str:
        words = [self.backbone]
        for token, scope, size, stages in self.layers:
            words += [token] + ([f"s{scope}"] if scope else []) + (["1x1"] if size == 1 else [])
            if stages != range(2, 6):
                words += sorted({f"c{stages[0]}", f"c{stages[-1]}"})
        parts = (self.detector, "-".join(words), self.neck, self.roi, self.mimic, self.schedule, self.dataset)
        return "_".join(filter(None, parts))

    def rigid(self) -> "Stem":
        """The stem without anything deformable, and without mimicking."""
        return replace(self, layers=(), roi=None, mimic=None)

    def layer(self, size: int, stage: int) -> type[nn.Conv2d] | None:
        """The layer in the convolutions of this kernel size in the blocks of a stage, None for a rigid one."""
        tokens = [token for token, _, kernel, stages in self.layers if kernel == size and stage in stages]
        assert len(tokens) <= 1, "two layers in one place"
        return LAYERS[tokens[0]] if tokens else None

    def check_layers(self, network: nn.Module, options: dict | None = None) -> None:
        """Asserts that the convolutions of a backbone's blocks are what the name says, and all others are rigid."""
        seen = set()
        ours = [name for name, m in network.named_modules() if isinstance(m, RigidAtRest)]
        for name, conv in network.named_modules():
            if not isinstance(conv, nn.Conv2d) or any(name.startswith(f"{layer}.") for layer in ours):
                continue  # a branch
            stage = _stage(name)
            expected = self.layer(conv.kernel_size[0], stage) if stage else None
            assert (type(conv) if isinstance(conv, RigidAtRest) else None) is expected, name
            if expected:
                seen.add((expected, conv.kernel_size[0], stage))
                for option, value in (options or {}).items():
                    assert getattr(conv, option, value) == value, name
        number = {size: [stage for stage in range(2, 6) if self.layer(size, stage)] for size in (1, 3)}
        assert len(seen) == len(number[1]) + len(number[3])


def parse(stem: str) -> Stem:
    match = _STEM.fullmatch(stem)
    assert match, f"{stem} does not follow the grammar"
    layers = tuple(
        (
            layer["token"],
            int(layer["scope"]) if layer["scope"] else None,
            1 if layer["pointwise"] else 3,
            range(int(layer["first"]), int(layer["last"] or layer["first"]) + 1) if layer["first"] else range(2, 6),
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
