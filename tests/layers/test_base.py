"""The bases serve any layer: here one whose weight is larger than the rigid one, as a kernel scope is."""

import pytest
import torch
from torch import nn

from dk_detection import to_deformable
from dk_detection.layers._base import RigidAtRest, ZeroConv2d
from dk_detection.layers._lifted import Lifted


class ShiftedConv2d(Lifted, nn.Conv2d):
    """Cuts its kernel out of a weight one cell higher and wider, at a place that its branch moves."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._lift()
        self.shift = ZeroConv2d(self.in_channels, 1, self.kernel_size, self.stride, self.padding, self.dilation)

    def _make_basis(self):
        return None

    def lift_weight(self, rigid_weight):
        return nn.functional.pad(rigid_weight, (0, 1, 0, 1), value=5)

    def forward(self, input):
        shift = self.shift(input)
        at_rest, moved = self.weight[..., :-1, :-1], self.weight[..., 1:, 1:]
        return (1 - shift) * self._conv_forward(input, at_rest, self.bias) + shift * self._conv_forward(
            input, moved, self.bias
        )


@pytest.fixture
def rigid():
    return nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), nn.ReLU())


def test_from_rigid_and_to_deformable(rigid):
    x = torch.randn(2, 4, 9, 8)
    before, conv = rigid(x), rigid[0]
    assert to_deformable(rigid, ShiftedConv2d, select="0") == ["0"]
    assert rigid[0].weight.shape == (6, 2, 4, 3)
    assert torch.equal(rigid[0].weight[..., :-1, :-1], conv.weight)
    torch.testing.assert_close(rigid(x), before, rtol=1e-6, atol=1e-6)


def test_rigid_checkpoint(rigid):
    net = nn.Sequential(ShiftedConv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), nn.ReLU())
    nn.init.normal_(net[0].shift.weight)
    net.load_state_dict(rigid.state_dict())
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(net(x), rigid(x), rtol=1e-6, atol=1e-6)
    assert net[0].shift.weight.eq(0).all()


def test_own_checkpoint():
    layer, twin = (ShiftedConv2d(4, 6, (3, 2)) for _ in range(2))
    nn.init.normal_(layer.shift.weight)
    twin.load_state_dict(layer.state_dict())
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in layer.state_dict().items())


def test_weight_of_another_shape_is_not_lifted():
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: copying a param with shape torch.Size\(\[6, 4, 3"
    ):
        ShiftedConv2d(4, 6, (3, 2)).load_state_dict(nn.Conv2d(4, 6, 3).state_dict())


class GatedConv2d(RigidAtRest, nn.Conv2d):
    """A branch of two layers, and a parameter of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Sequential(nn.Conv2d(self.in_channels, 3, 1), nn.ReLU(), ZeroConv2d(3, 1, 1))
        self.strength = nn.Parameter(torch.ones(1))

    def forward(self, input):
        return super().forward(input) * (1 + self.strength * self.gate(input).mean((-2, -1), keepdim=True))


def test_deep_branches_and_further_parameters():
    conv = nn.Conv2d(4, 6, 3)
    layer = GatedConv2d.from_rigid(conv)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden, strength = layer.gate[0].weight.clone(), layer.strength.clone()
    layer.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(layer(x), conv(x))
    assert torch.equal(layer.gate[0].weight, hidden)
    assert torch.equal(layer.strength, strength)

    nn.init.normal_(layer.gate[2].weight)
    twin = GatedConv2d(4, 6, 3)
    twin.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(twin(x), layer(x))
    layer.reset_parameters()
    assert all(parameter.eq(0).all() for parameter in layer.gate[2].parameters())
    with pytest.raises(NotImplementedError, match="GatedConv2d steers none of our operators"):
        layer.sampling(x)
