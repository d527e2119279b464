"""Receptive fields and saliency regions in closed form."""

import math

import pytest
import torch
from torch import nn

from dk_detection import to_deformable
from dk_detection.errors import UserError
from dk_detection.layers import DeformConv2d
from dk_detection.visualization import (
    effective_receptive_field,
    node_response,
    observe,
    saliency_region,
    sampling_locations,
)


def test_the_receptive_field_of_stacked_box_filters_is_the_binomial():
    layers = 6
    network = nn.Sequential(*[nn.Conv2d(1, 1, 2, bias=False) for _ in range(layers)]).eval()
    for conv in network:
        nn.init.ones_(conv.weight)
    image = torch.rand(1, 1, 11, 12)
    field = effective_receptive_field(node_response(network, str(layers - 1), (2, 3)), image)
    binomial = torch.tensor([float(math.comb(layers, i)) for i in range(layers + 1)])
    expected = torch.zeros(11, 12)
    expected[2 : 2 + layers + 1, 3 : 3 + layers + 1] = binomial[:, None] * binomial
    assert torch.equal(field, expected)


def test_the_receptive_field_follows_the_offsets():
    network = nn.Sequential(DeformConv2d(3, 2, 1)).eval()
    with torch.no_grad():
        network[0].conv_offset.bias.copy_(torch.tensor([2.0, -1.0]))
    field = effective_receptive_field(node_response(network, "0", (3, 4)), torch.rand(1, 3, 8, 9))
    # The offset's own gradient is zero: the branch is a constant.
    assert field.nonzero().tolist() == [[5, 3]]
    assert field[5, 3].item() == pytest.approx(network[0].weight.sum(0).abs().sum().item())


class Rectangle(nn.Module):
    """Looks at one rectangle and nothing else."""

    def __init__(self, top, left, bottom, right):
        super().__init__()
        self.top, self.left, self.bottom, self.right = top, left, bottom, right

    def forward(self, image):
        return image[:, :, self.top : self.bottom, self.left : self.right].flatten(1) ** 2


@pytest.mark.parametrize(("cell", "box"), [(1, (3, 5, 6, 10)), (4, (4, 8, 12, 12)), (4, (12, 8, 15, 17))])
def test_the_saliency_region_of_a_network_that_looks_at_a_rectangle_is_that_rectangle(cell, box):
    torch.manual_seed(0)
    image = torch.rand(1, 2, 15, 17)
    network = Rectangle(*box).eval()
    region = saliency_region(lambda data: network(data), image, bound=1e-4, cell=cell, max_evaluations=2000)
    expected = torch.zeros(15, 17, dtype=torch.bool)
    expected[box[0] : box[2], box[1] : box[3]] = True
    assert torch.equal(region.mask, expected)
    assert region.error == 0


def test_the_region_keeps_the_bound_also_when_the_search_ends_early():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5)).eval()
    image = torch.rand(1, 2, 24, 24)
    response = node_response(network, "2", (8, 8))
    steps = []
    long, short = (
        saliency_region(response, image, bound=0.2, cell=2, max_evaluations=most, progress=lambda *a: steps.append(a))
        for most in (1000, 12)
    )
    assert short.evaluations == 12 and (long.is_minimal, short.is_minimal) == (True, False)
    assert long.mask.sum() < short.mask.sum() < 24 * 24
    for region in (long, short):
        mean = image.mean((2, 3), keepdim=True)
        change = response(torch.where(region.mask, image, mean)) - response(image)
        assert (change.norm() / response(image).norm()).item() == pytest.approx(region.error, abs=1e-5)
        assert region.error <= 0.2
    assert steps[-1] == (11, 12)


def test_a_larger_bound_gives_a_smaller_region():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 9), nn.ReLU()).eval()
    image = torch.rand(1, 2, 16, 16)
    sizes = [
        saliency_region(node_response(network, "0", (3, 3)), image, bound=bound, cell=1).mask.sum()
        for bound in (0.003, 0.02, 0.1)
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda image: effective_receptive_field(lambda data: torch.ones(3), image), "does not depend on the image"),
        (lambda image: saliency_region(lambda data: torch.ones(3), image), "does not depend on the image"),
        (lambda image: saliency_region(lambda data: (data - 9).relu(), image), "the response is zero"),
        (lambda image: node_response(nn.Conv2d(2, 2, 1), "", (0, 0)), "training mode"),
        (lambda image: node_response(nn.Conv2d(2, 2, 1).eval(), "x", (0, 0)), "no module 'x'"),
    ],
)
def test_wrong_input(act, message):
    with pytest.raises(UserError, match=message):
        act(torch.rand(1, 2, 8, 9))


def test_a_flat_response_has_an_empty_field():
    field = effective_receptive_field(lambda data: (data - 9).relu(), torch.rand(1, 2, 8, 9))
    assert field.shape == (8, 9)
    assert not field.any()


def test_a_plain_classifier():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    assert to_deformable(network, "mdconv", select="layer4.*.conv2") == ["layer4.0.conv2", "layer4.1.conv2"]
    image = torch.rand(1, 3, 64, 96)
    seen = observe(network, image, "layer4")
    found = sampling_locations(seen, seen.node_at((50, 30)))
    assert found.layers == ["layer4.1.conv2", "layer4.0.conv2"]
    assert len(found.points) == 81
    assert torch.allclose(found.points.mean(0), torch.tensor(found.center, dtype=torch.float64))
    by_node = effective_receptive_field(node_response(network, "layer4", found.node), image)
    by_class = effective_receptive_field(lambda data: network(data)[0, 3], image)
    assert by_node.shape == by_class.shape == (64, 96)
    assert by_class.min() > 0
