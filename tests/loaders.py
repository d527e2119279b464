"""Ways to load a state dict into a network."""

import pytest


def load_with_torch(module, state_dict, strict):
    module.load_state_dict(state_dict, strict=strict)


def load_with_mmengine(module, state_dict, strict):
    checkpoint = pytest.importorskip("mmengine.runner.checkpoint", reason="MMEngine is not installed")
    checkpoint.load_state_dict(module, state_dict, strict=strict)


loaders = pytest.mark.parametrize("load", [load_with_torch, load_with_mmengine])
