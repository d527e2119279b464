"""Backbones by name, and Tables 1 and 2 of Deformable Kernels."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torchvision import models

from dk_detection.backbones import MobileNetV2, ResNetDW
from dk_detection.complexity.counting import (
    Part,
    Progress,
    count_modules,
    count_network,
    format_table,
    parameters,
)
from dk_detection.convert import to_deformable
from dk_detection.errors import UserError
from dk_detection.layers import CondConv2d, GlobalDeformKernel2d

OURS = {"resnet50-dw": ResNetDW, "mobilenet-v2": MobileNetV2}


def count_backbone(
    name: str,
    shape: tuple[int, int] = (224, 224),
    *,
    conv3x3: dict | None = None,
    conv1x1: dict | None = None,
    exchange: Sequence[dict] = (),
) -> list[Part]:
    """Counts a classifier of 1000 classes.

    Args:
        name: "resnet50-dw", "mobilenet-v2", or a classification model of torchvision, such as "resnet101".
        shape: (H, W) of the image.
        conv3x3, conv1x1: What stands in the blocks of the first two; see `dk_detection.backbones`.
        exchange: Arguments of `to_deformable`, for any network, carried out one after the other.

    Returns:
        A part for each child of the network.

    Raises:
        UserError: There is no such network, it does not take the layers, or the image is too small for it.
    """
    places = {key: layers for key, layers in (("conv3x3", conv3x3), ("conv1x1", conv1x1)) if layers}
    if name not in OURS:
        if name not in models.list_models(module=models):
            raise UserError(
                f"there is no backbone {name!r}; there are {', '.join(OURS)} and torchvision's classification models"
            )
        if places:
            raise UserError(f"{next(iter(places))} is for {' and '.join(OURS)}; {name} takes exchange")
    try:
        with torch.device("meta"):
            network = OURS[name](num_classes=1000, **places) if name in OURS else models.get_model(name, weights=None)
            for arguments in exchange:
                to_deformable(network, **arguments)
        return count_network(network, shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be counted: {error}") from error


@dataclass(frozen=True)
class Row:
    """A row of Tables 1 and 2 of Deformable Kernels.

    Attributes:
        backbone: "resnet50", which the tables have one row of, or a name in `OURS`.
        conv1x1, conv3x3: The paper's words for what stands in these places.
        parameters, gflops: The paper's figures: parameters in millions, multiply-adds in thousands of millions.
        layers: What stands there: arguments of the backbone.
    """

    backbone: str
    conv1x1: str
    conv3x3: str
    parameters: float
    gflops: float
    layers: dict = field(default_factory=dict)


def _rows(backbone: str, experts: int, figures: dict[str, tuple[float, float]]) -> Iterator[Row]:
    """The rows that both backbones have."""
    scc = dict(layer="scc", num_experts=experts)
    # With DCN, local kernels stand everywhere; the two are one layer where DCN is, from stride 8 on.
    dk_dcn = [dict(layer="dk", stages="c2"), dict(layer="dkdconv", stages="c3-c5")]
    kinds = {
        "rigid": ("-", "-", {}),
        "gdk": ("-", "global 4x4", dict(conv3x3="gdk")),
        "gdk, gdk": ("global 2x2", "global 4x4", dict(conv1x1="gdk", conv3x3="gdk")),
        "dk": ("-", "local 4x4", dict(conv3x3="dk")),
        "gdk, dk": ("global 2x2", "local 4x4", dict(conv1x1="gdk", conv3x3="dk")),
        "scc": ("SCC", "SCC", dict(conv1x1=scc, conv3x3=scc)),
        "scc, dk": ("SCC", "local 4x4", dict(conv1x1=scc, conv3x3="dk")),
        "dcn": ("-", "DCN", dict(conv3x3=dict(layer="dconv", stages="c3-c5"))),
        "dk + dcn": ("-", "DCN + local 4x4", dict(conv3x3=dk_dcn)),
    }
    for kind, paper in figures.items():
        conv1x1, conv3x3, layers = kinds[kind]
        yield Row(backbone, conv1x1, conv3x3, *paper, layers)


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
ROWS = (
    Row("resnet50", "-", "-", 25.6, 3.86),
    *_rows("resnet50-dw", 2, RESNET),
    *(
        Row("resnet50-dw", "-", f"local {s}x{s}", p, 4.32, dict(conv3x3=dict(layer="dk", scope_size=s)))
        for s, p in ((3, 24.9), (5, 25.0), (9, 25.4))
    ),
    *_rows("mobilenet-v2", 8, MOBILENET),
)


# For the rules under which the paper's FLOPs come out; see docs/complexity.md. What a value of a kernel costs that is
# resampled for a whole image, and what costs 1 a value.
GLOBAL_VALUE = 13
POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)
POOLING = (nn.MaxPool2d, nn.AdaptiveAvgPool2d)
DYNAMIC = (GlobalDeformKernel2d, CondConv2d)


def count_row(row: Row) -> tuple[Part, int]:
    """A row's classifier at 224x224.

    Returns:
        What it costs as it runs, and its FLOPs by the rules under which the paper's come out; see docs/complexity.md.
    """
    with torch.device("meta"):
        network = OURS[row.backbone](num_classes=1000, **row.layers) if row.backbone in OURS else _original_resnet50()
    with _extra(network) as extra:
        counts = count_modules(network, (224, 224))
    part = Part(row.backbone, parameters(network), counts[""])
    if row.backbone not in OURS:  # this row is of convolutions and the classifier alone
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
    network = models.resnet50()
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
        if isinstance(layer, GlobalDeformKernel2d):
            cells = math.prod(layer.scope_size)
            return pooled + layer.weight.numel() // cells * math.prod(layer.kernel_size) * (GLOBAL_VALUE - cells)
        # The layer mixes the experts, in a multiply-add for each value of each, and convolves once; in the paper each
        # expert convolves, but for those of MobileNet-V2's last convolution, which feeds the classifier.
        experts = 1 if name == "features.18.0" else layer.num_experts
        kernel = layer.weight.numel() // layer.num_experts
        return pooled + kernel * (experts - 1) * math.prod(output.shape[2:]) - layer.weight.numel()

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
    for index, row in enumerate(ROWS):
        if progress:
            progress(index, len(ROWS), f"{row.backbone}, 1x1 {row.conv1x1}, 3x3 {row.conv3x3}")
        part, by_paper = count_row(row)
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
