"""Every snippet of the documentation runs: Python and configs as they stand, commands as far as their options."""

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from dk_detection.datasets import deformed_shapes
from dk_detection.layers.table import TABLE
from tests.docs.pages import PAGES, ROOT, Snippet, snippets

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
LAYERS = tuple(row.layer for row in TABLE)
# Formulas, drawings, messages and citations: nothing that anybody would run.
PROSE = ("text", "bibtex")


def of_language(language: str):
    chosen = [snippet for snippet in SNIPPETS if snippet.language == language]
    if language == "python":  # those of this page are the parts of a layer, which tests/test_toy_layer.py puts together
        chosen = [snippet for snippet in chosen if snippet.page.name != "adding_an_operator.md"]
    return pytest.mark.parametrize("snippet", chosen, ids=str)


def test_every_snippet_is_of_a_language_that_is_tested():
    assert SNIPPETS
    others = [str(s) for s in SNIPPETS if s.language not in ("python", "yaml", "console", *PROSE)]
    assert not others, f"say ```python, yaml, console or text: {', '.join(others)}"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty folder as the current one, no network, and pretrained weights of torchvision that are random."""

    def refuse(*args, **kwargs):
        raise OSError("tests use no network")

    def random_weights(weights, *args, **kwargs):
        name = type(weights).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name, weights=None).state_dict()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", random_weights)


@pytest.fixture
def few_images(monkeypatch):
    """Drawn data sets are as they would be, but for the number of images."""
    for name, numbers in (
        ("make", dict(num_train=2, num_val=1, num_test=1)),
        ("make_classification", dict(num_train=6, num_val=6)),
        ("make_segmentation", dict(num_train=1, num_val=1)),
    ):
        make = getattr(deformed_shapes, name)
        monkeypatch.setattr(deformed_shapes, name, functools.partial(make, **numbers))


@of_language("python")
def test_python(snippet, few_images):
    if "detectron2" in snippet.text:
        pytest.importorskip("detectron2")
    if "torch.onnx" in snippet.text:
        pytest.importorskip("onnxscript")
    if "_base_" in snippet.text:
        check_config_of_mmengine(snippet)
        return
    assert "import " in snippet.text, "a config has a _base_, all else imports what it uses"
    made = {"__name__": "__main__"}
    exec(compile(snippet.text, str(snippet), "exec"), made)
    if "LazyCall" in snippet.text:
        check_lazy_config(made)


def check_config_of_mmengine(snippet: Snippet) -> None:
    """Builds the model and its optimiser; there is something of ours in it, and every learning rate has its use."""
    package = re.search(r'^_base_ = .*"(\w+)::', snippet.text)[1]
    pytest.importorskip("mmdet" if package == "dk_detection" else package)
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, DefaultScope

    import dk_detection.mmdet  # noqa: F401  (before the config is read, as our tools do)

    Path("config.py").write_text(snippet.text, encoding="utf-8")
    cfg = Config.fromfile("config.py")
    device = "cpu" if cfg.default_scope == "mmpretrain" else "meta"  # MMPretrain computes with tensors while it builds
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        model = MODELS.build(cfg.model)
    assert is_ours(model)
    if "optim_wrapper" in snippet.text:
        build_optim_wrapper(model, cfg.optim_wrapper)
        names = [name for name, _ in model.named_parameters()]
        for key in cfg.optim_wrapper.paramwise_cfg.custom_keys:
            assert any(key in name for name in names), key


def check_lazy_config(made: dict) -> None:
    """Builds what a LazyConfig says, of its optimiser the groups of parameters."""
    from detectron2.config import instantiate

    with torch.device("meta"):
        model = instantiate(made["model"])
    assert is_ours(model)
    if "optimizer" in made:
        made["optimizer"].params.model = model
        rates = {group["lr"] for group in instantiate(made["optimizer"]).param_groups}
        assert len(rates) > 1


def is_ours(model: torch.nn.Module) -> bool:
    return type(model).__name__.startswith("Dk") or any(isinstance(module, LAYERS) for module in model.modules())


@of_language("yaml")
def test_yaml(snippet):
    """Over Mask R-CNN of Detectron2's model zoo."""
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from dk_detection.detectron2 import add_dk_config

    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    Path("config.yaml").write_text(snippet.text, encoding="utf-8")
    cfg.merge_from_file("config.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert is_ours(model)


@of_language("console")
def test_commands(snippet, tmp_path):
    """Runs the lines in a shell that has no programs but some that write down how they were called."""
    called = calls(variables_before(snippet) + snippet.text, tmp_path)
    assert called
    for program, *arguments in called:
        PROGRAMS[program](arguments)


def variables_before(snippet: Snippet) -> str:
    """What the commands further up on the page set."""
    before = (s.text for s in SNIPPETS if s.page == snippet.page and s.line < snippet.line and s.language == "console")
    return "".join(re.findall(r"^(?:export )?\w+=.*\n", "".join(before), re.MULTILINE))


def calls(text: str, folder: Path) -> list[list[str]]:
    programs = folder / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        script = programs / name
        script.write_text(f"#!/bin/sh\nprintf '%s\\0' {name} \"$@\" '\n' >>{folder}/calls\n")
        script.chmod(0o755)
    text = text.replace(".venv/bin/", "")  # else the real ones run
    done = subprocess.run(
        ["/bin/bash", "-euc", f"cd() {{ :; }}\n{text}"],
        cwd=ROOT,
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    log = (folder / "calls").read_text(encoding="utf-8")
    return [call.split("\0")[:-1] for call in log.split("\n\0")[:-1]]


def check_files(arguments: list[str]) -> None:
    """What looks like a file of the project is one."""
    for argument in arguments:
        path = argument.rpartition("=")[2].partition("::")[0]
        if re.match(r"(benchmarks|configs|docs|tests|tools)/", path):
            assert (ROOT / path).exists(), path


def python(arguments: list[str]) -> None:
    check_files(arguments)
    command, rest = (arguments[:2], arguments[2:]) if arguments[0] == "-m" else (arguments[:1], arguments[1:])
    if command[0].startswith("detectron2/") or command == ["-m", "pytest"]:  # a checkout of Detectron2
        return
    if command[0] == "setup.py":
        assert rest == ["build_ext", "--inplace"]
        return
    check_options(command, rest)


def check_options(command: list[str], arguments: list[str]) -> None:
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(*command)))
    until = arguments.index("--") if "--" in arguments else len(arguments)
    options = {argument.partition("=")[0] for argument in arguments[:until] if re.match(r"--?[a-z]", argument)}
    assert options <= known, f"{' '.join(command)} has no {', '.join(options - known)}"


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(arguments: list[str]) -> None:
    while arguments[0].startswith("--"):
        assert arguments[0] == "--nproc-per-node"
        arguments = arguments[2:]
    python(arguments)


