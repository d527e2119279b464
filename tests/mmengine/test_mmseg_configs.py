"""Every config of MMSegmentation is what its name says, trains a step, segments, and reads its data set's folders."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

import mmengine.config.config
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from dk_detection.config_files import MMENGINE, framework_of
from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError
from dk_detection.layers._base import ZeroConv2d
from dk_detection.mmengine import check_data
from dk_detection.mmengine.options import load_config
from tests import stems

ROOT = Path(__file__).parents[2] / "configs" / "mmseg"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "_base_")
ITERATIONS = {"voc12aug": 30000, "cityscapes": 45000, "deformed-shapes": 1000}
CLASSES = {"voc12aug": 21, "cityscapes": 19, "deformed-shapes": 7}
HEIGHT, WIDTH = 64, 96

configs = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


def load(path: Path) -> Config:
    """A config with a narrow network."""
    cfg = Config.fromfile(path)
    cfg.model.backbone.update(base_channels=8, stem_channels=8, init_cfg=None)
    cfg.model.decode_head.in_channels = 64 if cfg.model.backbone.depth == 18 else 256
    return cfg


def test_every_row_of_the_papers_tables_has_its_config():
    """Deformable ConvNets, DeepLab in Table 1 (the last 0, 1, 2, 3, 6 layers) and Table 3 (dilation 2, 4, 6, 8)."""
    rows = ["r101_dc5", *(f"r101-dconv-{where}_dc5" for where in ("l1", "l2", "c5", "l6"))]
    rows += [f"r101_dc5-d{dilation}" for dilation in (4, 6, 8)]
    expected = {f"deeplab_{row}_{data}" for row in rows for data in ("30k_voc12aug", "45k_cityscapes")}
    assert {path.stem for path in FILES if path.parent.name == "dcnv1"} == expected


@configs
def test_config_is_what_its_name_says_and_trains(path):
    name = stems.parse(path.stem)
    assert str(name) == path.stem
    assert name.detector == "deeplab"
    assert framework_of(path) == MMENGINE
    cfg = load(path)
    assert cfg.custom_imports.imports == ["dk_detection.mmengine"]
    paper = name.dataset != "deformed-shapes"
    optimizer, schedule = cfg.optim_wrapper.optimizer, cfg.param_scheduler[-1]
    assert cfg.train_cfg.max_iters == schedule.end == ITERATIONS[name.dataset]
    assert name.schedule == f"{ITERATIONS[name.dataset] // 1000}k"
    if paper:  # Section 4.1
        assert (optimizer.type, optimizer.lr, schedule.gamma) == ("SGD", 0.001, 0.1)
        assert schedule.milestones == [ITERATIONS[name.dataset] * 2 // 3]
        assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (1, 8)

    model = MODELS.build(cfg.model)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    net, head = model.backbone, model.decode_head
    name.check_layers(net)
    assert net.depth == int(name.backbone[1:])
    dilation = int((re.search(r"-d(\d)", name.neck) or "02")[1])
    convs = [module for place, module in net.layer4.named_modules() if re.search(r"\d\.conv\d$", place)]
    wide = [(conv.stride, conv.dilation) for conv in convs if conv.kernel_size == (3, 3)]
    basic = [] if paper else [((1, 1), (1, 1))]  # a basic block dilates the first of its two
    assert wide == (2 if basic else 3) * [((1, 1), (dilation, dilation)), *basic]
    assert head.conv_seg.out_channels == head.num_classes == CLASSES[name.dataset]
    if paper:  # Section 2.3
        assert [(conv.kernel_size, conv.out_channels) for conv in (head.convs[0].conv, head.conv_seg)] == [
            ((1, 1), 1024),
            ((1, 1), CLASSES[name.dataset]),
        ]
        frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {
            key for key, _ in model.named_parameters() if re.search(r"\.(conv1|bn1)\.|layer1|bn\d|downsample.1", key)
        } - {key for key, _ in model.named_parameters() if re.search(r"layer[234].*conv1", key)}

    # Offsets learn at the full rate; those of the small ones at a tenth, under AdamW.
    rates = {p: group["lr"] / optimizer.lr for group in optim_wrapper.optimizer.param_groups for p in group["params"]}
    branches = {p for m in model.modules() if isinstance(m, ZeroConv2d) for p in m.parameters()}
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert bool(branches) == bool(name.layers)
    assert rates.keys() == set(learning.values())
    for key, parameter in learning.items():
        assert rates[parameter] == pytest.approx(0.1 if parameter in branches and not paper else 1), key

    model.init_weights()
    model.train()
    log = model.train_step(batch(CLASSES[name.dataset]), optim_wrapper)
    assert log["loss"].isfinite() and log["loss"] > 0
    left_out = [key for key, p in learning.items() if p not in optim_wrapper.optimizer.state]
    assert not left_out, f"without a gradient: {left_out}"
    assert all(p.isfinite().all() for p in learning.values())
    model.eval()
    with torch.no_grad():
        results = model.test_step(batch(CLASSES[name.dataset]))
    assert [result.pred_sem_seg.data.shape for result in results] == [(1, HEIGHT, WIDTH)] * 2
    assert all(result.seg_logits.data.isfinite().all() for result in results)


def batch(classes: int) -> dict:
    """Two images of other sizes and their maps, as a data loader hands them over."""
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH)))
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, HEIGHT, WIDTH)))
        samples.append(sample)
    return dict(inputs=list(torch.randint(256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)), data_samples=samples)


@pytest.mark.parametrize(
    "path", [p for p in FILES if "_dc5_" not in p.stem or stems.parse(p.stem).layers], ids=lambda path: path.stem
)
def test_twins_differ_in_their_layers_only(path):
    twin = path.with_name(re.sub("_dc5-d.", "_dc5", str(stems.parse(path.stem).rigid())) + ".py")
    ours, rigid = Config.fromfile(path), Config.fromfile(twin)
    backbone = ours.model.backbone
    if backbone.type == "DkDeformable":
        backbone.type = backbone.pop("network")
        del backbone.exchange
    else:
        assert backbone.dilations[:3] == (1, 1, 1)
        backbone.dilations = rigid.model.backbone.dilations
    assert ours.to_dict() == rigid.to_dict()


def test_parameters():
    """Table 4 of the paper has 46.0M, and 46.1M with deformable convolution; docs/segmentation.md."""

    def parameters(stem):
        with torch.device("meta"):
            model = MODELS.build(Config.fromfile(ROOT / "dcnv1" / f"{stem}_30k_voc12aug.py").model)
        return sum(p.numel() for p in model.parameters())

    rigid = parameters("deeplab_r101_dc5")
    assert rigid == 42_500_160 + (2048 * 1024 + 1024) + (1024 * 21 + 21)
    assert parameters("deeplab_r101-dconv-c5_dc5") - rigid == 3 * (512 * 9 * 18 + 18)
    assert round(rigid / 1e6, 1) == 44.6


def test_missing_framework_is_said(monkeypatch):
    monkeypatch.setattr(mmengine.config.config, "is_installed", lambda package: False)
    with pytest.raises(UserError) as error:
        load_config(str(FILES[0]))
    assert "\n" not in str(error.value)
    assert "mmsegmentation is not installed: in the project's folder run `make setup`" in str(error.value)
    assert "-e '.[segmentation]'" in str(error.value)


# The data sets, in miniature.


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def labels(height: int, width: int, classes: int) -> np.ndarray:
    """Stripes of all classes and a frame that is ignored."""
    found = np.tile(np.arange(width) * classes // width, (height, 1)).astype(np.uint8)
    found[:2] = found[-2:] = 255
    return found


@pytest.fixture
def voc(tmp_path, monkeypatch):
    monkeypatch.setenv("DK_VOC2012_ROOT", str(tmp_path))
    parts = {"train": "SegmentationClass", "aug": "SegmentationClassAug", "val": "SegmentationClass"}
    for (part, folder), (height, width) in zip(parts.items(), ((60, 90), (90, 60), (50, 100)), strict=True):
        names = [f"{part}_{i}" for i in range(2)]
        for name in names:
            write(tmp_path / "JPEGImages" / f"{name}.jpg", np.full((height, width, 3), 90, np.uint8))
            write(tmp_path / folder / f"{name}.png", labels(height, width, 21))
        (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return tmp_path, ROOT / "dcnv1" / "deeplab_r101-dconv-c5_dc5_30k_voc12aug.py"


@pytest.fixture
def cityscapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DK_CITYSCAPES_ROOT", str(tmp_path))
    for part, town in (("train", "aachen"), ("val", "ulm")):
        for i in range(2):
            name = f"{town}_{i:06d}_000019"
            write(tmp_path / f"leftImg8bit/{part}/{town}/{name}_leftImg8bit.png", np.full((64, 128, 3), 90, np.uint8))
            write(tmp_path / f"gtFine/{part}/{town}/{name}_gtFine_labelTrainIds.png", labels(64, 128, 19))
    return tmp_path, ROOT / "dcnv1" / "deeplab_r101-dconv-c5_dc5_45k_cityscapes.py"


def iterate(cfg: Config) -> dict:
    """Looks at the data, trains on a batch of it, and evaluates."""
    assert check_data(cfg, ("train", "val", "test")) == {}
    for mode in ("train", "val"):
        cfg[f"{mode}_dataloader"].update(num_workers=0, persistent_workers=False)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    assert model.train_step(data, optim_wrapper)["loss"].isfinite()
    evaluator, val = Evaluator(cfg.val_evaluator), Runner.build_dataloader(cfg.val_dataloader)
    evaluator.dataset_meta = val.dataset.metainfo
    model.eval()
    with torch.no_grad():
        for data in val:
            for sample in (samples := model.val_step(data)):
                assert sample.pred_sem_seg.shape == sample.gt_sem_seg.shape == sample.ori_shape
            evaluator.process(samples, data)
    return evaluator.evaluate(len(val.dataset))


def test_voc(voc):
    cfg = load(voc[1])
    train = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(train) == 4  # train and aug
    sizes = {(*item["inputs"].shape[1:],) for item in (train[i] for i in range(4))}
    assert sizes == {(360, 540), (540, 360)}  # shorter sides of 360 pixels
    assert all(item["data_samples"].gt_sem_seg.shape == item["inputs"].shape[1:] for item in (train[0], train[2]))
    val = DATASETS.build(cfg.val_dataloader.dataset)
    assert val[0]["inputs"].shape == (3, 300, 600)  # longer ones of 600 at most
    assert val[0]["data_samples"].gt_sem_seg.shape == (50, 100)  # judged at its own size
    assert iterate(cfg).keys() == {"aAcc", "mIoU", "mAcc"}


def test_voc_without_the_additional_masks(voc):
    (voc[0] / "ImageSets" / "Segmentation" / "aug.txt").unlink()
    with pytest.raises(UserError, match=r"datasets\[1\]: there is no annotation file .*aug.txt; set DK_VOC2012_ROOT"):
        check_data(Config.fromfile(voc[1]), ("train",))


def test_cityscapes(cityscapes):
    cfg = load(cityscapes[1])
    item = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert item["inputs"].shape == (3, 1024, 2048)
    assert set(item["data_samples"].gt_sem_seg.data.unique().tolist()) == {*range(19), 255}
    for mode in ("train", "val"):
        cfg[f"{mode}_dataloader"].dataset.pipeline[1 if mode == "val" else 2].scale = (256, 128)
    assert iterate(cfg).keys() == {"aAcc", "mIoU", "mAcc"}


def test_missing_data_is_said(tmp_path, monkeypatch):
    for variable, stem, advice in (
        ("DK_VOC2012_ROOT", "dcnv1/deeplab_r101_dc5_30k_voc12aug", "set DK_VOC2012_ROOT to"),
        ("DK_CITYSCAPES_ROOT", "dcnv1/deeplab_r101_dc5_45k_cityscapes", "set DK_CITYSCAPES_ROOT to"),
        ("DK_DEFORMED_SHAPES_SEG_ROOT", "deformed_shapes/deeplab_r18_dc5_1k_deformed-shapes", "--task segmentation"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / "gone"))
        with pytest.raises(UserError, match=r"there is no folder .*gone") as error:
            check_data(Config.fromfile(ROOT / f"{stem}.py"), ("train",))
        assert advice in str(error.value)


def test_deformed_shapes(tmp_path, monkeypatch):
    deformed_shapes.make_segmentation(tmp_path, num_train=4, num_val=2)
    monkeypatch.setenv("DK_DEFORMED_SHAPES_SEG_ROOT", str(tmp_path))
    cfg = load(ROOT / "deformed_shapes" / "deeplab_r18-mdconv-c3-c5_dc5_1k_deformed-shapes.py")
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == ("background", *deformed_shapes.CLASSES)
    # Image and map are flipped alike, and every way occurs.
    data = DATASETS.build(cfg.train_dataloader.dataset)
    plain = (
        np.array(Image.open(tmp_path / "train" / "000001.png")),
        np.array(Image.open(tmp_path / "labels" / "train" / "000001.png")),
    )
    np.random.seed(0)  # noqa: NPY002 (what mmcv draws from)
    seen = set()
    for _ in range(40):
        item = data[0]
        image, found = item["inputs"].numpy().transpose(1, 2, 0)[..., ::-1], item["data_samples"].gt_sem_seg.data[0]
        for ways in itertools.product((1, -1), repeat=2):
            flipped = [value[:: ways[0], :: ways[1]] for value in plain]
            if np.array_equal(flipped[0], image):
                np.testing.assert_array_equal(found, flipped[1])
                seen.add(ways)
    assert len(seen) == 4
    assert iterate(cfg).keys() == {"aAcc", "mIoU", "mAcc"}
