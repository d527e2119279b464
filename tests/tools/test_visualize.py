"""tools/visualize.py in both frameworks: pictures, numbers, and what it says of bad input."""

import importlib.util
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dk_detection.datasets import deformed_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
STEM = "deformed_shapes/mask-rcnn_r18{}_fpn_1k_deformed-shapes.py"
MAIN = "deformed_shapes/mask-rcnn_r18-dkmdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py"
LAYER = {"mmdet": "backbone.layer2.1.conv2", "detectron2": "backbone.bottom_up.res3.1.conv2"}
PLACE = ("--point", "40", "52.5")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("visualize", ROOT / "tools" / "visualize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=1, num_val=4, num_test=1)
    return root


@pytest.fixture(params=["mmdet", "detectron2"])
def framework(request, data, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setenv("DK_DEFORMED_SHAPES_ROOT", str(data))
    return request.param


@pytest.fixture
def draw(tool, tmp_path, capsys):
    """Runs the tool; gives the picture and the numbers."""

    def run(kind, *arguments):
        out = tmp_path / f"{kind}.png"
        code = tool.main([kind, *map(str, arguments), "--out", str(out)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        assert str(out) in printed.out
        return matplotlib.image.imread(out), json.loads(out.with_suffix(".json").read_text())["numbers"]

    return run


@pytest.fixture
def refused(tool, capsys):
    """Runs the tool, which fails; gives its one line."""

    def run(*arguments):
        try:
            code = tool.main([*map(str, arguments)])
        except SystemExit as error:
            code = error.code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visualize.py")]
        assert code and len(lines) == 1
        return lines[0]

    return run


def image(data):
    return data / "val" / "000001.png"


def in_color(picture):
    """How much of a picture is neither black, grey nor white."""
    return (picture[..., :3].max(2) - picture[..., :3].min(2) > 0.15).mean()


def test_checkpoints_beside_one_another(draw, data, framework):
    configs = [CONFIGS / framework / STEM.format(name) for name in ("", "-mdconv-c3-c5")]
    layer = LAYER[framework]
    options = ("--config", *configs, "--image", image(data), *PLACE, "--point", "90", "20", "--layer", layer)
    picture, numbers = draw("sampling", *options, "--levels", "2")
    assert list(numbers) == ["r18", "r18-mdconv-c3-c5"]
    rigid, resting = (numbers[title][0]["locations"] for title in numbers)
    # At rest both look at the same places, and each modulation is one half.
    assert [each[:2] for each in rigid] == [each[:2] for each in resting]
    assert {each[2] for each in rigid} == {1.0}
    assert {each[2] for each in resting} == {0.25}
    x, y = numbers["r18"][0]["center"]
    assert abs(x - 40) <= 4 and abs(y - 52.5) <= 4
    assert sorted({each[0] - x for each in rigid}) == [-16, -8, 0, 8, 16]
    # Two checkpoints by two places; there are red locations in each.
    height, width = (side // 2 for side in picture.shape[:2])
    for quarter in (
        picture[:height, :width],
        picture[:height, width:],
        picture[height:, :width],
        picture[height:, width:],
    ):
        red, green, blue = quarter[..., 0], quarter[..., 1], quarter[..., 2]
        assert ((red > 0.7) & (green < 0.4) & (blue < 0.4)).sum() > 50


@pytest.mark.parametrize("kind", ["receptive-field", "saliency"])
@pytest.mark.parametrize("place", [PLACE, ("--box", "20", "30", "80", "100")], ids=["point", "box"])
def test_what_sways_a_response(draw, data, framework, kind, place):
    config = CONFIGS / framework / STEM.format("")
    options = ("--layer", LAYER[framework], "--seconds", "0.1", "--cell", "4")  # too many to be tried
    picture, numbers = draw(kind, "--config", config, "--image", image(data), *place, *options)
    ((entry,),) = numbers.values()
    assert ("box" in entry) == (place is not PLACE)
    if kind == "saliency":
        assert 0 <= entry["share"] <= 1
        assert entry["error"] <= 0.1
        assert entry["evaluations"] >= 9  # the whole image and eight trials, however slow the machine is
        assert entry["ended_early"]
    else:
        assert 0 < entry["radius"] < 128
    assert picture[..., :3].std() > 0.1  # not blank


def test_shapes(draw, framework, tmp_path):
    config = CONFIGS / framework / "deformed_shapes" / "mask-rcnn_r18-dke-c3-c5_fpn_1k_deformed-shapes.py"
    network = importlib.import_module(f"dk_detection.{framework}.visualize").load_detector(str(config)).network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("tap_offset"):
                parameter.normal_(0, 0.5)
    checkpoint = tmp_path / "moved.pth"
    torch.save({"state_dict" if framework == "mmdet" else "model": network.state_dict()}, checkpoint)
    options = ("--config", config, "--checkpoint", checkpoint)
    picture, numbers = draw("shapes", *options)
    (layers,) = numbers.values()
    assert len(layers) == 12 and LAYER[framework] in layers
    for entry in layers.values():
        assert entry["moved"] == pytest.approx(0.5 * 2**0.5, rel=0.1)
        assert np.shape(entry["mean"]) == np.shape(entry["std"]) == (9, 2)
    assert picture[..., :3].std() > 0.05  # not blank
    (layers,) = draw("shapes", *options, "--layer", LAYER[framework])[1].values()
    assert list(layers) == [LAYER[framework]]


def test_the_whole_of_the_main_config(draw, data, framework, tmp_path):
    """Bins, kernels, offsets, dilation, dynamics and the sheet, of a network whose branches have moved."""
    config = CONFIGS / framework / MAIN
    visualize = importlib.import_module(f"dk_detection.{framework}.visualize")
    network = visualize.load_detector(str(config)).network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ("conv_offset" in name or "kernel_offset" in name or "offset_fc.2" in name) and name.endswith("weight"):
                parameter.normal_(0, 0.1)
    checkpoint = tmp_path / "moved.pth"
    torch.save({"state_dict" if framework == "mmdet" else "model": network.state_dict()}, checkpoint)
    options = ("--config", config, "--checkpoint", checkpoint, "--layer", LAYER[framework])
    one = (*options, "--image", image(data))
    coco = (*options, "--annotations", data / "annotations" / "instances_val.json", "--images", data / "val")

    _, numbers = draw("bins", *one, "--box", "20", "30", "80", "100", "--strength")
    ((entry,),) = numbers.values()
    assert len(entry["bins"]) == len(entry["weights"]) == 49
    assert entry["moved"] > 0
    _, numbers = draw("kernel", *one)
    ((entry),) = numbers.values()
    assert entry["scope"] == [4, 4]
    assert len(entry["mean"]) == 9
    assert min(map(max, entry["std"])) > 0
    _, numbers = draw("offsets", *one)
    ((entry),) = numbers.values()
    assert len(entry["rms"]) == 9
    assert min(entry["rms"]) > 0

    picture, numbers = draw("dilation", *coco, "--areas", "equal")
    (table,) = numbers["tables"].values()
    assert list(table) == [
        LAYER[framework].replace("1.conv2", name) for name in ("1.conv2", "1.conv1", "0.conv2", "0.conv1")
    ]
    assert table[LAYER[framework]].keys() == {"small", "medium", "large", "background"}
    assert in_color(picture) > 0.02
    pytest.importorskip("sklearn")
    _, numbers = draw("dynamics", *coco)
    ((entry),) = numbers.values()
    assert entry["dimensions"] == 18
    assert 0 <= entry["class_accuracy"] <= 1
    picture, numbers = draw("sheet", *coco, "--levels", "1")
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (entry["box"] for entry in numbers)]
    assert areas == sorted(areas)
    assert in_color(picture) > 0.1


def test_predictions(draw, data, framework):
    config = CONFIGS / framework / STEM.format("")
    override = (
        "model.test_cfg.rcnn.score_thr=0.0"
        if framework == "mmdet"
        else ("model.roi_heads.box_predictor.test_score_thresh=0.0")
    )
    picture, numbers = draw(
        "predictions", "--config", config, "--image", image(data), "--score", "0", "--cfg-options", override
    )
    (found,) = numbers.values()
    assert found
    assert {"label", "score", "box"} == found[0].keys()
    assert in_color(picture) > 0.05


def test_real_images(draw, tiny_coco, framework):
    config = CONFIGS / framework / STEM.format("-mdconv-c3-c5")
    photo = sorted((tiny_coco / "val2017").glob("*.jpg"))[0]
    _, numbers = draw("sampling", "--config", config, "--image", photo, "--point", "200.5", "100")
    ((entry,),) = numbers.values()
    assert len(entry["locations"]) == 729
    # A node every 32 pixels of what the network sees, which is the photo made smaller.
    height, width = matplotlib.image.imread(photo).shape[:2]
    step = 32 * max(height, width) / 128
    assert abs(entry["center"][0] - 200.5) <= step / 2 + 1
    assert abs(entry["center"][1] - 100) <= step / 2 + 1


def test_bad_input(refused, data, framework, tmp_path):
    rigid, deformable = (CONFIGS / framework / STEM.format(name) for name in ("", "-mdconv-c3-c5"))
    one = ("--config", rigid, "--image", image(data))
    visualize = importlib.import_module(f"dk_detection.{framework}.visualize")
    other = tmp_path / "other.pth"
    state = visualize.load_detector(str(CONFIGS / framework / MAIN)).network.state_dict()
    torch.save({"state_dict" if framework == "mmdet" else "model": state}, other)
    broken = tmp_path / "broken.png"
    broken.write_text("no image")

    assert "(300, 4) is outside of the image of 128 x 128" in refused("sampling", *one, "--point", "300", "4")
    assert "has no area" in refused("saliency", *one, "--box", "30", "30", "10", "40")
    assert "nothing is found with a score of at least 0.99" in refused("sampling", *one, "--score", "0.99")
    assert "no module 'backbone.x'" in refused("sampling", *one, *PLACE, "--layer", "backbone.x")
    assert "no layer that makes kernel_offset" in refused("kernel", *one)
    assert "no layer that makes offset" in refused("offsets", *one)
    assert "does not fit the model of this config" in refused("sampling", *one, *PLACE, "--checkpoint", other)
    assert "there is no such checkpoint" in refused("sampling", *one, "--checkpoint", "absent.pth")
    assert "broken.png: the image cannot be read" in refused("sampling", "--config", rigid, "--image", broken, *PLACE)
    assert "absent.png" in refused("sampling", "--config", rigid, "--image", "absent.png", *PLACE)
    assert "--image FILE" in refused("sampling", "--config", rigid)
    assert "--annotations FILE" in refused("dilation", "--config", rigid)
    assert "no COCO annotations" in refused("dynamics", "--config", rigid, "--annotations", rigid, "--images", data)
    resting = ("--annotations", data / "annotations" / "instances_val.json", "--images", data / "val")
    assert "learned nothing" in refused("dynamics", "--config", deformable, *resting)
    assert "deforms its sampling" in refused("dilation", "--config", rigid, *resting)


def test_the_command_line_itself(refused, tool):
    assert "invalid choice: 'all'" in refused("all", "--config", "a.py")
    assert "2 configs need as many checkpoints, got 3" in refused(
        "sampling", "--config", "a.py", "b.py", "--checkpoint", "1", "2", "3"
    )
    assert "1 checkpoints need as many titles, got 2" in refused("sampling", "--config", "a.py", "--title", "a", "b")
    assert "write FILE.png" in refused("sampling", "--config", "a.py", "--out", "a.jpg")
    assert "must be an integer of at least 1" in refused("sampling", "--config", "a.py", "--levels", "0")
    assert "write LOW,HIGH or equal" in refused("dilation", "--config", "a.py", "--areas", "1")
    assert "must be positive and rise" in refused("dilation", "--config", "a.py", "--areas", "5,4")
    assert "there is no such config file" in refused("sampling", "--config", "a.py")
    assert tool.titles(["x/a_r18_fpn.py", "y/a_r18-dk_fpn_mimic.py"], []) == ["r18", "r18-dk mimic"]
    assert tool.titles(["a_b.py"] * 2, ["x/1.pth", "x/2.pth"]) == ["1: 1.pth", "2: 2.pth"]
    from dk_detection.visualization.kinds import KINDS

    assert list(tool.KINDS) == list(KINDS)
