"""The papers' tables of parameters and FLOPs beside our counts: `python tools/complexity.py --table {dk,dke,dcnv2}`."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dk_detection.complexity.backbones import BACKBONES, build_backbone
from dk_detection.complexity.counting import Part, Progress, count_modules, format_table, parameters, total
from dk_detection.config_files import FOLDERS
from dk_detection.layers import CondConv2d, GlobalDeformKernel2d

# Tables 1 and 2 of Deformable Kernels.


@dataclass(frozen=True)
class Classifier:
    """A row of Tables 1 and 2 of Deformable Kernels.

    Attributes:
        backbone: "resnet50", which the tables have one row of, or a name in `BACKBONES`.
        conv1x1, conv3x3: The paper's words for what stands in these places.
        parameters, gflops: The paper's figures: parameters in millions, multiply-adds in thousands of millions.
        exchange: What stands there: the arguments of `to_deformable`, one after the other.
    """

    backbone: str
    conv1x1: str
    conv3x3: str
    parameters: float
    gflops: float
    exchange: tuple[dict, ...] = ()


# Where the paper puts its layers, as patterns of `to_deformable`. Stems and shortcuts stay rigid.
PLACES = {
    "resnet50-dw": {
        "3x3": "layer*.conv2",
        "3x3 in c2": "layer1.*.conv2",
        "3x3 in c3-c5": "layer[234].*.conv2",
        "1x1": "layer*.conv[13]",
    },
    "mobilenet-v2": {
        "3x3": ("features.1.conv.0.0", "features.*.conv.1.0"),
        "3x3 in c2": ("features.1.conv.0.0", "features.[23].conv.1.0"),
        "3x3 in c3-c5": ("features.[4-9].conv.1.0", "features.1?.conv.1.0"),
        "1x1": (
            *("features.[2-9].conv.0.0", "features.1?.conv.0.0"),  # expansions
            *("features.1.conv.1", "features.*.conv.2"),  # projections
            "features.18.0",
        ),
    },
}
EXPERTS = {"resnet50-dw": 2, "mobilenet-v2": 8}  # of SCC


def _classifiers(backbone: str, figures: dict[str, tuple[float, float]]) -> Iterator[Classifier]:
    """The rows that both backbones have."""

    def put(place: str, layer: str, **options) -> dict:
        return dict(layer=layer, select=PLACES[backbone][place], **options)

    scc = partial(put, layer="scc", num_experts=EXPERTS[backbone])
    kinds = {
        "rigid": ("-", "-"),
        "gdk": ("-", "global 4x4", put("3x3", "gdk")),
        "gdk, gdk": ("global 2x2", "global 4x4", put("1x1", "gdk"), put("3x3", "gdk")),
        "dk": ("-", "local 4x4", put("3x3", "dk")),
        "gdk, dk": ("global 2x2", "local 4x4", put("1x1", "gdk"), put("3x3", "dk")),
        "scc": ("SCC", "SCC", scc("1x1"), scc("3x3")),
        "scc, dk": ("SCC", "local 4x4", scc("1x1"), put("3x3", "dk")),
        "dcn": ("-", "DCN", put("3x3 in c3-c5", "dconv")),
        # Local kernels stand everywhere; the two are one layer where DCN is, from stride 8 on.
        "dk + dcn": ("-", "DCN + local 4x4", put("3x3 in c2", "dk"), put("3x3 in c3-c5", "dkdconv")),
        **{f"dk {s}x{s}": ("-", f"local {s}x{s}", put("3x3", "dk", scope_size=s)) for s in (3, 5, 9)},
    }
    for kind, paper in figures.items():
        conv1x1, conv3x3, *exchange = kinds[kind]
        yield Classifier(backbone, conv1x1, conv3x3, *paper, tuple(exchange))


RESNET = {
    "rigid": (23.7, 3.82),
    "gdk": (23.9, 3.82),
    "gdk, gdk": (80.1, 4.09),
    "dk": (25.0, 4.32),
    "gdk, dk": (81.2, 4.60),
    "scc": (42.5, 7.13),
    "scc, dk": (43.7, 7.61),
    "dcn": (24.8, 4.10),
    "dk + dcn": (26.1, 4.60),
    "dk 3x3": (24.9, 4.32),
    "dk 5x5": (25.0, 4.32),
    "dk 9x9": (25.4, 4.32),
}
MOBILENET = {
    "rigid": (3.5, 0.31),
    "gdk": (3.7, 0.31),
    "gdk, gdk": (10.1, 0.34),
    "dk": (4.7, 0.73),
    "gdk, dk": (11.1, 0.76),
    "scc": (19.0, 2.19),
    "scc, dk": (19.7, 2.48),
    "dcn": (4.6, 0.52),
    "dk + dcn": (5.8, 0.93),
}
CLASSIFIERS = (
    Classifier("resnet50", "-", "-", 25.6, 3.86),
    *_classifiers("resnet50-dw", RESNET),
    *_classifiers("mobilenet-v2", MOBILENET),
)


# For the rules under which the paper's FLOPs come out; see docs/complexity.md. What a value of a kernel costs that is
# resampled for a whole image, and what costs 1 a value.
GLOBAL_VALUE = 13
POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)
POOLING = (nn.MaxPool2d, nn.AdaptiveAvgPool2d)
DYNAMIC = (GlobalDeformKernel2d, CondConv2d)


def count_classifier(row: Classifier) -> tuple[Part, int]:
    """A row's classifier at 224x224.

    Returns:
        What it costs as it runs, and its FLOPs by the rules under which the paper's come out; see docs/complexity.md.
    """
    ours = row.backbone in BACKBONES
    network = build_backbone(row.backbone, row.exchange) if ours else _original_resnet50()
    with _extra(network) as extra:
        counts = count_modules(network, (224, 224))
    part = Part(row.backbone, parameters(network), counts[""])
    if not ours:  # this row is of convolutions and the classifier alone
        return part, part.multiply_adds

    def by_paper(name: str) -> int:
        return counts.get(name, 0) + sum(more for key, more in extra.items() if f"{key}.".startswith(f"{name}."))

    flops = counts[""] + sum(extra.values())
    if row.backbone == "resnet50-dw":
        for name in ("layer1", "layer2", "layer3", "layer4"):
            blocks = len(network.get_submodule(name))
            first = by_paper(f"{name}.0") - by_paper(f"{name}.0.downsample")
            flops += by_paper(f"{name}.{blocks - 1}") - first
    return part, flops


def _original_resnet50() -> nn.Module:
    """ResNet-50 as in He et al. (2016): its stride in the first 1x1 convolution, where torchvision's is in the 3x3."""
    network = build_backbone("resnet50")
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    return network