def make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for target in (argument for argument in arguments if "=" not in argument):
        assert re.search(rf"^{re.escape(target)}:.*  ## ", makefile, re.MULTILINE), f"make has no {target}"
    for name in variables:
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"make heeds no {name}"
    bench = f"benchmarks/bench_{variables.get('OP', 'deform_conv2d')}.py"
    check_files([bench, *variables.values()])
    if "bench" in arguments:
        check_options([bench], variables.get("ARGS", "").split())


def pip(arguments: list[str]) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    assert arguments[0] in ("install", "wheel")
    for wanted in re.findall(r"^\.\[([\w,]+)\]$", "\n".join(arguments), re.MULTILINE):
        for extra in wanted.split(","):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), f"there is no extra {extra}"


def dk_detection(arguments: list[str]) -> None:
    if arguments[0] != "configs":
        python([f"tools/{arguments[0]}.py", *arguments[1:]])


def no_check(arguments: list[str]) -> None:
    """A program of the system's."""


PROGRAMS = {
    "apt": no_check,
    "dk-detection": dk_detection,
    "ffmpeg": no_check,
    "git": no_check,
    "make": make,
    "pip": pip,
    "python": python,
    "torchrun": torchrun,
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python tools/train_net.py --confg X", "has no --confg"),
        ("python tools/no_such_tool.py", "tools/no_such_tool.py"),
        ("python tools/train_net.py --config configs/mmdet/dk/none.py", "none.py"),
        ("make trian", "make has no trian"),
        ("make bench SIZE=3", "make heeds no SIZE"),
        ('make bench ARGS="--fast"', "has no --fast"),
        ('pip install ".[mmdte]"', "no extra mmdte"),
        ("conda install torch", "conda"),
        ("python tools/train_net.py \\\n    --config A && make tset", "make has no tset"),
    ],
)
def test_commands_that_are_wrong_are_found(text, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        test_commands(Snippet(ROOT / "README.md", 1, "console", text), tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('model = dict(type="DkMimicRCNN")\n', AssertionError, "a config has a _base_"),
        ("import torch\ntorch.zeros(2, 3) @ weight\n", NameError, "weight"),
        ('import urllib.request\nurllib.request.urlopen("http://127.0.0.1:9/weights.pth")\n', OSError, "no network"),
        ('_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"\n', AssertionError, "is_ours"),
    ],
)
def test_python_that_is_wrong_is_found(text, error, message, few_images):
    with pytest.raises(error, match=message):
        test_python(Snippet(ROOT / "README.md", 1, "python", text), few_images)
