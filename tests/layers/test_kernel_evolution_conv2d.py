"""Layers that learn where their taps lie, once for all positions: KernelEvolutionConv2d and ActiveConv2d."""

import pytest
import torch
import torchvision
from torch import nn

from dk_detection import to_deformable
from dk_detection.layers import ActiveConv2d, KernelEvolutionConv2d
from dk_detection.ops import deform_conv2d, kernel_evolution_conv2d
from tests.networks import settled

both = pytest.mark.parametrize("layer_class", [KernelEvolutionConv2d, ActiveConv2d])
SHARP = {KernelEvolutionConv2d: {"alpha": 100.0}, ActiveConv2d: {}}
GEOMETRIES = {
    "same": (4, 6, 3, 1, 1),
    "strided": (4, 6, 3, 2, 1),
    "dilated": (4, 6, 3, 1, 2, 2),
    "grouped": (4, 6, (2, 3), (2, 1), (0, 2), 1, 2),
    "alexnet": (3, 6, 11, 4, 2),
    "pointwise": (4, 6, 1, 2),
    "unpadded": (4, 6, 3),
    "depthwise": (4, 4, 3, 1, 1, 1, 4),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def image(conv, size=(19, 17)):
    torch.manual_seed(1)
    return torch.randn(2, conv.in_channels, *size, dtype=torch.float64)


@both
@geometries
def test_sharp_and_at_rest_it_is_the_rigid_convolution(layer_class, geometry):
    conv = nn.Conv2d(*geometry, dtype=torch.float64)
    layer = layer_class.from_rigid(conv, **SHARP[layer_class])
    x = image(conv)
    torch.testing.assert_close(layer(x), conv(x))
    assert layer.tap_offset.eq(0).all()


# How much the output changes, relative to it, on noise and on maps whose neighbours correlate by 0.7.
@pytest.mark.parametrize(
    ("alpha", "on_noise", "on_maps"), [(1.0, 0.51, 0.26), (2.0, 0.185, 0.11), (4.0, 0.025, 0.017), (10.0, 1e-4, 5e-5)]
)
def test_how_closely_a_rigid_convolution_is_kept(alpha, on_noise, on_maps):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1, bias=False, dtype=torch.float64)
    layer = KernelEvolutionConv2d.from_rigid(conv, alpha=alpha)
    taken = KernelEvolutionConv2d.from_rigid(conv, alpha=alpha)
    taken.weight.data.copy_(conv.weight)
    noise = torch.randn(1, 16, 40, 40, dtype=torch.float64)
    distance = torch.arange(-6, 7).double()
    blur = 0.36 ** torch.sqrt(distance[:, None] ** 2 + distance**2)
    maps = nn.functional.conv2d(noise.transpose(0, 1), blur[None, None], padding=6).transpose(0, 1)
    for x, bound in ((noise, on_noise), (maps, on_maps)):
        expected = conv(x)[..., 3:-3, 3:-3]
        change, plain = ((each(x)[..., 3:-3, 3:-3] - expected).norm() / expected.norm() for each in (layer, taken))
        assert change < bound
        assert change < plain / 1.3


def test_the_lifted_weight_is_the_closest():
    # Any other is farther, measured as lift_weight says: on maps whose pixels correlate by 0.5 ** distance.
    conv = nn.Conv2d(1, 1, 3, dtype=torch.float64)
    layer = KernelEvolutionConv2d.from_rigid(conv)
    pixels = torch.cartesian_prod(*[torch.arange(7).double()] * 2)
    covariance = 0.5 ** torch.cdist(pixels, pixels)
    rigid = nn.functional.pad(conv.weight[0, 0], (2, 2, 2, 2)).flatten()

    def change(weight):
        unit = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
        unit[0, 0, 6, 6] = 1
        response = kernel_evolution_conv2d(unit, layer.location(), weight.flatten(2), padding=1, kernel_size=3)
        difference = response[0, 0, 3:-3, 3:-3].flip(0, 1).flatten() - rigid
        return difference @ covariance @ difference

    best = change(layer.weight)
    (slope,) = torch.autograd.grad(best, layer.weight)
    assert slope.norm() < 1e-8
    assert all(change(layer.weight + 0.1 * torch.randn_like(layer.weight)) > best for _ in range(5))


@geometries
def test_active_convolution_is_deformable_convolution_by_constant_offsets(geometry):
    layer = ActiveConv2d(*geometry, dtype=torch.float64)
    nn.init.normal_(layer.tap_offset)
    x = image(layer)
    output = layer(x)
    pixels = layer.tap_offset * torch.tensor(layer.dilation)
    offset = pixels.reshape(1, -1, 1, 1).expand(2, -1, *output.shape[2:]).contiguous()
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    torch.testing.assert_close(output, expected)
    assert torch.equal(layer.sampling(x)["offset"], offset)


