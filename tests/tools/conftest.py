"""Detections on a made-up data set, and the command lines that take them."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.made_up import detections, truth, without, write

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def content():
    return truth(8, np.random.default_rng(0))


@pytest.fixture(scope="module")
def results(content):
    return detections(content, np.random.default_rng(1))


@pytest.fixture
def files(tmp_path, content, results, monkeypatch):
    """The current folder: annotation files and results."""
    write(tmp_path / "instances_val.json", content)
    write(tmp_path / "image_info_test-dev.json", without([content], "annotations")[0])
    write(tmp_path / "results.json", results)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a command line, and returns its exit status and what it printed."""
    monkeypatch.syspath_prepend(TOOLS)

    def call(tool: str, *argv: str):
        module = importlib.import_module(tool)
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *argv])
        try:
            code = module.detections.run(module.main, list(argv))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call
