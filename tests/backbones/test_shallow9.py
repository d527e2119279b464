"""The network of Section 7 of Differentiable Kernel Evolution."""

import pytest
import torch
from torch import nn

from dk_detection import to_deformable
from dk_detection.backbones import Shallow9
from dk_detection.layers import KernelEvolutionConv2d


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_features(size):
    net = Shallow9(branches=3, width=4)
    assert (net.out_channels, net.out_strides) == ((32,) * 3, (8,) * 3)
    maps = net(torch.rand(2, 3, *size))
    assert [tuple(x.shape) for x in maps] == [(2, 32, *(-(-side // 8) for side in size))] * 3


def test_receptive_field_and_depth_are_the_papers():
    net = Shallow9(width=1)
    for conv in filter(lambda m: isinstance(m, nn.Conv2d), net.modules()):
        nn.init.constant_(conv.weight, 1.0)
    image = torch.ones(1, 3, 200, 200, requires_grad=True)
    # Where all values are alike the first of a window is its maximum: a slope makes it the last, another time.
    touched = torch.zeros(200, 200, dtype=torch.bool)
    for sign in (1, -1):
        slope = sign * 1e-3 * torch.arange(200.0)
        maps = net.eval()(image + slope + slope[:, None])
        (gradient,) = torch.autograd.grad(maps[0][0, :, 12, 12].sum(), image)
        touched |= gradient[0].ne(0).any(0)
    rows = touched.any(1).nonzero()
    assert rows[-1] - rows[0] + 1 == 78
    depth = sum(isinstance(m, nn.Conv2d) for part in (net.shared, net.branches[0]) for m in part.modules())
    assert depth == 9


def test_branches_evolve_apart():
    net = Shallow9(width=2)
    assert len(to_deformable(net, "dke", select="branches.*")) == 6
    layers = [m for m in net.branches.modules() if isinstance(m, KernelEvolutionConv2d)]
    assert len(layers) == 6
    assert not any(isinstance(m, KernelEvolutionConv2d) for m in net.shared.modules())
    small, _ = net(torch.rand(2, 3, 48, 48))
    (small * torch.rand_like(small)).sum().backward()
    moved = [layer.tap_offset.grad is not None for layer in layers]
    assert moved == [True] * 3 + [False] * 3


@pytest.mark.parametrize("options", [dict(branches=0), dict(width=0)])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"Shallow9: {next(iter(options))} must be at least 1, got 0"):
        Shallow9(**options)
