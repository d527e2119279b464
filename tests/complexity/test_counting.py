"""What is counted of a network, and how it is laid out."""

import torch
from torch import nn

from dk_detection.complexity.counting import (
    Part,
    count_network,
    format_parts,
    format_table,
    multiply_adds,
    parameters,
    total,
)
from dk_detection.layers import ModulatedDeformConv2d


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = ModulatedDeformConv2d(4, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, image):
        return self.head(self.body(self.stem(image)).mean((2, 3)))


def test_network():
    # Maps of 4 x 5; the branch has 27 channels; a value of the map costs 2 to sample and 1 to modulate.
    expected = [
        Part("stem", 4 * 27 + 8, 20 * 4 * 27),
        Part("body", 6 * 36 + 27 * 36 + 27, 20 * (27 * 36 + 6 * 36 + 36 * 3)),
        Part("head", 35, 30),
    ]
    net = Net()
    assert count_network(net, (7, 10)) == expected
    assert not net.training
    assert count_network(net.to("meta"), (7, 10)) == expected
    assert total(expected) == Part("total", 116 + 1215 + 35, sum(part.multiply_adds for part in expected))


def test_shared_parameters_count_once():
    net = Net()
    assert parameters(net.head, None, net, net.head) == sum(p.numel() for p in net.parameters())


def test_multiply_adds_of_anything():
    assert multiply_adds(lambda: torch.rand(2, 3) @ torch.rand(3, 4)) == 24


def test_layout():
    text = format_parts([Part("backbone", 23_456_789, 78_000_000_000), Part("head", 500_000, 1_234_000_000)])
    assert text.splitlines() == [
        "| part     | #P (M) | GFLOPs |",
        "|----------|-------:|-------:|",
        "| backbone |  23.46 |  78.00 |",
        "| head     |   0.50 |   1.23 |",
        "| total    |  23.96 |  79.23 |",
    ]
    assert format_table(("a", "step"), [("x", ""), ("y", "+0.5")]).splitlines()[2:] == [
        "| x   |      |",
        "| y   | +0.5 |",
    ]
