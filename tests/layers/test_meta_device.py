"""On the meta device layers compute shapes only, at no cost: that is how large networks are counted."""

import pytest
import torch

from dk_detection.layers.table import TABLE


def rows(kind):
    return pytest.mark.parametrize("row", [r for r in TABLE if r.kind == kind], ids=lambda row: row.token)


@rows("conv")
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolutions(row, kernel_size):
    with torch.device("meta"):
        layer = row.layer(4, 6, kernel_size, stride=2, padding=kernel_size // 2)
        output = layer(torch.empty(2, 4, 5, 7))
        output.sum().backward()
    assert output.shape == (2, 6, 3, 4)
    assert all(p.is_meta and p.grad.shape == p.shape for p in layer.parameters())


@rows("roi")
def test_pooling(row):
    inputs = dict(in_channels=5) if row.token in ("dpspool", "rfcnpool") else {}
    with torch.device("meta"):
        layer = row.layer(3, output_channels=5, **inputs)
        output = layer(torch.empty(2, 5, 9, 7), torch.empty(4, 5))
    assert output.shape == (4, 5, 3, 3)
