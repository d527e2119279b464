"""Every convolution layer as a module of torch: without a batch, in forward mode, under torch.func and torch.fx."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from dk_detection import to_deformable
from dk_detection.layers._base import ZeroConv2d
from dk_detection.layers.table import TABLE

rows = pytest.mark.parametrize("row", [row for row in TABLE if row.kind == "conv"], ids=lambda row: row.token)


def make(row, kernel_size=3):
    layer = row.layer(4, 6, kernel_size, padding=1, stride=(1, 2), dtype=torch.float64)
    for branch in layer.modules():
        if isinstance(branch, ZeroConv2d):
            nn.init.normal_(branch.weight, std=0.1)
            nn.init.normal_(branch.bias, std=0.1)
    return layer


def images():
    return torch.randn(2, 4, 7, 8, dtype=torch.float64)


@rows
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_an_image_without_a_batch(row, kernel_size):
    layer, x = make(row, kernel_size), images()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@rows
def test_forward_mode(row):
    layer, x = make(row), images()
    direction, step = torch.randn_like(x), 1e-6
    output, tangent = jvp(layer, (x,), (direction,))
    assert torch.equal(output, layer(x))
    expected = (layer(x + step * direction) - layer(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


@rows
def test_torch_func(row):
    layer, x = make(row), images()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    loss(parameters, x).backward()
    together = grad(loss)(parameters, x)
    by_image = vmap(grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    for name, parameter in parameters.items():
        torch.testing.assert_close(together[name], parameter.grad)
        torch.testing.assert_close(by_image[name].sum(0), parameter.grad)


@rows
def test_second_derivatives(row):
    layer, x = make(row), images().requires_grad_()
    torch.autograd.gradgradcheck(layer, x, fast_mode=True, nondet_tol=1e-12)


@rows
def test_torch_fx(row):
    layer, x = make(row), images()
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(x), layer(x))
    assert torch.equal(traced(x[:1]), layer(x[:1]))
    network = resnet18(weights=None).eval()
    to_deformable(network, row.token, select="layer2.*.conv2")
    x = torch.rand(1, 3, 32, 32)
    features = create_feature_extractor(network, {"layer2": "c3", "fc": "scores"})(x)
    assert features["c3"].shape == (1, 128, 4, 4)
    torch.testing.assert_close(features["scores"], network(x))