@geometries
def test_what_the_operator_gets(geometry):
    layer = KernelEvolutionConv2d(*geometry, start="normal", radius=1.5, alpha=3.0, dtype=torch.float64)
    for parameter in layer.attention.parameters():
        nn.init.normal_(parameter)
    x = image(layer)
    middle_y, middle_x = (d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    # The score of an output position is that of the pixel in the middle of the rigid kernel, zero outside of the map.
    kernel = torch.zeros(layer.attention.out_channels, layer.in_channels, *(
        d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    ), dtype=torch.float64)  # fmt: skip
    kernel[:, :, middle_y, middle_x] = layer.attention.weight[:, :, 0, 0].detach()
    scores = 1 + nn.functional.conv2d(x, kernel, layer.attention.bias, layer.stride, layer.padding)
    torch.testing.assert_close(layer.sampling(x)["attention"], scores)
    expected = kernel_evolution_conv2d(
        x, layer.location(), layer.weight.flatten(2), layer.bias, layer.stride, layer.padding, layer.dilation,
        kernel_size=layer.kernel_size, attention=scores, radius=1.5, alpha=3.0,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected)


def test_start():
    torch.manual_seed(0)
    normal = KernelEvolutionConv2d(64, 8, 3, start="normal")
    location = normal.location()
    assert location.shape == (64, 9, 2)
    assert abs(location.mean()) < 0.1 and abs(location.std() - 1) < 0.1
    before = location.clone()
    normal.reset_parameters()
    assert not torch.equal(normal.location(), before)
    grid = KernelEvolutionConv2d(4, 8, (3, 2))
    assert grid.location()[1].tolist() == [[y, x] for y in (-1, 0, 1) for x in (-0.5, 0.5)]
    nn.init.normal_(grid.tap_offset)
    grid.reset_parameters()
    assert grid.tap_offset.eq(0).all()
    assert not hasattr(grid.attention, "normal") and grid.attention.weight.eq(0).all()
    conv = nn.Conv2d(4, 8, 3)
    assert torch.equal(KernelEvolutionConv2d.from_rigid(conv, start="normal").weight, conv.weight)


@both
@pytest.mark.parametrize("strict", [True, False])
def test_rigid_checkpoints_come_to_rest(layer_class, strict):
    conv, layer = nn.Conv2d(4, 6, 3, padding=1), layer_class(4, 6, 3, padding=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer.load_state_dict(conv.state_dict(), strict=strict)
    expected = layer_class.from_rigid(conv)
    for name, value in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    normal = KernelEvolutionConv2d(4, 6, 3, start="normal")
    drawn = normal.location().clone()
    normal.load_state_dict(conv.state_dict())
    assert torch.equal(normal.location(), drawn) and torch.equal(normal.weight, conv.weight)


@pytest.mark.parametrize("options", [{}, {"use_attention": False}])
def test_own_checkpoints_load_as_they_are(options):
    layer, twin = (KernelEvolutionConv2d(4, 6, 3, start="normal", **options) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    active, twin = (ActiveConv2d(4, 6, 3) for _ in range(2))
    nn.init.normal_(active.tap_offset)
    twin.load_state_dict(active.state_dict())
    assert torch.equal(twin.tap_offset, active.tap_offset)


@both
def test_every_parameter_learns(layer_class):
    layer = layer_class(4, 6, 3, padding=1)
    layer(torch.randn(2, 4, 7, 8)).square().sum().backward()
    assert all(parameter.grad.count_nonzero() > 0 for parameter in layer.parameters())
    frozen = layer_class.from_rigid(nn.Conv2d(4, 6, 3).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


NETWORKS = {
    "alexnet": ("features.*", 5),
    "resnet18": ("layer[234].*.conv[12]", 12),
    "resnet34": (lambda name, conv: conv.kernel_size == (3, 3), 32),
}


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_paper(layer_class, name):
    select, number = NETWORKS[name]
    net = torchvision.models.get_model(name, weights=None, num_classes=5)
    net = net.eval() if name == "alexnet" else settled(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert len(to_deformable(net, layer_class, select=select, **SHARP[layer_class])) == number
        after = net(x)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": "grill"}, ValueError, "start must be 'grid' or 'normal', got 'grill'"),
        ({"radius": 0.7}, ValueError, "radius must be at least the square root of 0.5"),
        ({"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"alpha": "2"}, TypeError, "alpha must be a number, got '2'"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode must be 'zeros'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"KernelEvolutionConv2d: {message}"):
        KernelEvolutionConv2d(4, 6, 3, **options)