@contextmanager
def _extra(network: nn.Module) -> Iterator[Counter[str]]:
    """Collects, by their names, what layers cost more by the paper's rules than by ours, which count what runs."""
    extra = Counter()

    def more(name: str, layer: nn.Module, input: torch.Tensor, output: torch.Tensor) -> int:
        if not isinstance(layer, DYNAMIC):
            return (input if isinstance(layer, POOLING) else output).numel()
        pooled = input.numel()  # for the generator
        values = layer.out_channels * (layer.in_channels // layer.groups) * math.prod(layer.kernel_size)
        if isinstance(layer, GlobalDeformKernel2d):
            return pooled + values * (GLOBAL_VALUE - math.prod(layer.scope_size))
        # The layer mixes the experts, in a multiply-add for each value of each, and convolves once; in the paper each
        # expert convolves, but for those of MobileNet-V2's last convolution, which feeds the classifier.
        experts = 1 if name == "features.18.0" else layer.num_experts
        return pooled + values * ((experts - 1) * math.prod(output.shape[2:]) - layer.num_experts)

    def hook(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        extra[name] += more(name, layer, *inputs, output)

    handles = [
        layer.register_forward_hook(partial(hook, name))
        for name, layer in network.named_modules()
        if isinstance(layer, (*POINTWISE, *POOLING, *DYNAMIC))
    ]
    try:
        yield extra
    finally:
        for handle in handles:
            handle.remove()


def dk_table(progress: Progress | None = None) -> str:
    """Tables 1 and 2 of Deformable Kernels, the paper's figures beside ours."""
    rows = []
    for index, row in enumerate(CLASSIFIERS):
        if progress:
            progress(index, len(CLASSIFIERS), f"{row.backbone}, 1x1 {row.conv1x1}, 3x3 {row.conv3x3}")
        part, by_paper = count_classifier(row)
        rows.append(
            (
                row.backbone,
                row.conv1x1,
                row.conv3x3,
                f"{part.parameters / 1e6:.1f}",
                f"{row.parameters:.1f}",
                f"{by_paper / 1e9:.2f}",
                f"{row.gflops:.2f}",
                f"{part.multiply_adds / 1e9:.2f}",
            )
        )
    header = ("backbone", "1x1", "3x3", "#P (M)", "paper", "GFLOPs", "paper", "as it runs")
    note = "GFLOPs are counted by the rules under which the paper's come out; as it runs, by ours: docs/complexity.md."
    return f"{format_table(header, rows)}\n\n{note}"


# Table 1 of Differentiable Kernel Evolution.


@dataclass(frozen=True)
class Evolved:
    """A row of Table 1 of Differentiable Kernel Evolution.

    Attributes:
        backbone: A classifier of torchvision.
        kind: The paper's word for its layers; "-" if they are rigid.
        gflops, parameters: The paper's figures: multiply-adds in thousands of millions, parameters in millions.
    """

    backbone: str
    kind: str
    gflops: float
    parameters: float


EVOLVED = (
    Evolved("alexnet", "-", 0.78, 61.1),
    Evolved("alexnet", "ACU", 0.78, 61.1),
    Evolved("alexnet", "DCN", 0.90, 61.4),
    Evolved("alexnet", "DKE", 0.82, 61.2),
    Evolved("resnet18", "-", 1.83, 11.7),
    Evolved("resnet18", "DKE", 1.88, 11.9),
    Evolved("resnet101", "-", 7.9, 44.5),
    Evolved("resnet101", "ACU", 7.9, 44.5),
    Evolved("resnet101", "DCN", 8.3, 46.5),
    Evolved("resnet101", "DKE", 8.0, 44.6),
)
EVOLVED_TOKENS = {"ACU": "acu", "DCN": "dconv", "DKE": "dke"}
# All of AlexNet, the last 12 and the last 30 3x3 convolutions of the ResNets.
EVOLVED_PLACES = {"alexnet": "features.*", "resnet18": "layer[234].*.conv[12]", "resnet101": "layer[234].*.conv2"}


def count_evolved(row: Evolved) -> Part:
    """A row's classifier at 224x224."""
    places = EVOLVED_PLACES[row.backbone]
    exchange = () if row.kind == "-" else (dict(layer=EVOLVED_TOKENS[row.kind], select=places),)
    network = build_backbone(row.backbone, exchange)
    return Part(row.backbone, parameters(network), count_modules(network, (224, 224))[""])


def dke_table(progress: Progress | None = None) -> str:
    """Table 1 of Differentiable Kernel Evolution, the paper's figures beside ours, and what the layers add."""
    rows, rigid = [], {}
    for index, row in enumerate(EVOLVED):
        if progress:
            progress(index, len(EVOLVED), f"{row.backbone}, {row.kind}")
        part = count_evolved(row)
        first, part_of_first = rigid.setdefault(row.backbone, (row, part))
        cells = [row.backbone, row.kind]
        for ours, before, paper, paper_before, digits in (
            (part.parameters / 1e6, part_of_first.parameters / 1e6, row.parameters, first.parameters, 1),
            (part.multiply_adds / 1e9, part_of_first.multiply_adds / 1e9, row.gflops, first.gflops, 2),
        ):
            is_first = row is first
            cells += [f"{ours:.2f}", f"{paper:.{digits}f}"]
            cells += ["", ""] if is_first else [f"{ours - before:+.3f}", f"{paper - paper_before:+.{digits}f}"]
        rows.append(cells)
    header = ("backbone", "layers", "#P (M)", "paper", "step", "paper", "GFLOPs", "paper", "step", "paper")
    return format_table(header, rows)


# Table 1 of Deformable ConvNets v2.

CONFIGS = FOLDERS["mmdet"] / "dcnv2"
CountConfig = Callable[[str | os.PathLike, tuple[int, int], int], list[Part]]


@dataclass(frozen=True)
class Setting:
    """A row of Table 1 of Deformable ConvNets v2, the same for both detectors.

    Attributes:
        name: The paper's.
        after: The row that this one is compared with.
        backbone, pooling: What the stem of the config says.
        faster, mask: The paper's parameters in millions and FLOPs in thousands of millions.
    """

    name: str
    after: str | None
    backbone: str
    pooling: str
    faster: tuple[float, float]
    mask: tuple[float, float]


SETTINGS = (
    Setting("regular", None, "r50", "", (51.3, 196.8), (39.5, 303.5)),
    Setting("dconv@c5", "regular", "r50-dconv-c5", "", (51.5, 197.7), (39.8, 303.7)),
    Setting("dconv@c5 + dpool", "dconv@c5", "r50-dconv-c5", "_dpool", (52.7, 198.9), (40.9, 304.9)),
    Setting("dconv@c4-c5", "dconv@c5", "r50-dconv-c4-c5", "", (51.7, 198.7), (40.0, 304.7)),
    Setting("dconv@c3-c5", "dconv@c4-c5", "r50-dconv-c3-c5", "", (51.8, 200.0), (40.1, 306.0)),
    Setting("dconv@c3-c5 + dpool", "dconv@c3-c5", "r50-dconv-c3-c5", "_dpool", (53.0, 201.2), (41.3, 307.2)),
    Setting(
        "mdconv@c3-c5 + mdpool", "dconv@c3-c5 + dpool", "r50-mdconv-c3-c5", "_mdpool", (65.5, 214.7), (53.8, 320.3)
    ),
)
DETECTORS = {
    "faster": ("Faster R-CNN", "faster-rcnn_{}_dc5{}_16e_coco"),
    "mask": ("Mask R-CNN", "mask-rcnn_{}_fpn{}_16e_coco"),
}


def count_dcnv2(
    detector: str, count_config: CountConfig, shape=(800, 1200), rois: int = 1000, progress: Progress | None = None
) -> dict[str, Part]:
    """Counts the detectors of Table 1 of Deformable ConvNets v2.

    Args:
        detector: "faster" or "mask".
        count_config: That of `dk_detection.mmdet.complexity`.
        shape, rois: Its arguments.
        progress: Called before each row with its index, the number of rows and its name.

    Returns:
        The sum of each setting's parts, by the setting's name.
    """
    stem = DETECTORS[detector][1]
    sums = {}
    for index, setting in enumerate(SETTINGS):
        if progress:
            progress(index, len(SETTINGS), f"{DETECTORS[detector][0]}, {setting.name}")
        path = CONFIGS / f"{stem.format(setting.backbone, setting.pooling)}.py"
        sums[setting.name] = total(count_config(path, shape, rois))
    return sums


def dcnv2_table(count_config: CountConfig, shape=(800, 1200), rois: int = 1000, progress=None) -> str:
    """Table 1 of Deformable ConvNets v2, the paper's figures beside ours, and what each row adds to the one before."""
    header = ("setting", "#P (M)", "paper", "step", "paper", "GFLOPs", "paper", "step", "paper")
    tables = []
    for detector, (title, _) in DETECTORS.items():
        sums = count_dcnv2(detector, count_config, shape, rois, progress)
        paper = {setting.name: getattr(setting, detector) for setting in SETTINGS}
        rows = []
        for setting in SETTINGS:
            row = [setting.name]
            for index, of in enumerate((lambda s: s.parameters / 1e6, lambda s: s.multiply_adds / 1e9)):
                row += [f"{of(sums[setting.name]):.2f}", f"{paper[setting.name][index]:.1f}"]
                if setting.after is None:
                    row += ["", ""]
                    continue
                row.append(f"{of(sums[setting.name]) - of(sums[setting.after]):+.2f}")
                row.append(f"{paper[setting.name][index] - paper[setting.after][index]:+.1f}")
            rows.append(row)
        tables.append(f"{title}, {shape[0]}x{shape[1]}, {rois} RoIs\n\n{format_table(header, rows)}")
    return "\n\n".join(tables)
