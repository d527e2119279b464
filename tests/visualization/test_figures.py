"""Figures of how much a network deforms, of offsets that are known."""

import math

import pytest
import torch

from dk_detection.layers import LocalDeformKernel2d, ModulatedDeformConv2d
from dk_detection.visualization import SamplingFigures, listening


def figures_of(layer, *images):
    figures = SamplingFigures()
    for image in images:
        with torch.no_grad(), listening(torch.nn.Sequential(layer)) as calls:
            # What `listening` puts in the way of the method is called by the layer's forward.
            layer(image)
        figures.update(calls)
    return figures.figures()


def test_data_offsets_and_modulation():
    layer = ModulatedDeformConv2d(1, 1, 1)
    with torch.no_grad():
        layer.conv_offset.weight[:, 0, 0, 0] = torch.tensor([3.0, 0.0, 0.0])
        layer.conv_offset.bias[:] = torch.tensor([0.0, 4.0, math.log(3)])
    found = figures_of(layer, torch.ones(1, 1, 1, 2), -torch.ones(2, 1, 1, 1))  # dy is +3 twice and -3 twice, dx 4
    assert found == pytest.approx(
        {"offset": 5, "offset_varying": 3, "modulation": 0.75, "modulation_varying": 0}, abs=1e-6
    )


def test_kernel_offsets():
    layer = LocalDeformKernel2d(1, 1, 3, padding=1, scope_size=4)
    image = torch.rand(2, 1, 3, 3)
    at_rest = figures_of(layer, image)
    share = torch.tensor([0.5, 1, 1, 0.5]) / 3
    entropy = -2 * (share * share.log()).sum().item()
    assert at_rest == pytest.approx(
        {"kernel_offset": 0, "kernel_offset_varying": 0, "clipped": 0, "scope_used": math.exp(entropy) / 16}
    )
    with torch.no_grad():
        layer.kernel_offset.bias[0] = -1.0  # the row of the first tap, which rests at 0.5
    found = figures_of(layer, image)
    assert found["clipped"] == pytest.approx(1 / 9)
    assert found["kernel_offset"] == pytest.approx(1 / 3) and found["kernel_offset_varying"] == pytest.approx(0)
    with torch.no_grad():
        layer.kernel_offset.bias[:] = -9.0  # all taps are in the scope's first cell
    assert figures_of(layer, image)["scope_used"] == pytest.approx(1 / 16)


def test_rigid_network_has_none():
    assert figures_of(torch.nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)) == {}
