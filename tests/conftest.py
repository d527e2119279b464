"""What all tests share: fixed seeds, the skip of tests that need a GPU, the optional real images."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dk_detection import _extension

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = "no CUDA device is available"
    elif not _extension.built_with_cuda():
        reason = "the extension was built without CUDA"
    else:
        return
    for item in items:
        if item.get_closest_marker("cuda"):  # not `keywords`: they hold the names of all folders, too
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    """Each test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the transforms of MMDetection draw from it)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """A folder of a few real COCO images: train2017/, val2017/, annotations/. DK_TINY_COCO says where it lies."""
    path = Path(os.environ.get("DK_TINY_COCO", ROOT.parent / "shared" / "data" / "tiny_coco"))
    if not path.is_dir():
        pytest.skip(f"the optional COCO images are not at {path} (set DK_TINY_COCO)")
    return path
