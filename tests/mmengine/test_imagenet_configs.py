"""Every config for ImageNet is what its name says, trains a step with its own optimiser and evaluates, made small."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch import nn

from dk_detection.config_files import MMENGINE, framework_of
from dk_detection.layers import KernelEvolutionConv2d
from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers._scope import WithScope
from tests import stems

ROOT = Path(__file__).parents[2] / "configs" / "imagenet"
FILES = sorted(ROOT.glob("*.py"))
# Table 1 of Differentiable Kernel Evolution.
EVOLVED = {
    *("alexnet", "alexnet-acu", "alexnet-dconv", "alexnet-dke", "r18", "r18-dke-c3-c5"),
    *("r101", "r101-acu-c3-c5", "r101-dconv-c3-c5", "r101-dke-c3-c5"),
}
FACTORS = {network: {"conv_offset": 0.1} for network in ("r50", "r18", "r101", "air", "alexnet")} | {
    network: dict.fromkeys(("kernel_offset", "conv_offset"), factor)
    for network, factor in (("r50-dw", 0.01), ("mobilenet-v2", 0.1))
}


def test_every_row_of_the_papers_tables_has_its_classifier():
    """Tables 3 and 4 of Deformable Kernels are over the backbones of Tables 1 and 2, which have four rows more.

    Aligned-Inception-ResNet is of Deformable ConvNets, Table 7.
    """
    detectors = {path.stem for path in (ROOT.parent / "mmdet" / "dk").glob("*.py")} - {
        "faster-rcnn_r50-dk-c3-c5_fpn_1x_coco"
    }
    classifiers = {path.stem.removesuffix("_90e_imagenet") for path in FILES}
    kernels = {name for name in classifiers if f"faster-rcnn_{name}_fpn_1x_coco" in detectors}
    assert len(kernels) == len(detectors)
    assert classifiers - kernels == {"air", "r50", "r50-dw-dk-s3", "r50-dw-dk-s5", "r50-dw-dk-s9"} | EVOLVED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config(path):
    name = stems.parse(path.stem)
    assert str(name) == path.stem
    assert (name.detector, name.neck, name.schedule, name.dataset) == (None, None, "90e", "imagenet")
    assert framework_of(path) == MMENGINE
    cfg = Config.fromfile(path)
    check_recipe(cfg, rate := 0.01 if name.backbone == "alexnet" else 0.1)

    backbone = cfg.model.backbone
    if name.backbone == "r101":
        backbone.depth = 50
    if name.backbone == "mobilenet-v2":
        backbone.width_mult = 0.25
    elif name.backbone in ("r50-dw", "air"):
        backbone.blocks = (1, 1, 1, 1)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        evaluator = Evaluator(cfg.val_evaluator)
    if name.backbone == "alexnet":  # it has no stages
        convs = [module for module in model.backbone.features if isinstance(module, nn.Conv2d)]
        assert {type(conv) for conv in convs} == {stems.LAYERS[name.layers[0][0]] if name.layers else nn.Conv2d}
    else:
        name.check_layers(model.backbone, dict(num_experts={"r50-dw": 2, "mobilenet-v2": 8}.get(name.backbone)))
    for layer in model.modules():
        if isinstance(layer, KernelEvolutionConv2d):
            assert layer.start == "normal"  # as in the paper
        if isinstance(layer, WithScope):
            scope = name.layers[0][1] or layer.kernel_size[0] + 1
            assert layer.scope_size == (scope, scope)

    # The paper's factors are those of the branches that make offsets, all of them.
    factors = FACTORS[name.backbone]
    groups = optim_wrapper.optimizer.param_groups
    rates = {p: group["lr"] / rate for group in groups for p in group["params"]}
    branches = {p for m in model.modules() if isinstance(m, ZeroConv2d) for p in m.parameters()}
    for key, parameter in model.named_parameters():
        found = [factor for part, factor in factors.items() if part in key]
        assert found or parameter not in branches or "routing" in key or "attention" in key, key
        assert rates[parameter] == pytest.approx(found[0] if found else 1), key

    model.init_weights()
    model.train()
    samples = [DataSample().set_gt_label(i) for i in (3, 999)]
    size = 224 if name.backbone == "alexnet" else 64
    data = dict(inputs=list(torch.randint(256, (2, 3, size, size), dtype=torch.uint8)), data_samples=samples)
    log = model.train_step(data, optim_wrapper)
    assert log["loss"].isfinite()
    left_out = [key for key, p in model.named_parameters() if p not in optim_wrapper.optimizer.state]
    assert not left_out, f"without a gradient: {left_out}"
    model.eval()
    with torch.no_grad():
        evaluator.process(model.val_step(data))
    assert evaluator.evaluate(2).keys() == {"accuracy/top1", "accuracy/top5"}


def check_recipe(cfg: Config, rate: float) -> None:
    """Deformable Kernels, Section 4 and Appendix D."""
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", rate, 0.9, 4e-5)
    assert cfg.train_cfg.max_epochs == 90
    assert cfg.auto_scale_lr.base_batch_size == 256
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.type, warm_up.end, cosine.type, cosine.begin, cosine.end) == (
        *("LinearLR", 5),
        *("CosineAnnealingLR", 5, 90),
    )
    assert [step.type for step in cfg.val_dataloader.dataset.pipeline][1:3] == ["ResizeEdge", "CenterCrop"]
