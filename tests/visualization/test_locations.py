"""Sampling locations in closed form: at rest, moved by constants, through strides, paddings, poolings and shortcuts."""

import itertools

import pytest
import torch
from torch import nn

from dk_detection.errors import UserError
from dk_detection.layers import (
    ActiveConv2d,
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIPool,
    KernelEvolutionConv2d,
    LocalDeformKernel2d,
    ModulatedDeformConv2d,
    ModulatedDeformKernelConv2d,
)
from dk_detection.ops import deform_psroi_pool, deform_roi_pool
from dk_detection.visualization import (
    bin_locations,
    default_layer,
    evaluation_mode,
    kernel_locations,
    learned_taps,
    listening,
    observe,
    offset_norms,
    sampling_locations,
)


def image(height=29, width=37, channels=2):
    return torch.rand(1, channels, height, width)


def as_set(points):
    return sorted((round(x, 4), round(y, 4)) for x, y in points.tolist())


def along(taps, dilation, padding):
    return [k * dilation - padding for k in range(taps)]


class Mixed(nn.Module):
    """Strides, dilations and paddings, pooling as module and as function, a rigid layer between deformable ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 7, stride=2, padding=3)
        self.low = DeformConv2d(4, 4, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.between = nn.Conv2d(4, 4, (3, 5), padding=(0, 2))
        self.high = ModulatedDeformConv2d(4, 3, (2, 3), padding=(0, 1))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        return self.norm(self.high(self.between(self.low(x).relu_()))).relu_()


def test_at_rest_the_locations_are_the_rigid_grid():
    network = Mixed().eval()
    seen = observe(network, image(61, 59), "high")
    assert [step.name for step in seen.path] == ["high", "convolution", "low", "max pooling", "convolution"]
    row, column = 2, 3
    found = sampling_locations(seen, (row, column), levels=2)

    def one_axis(index, high, between, low):
        places = [index + tap for tap in high]  # in the output of `between`
        places = [place + between for place in places]  # in the output of `low`
        stride, taps = low
        places = [place * stride + tap for place in places for tap in taps]
        return [place * 2 * 2 + 0.5 for place in places]  # middles of pooling and stem

    rows = one_axis(row, along(2, 1, 0), 1, (2, along(3, 1, 1)))
    columns = one_axis(column, along(3, 1, 1), 0, (1, along(3, 2, 2)))
    # The fans of both axes are crossed within a layer, not over layers: so are the products.
    assert as_set(found.points) == sorted((x, y) for x, y in itertools.product(columns, rows))
    assert found.layers == ["high", "low"]
    assert torch.allclose(found.weights, torch.full((54,), 0.5, dtype=torch.float64))  # modulation at rest


def test_a_constant_offset_of_one_pixel_moves_every_location_by_the_stride_below():
    network = Mixed().eval()
    before = sampling_locations(observe(network, image(61, 59), "high"), (2, 3), levels=2)
    with torch.no_grad():
        network.high.conv_offset.bias[: 2 * 6].view(6, 2).copy_(torch.tensor([1.0, -2.0]))  # dy, dx
    after = sampling_locations(observe(network, image(61, 59), "high"), (2, 3), levels=2)
    # one row of `high` is 2 * 2 * 2 pixels, as `low`, pooling and stem step by 2 downwards; a column is 1 * 2 * 2
    assert torch.allclose(after.points - before.points, torch.tensor([-8.0, 8.0], dtype=torch.float64))
    assert after.center == before.center


def test_offsets_are_interpolated_where_a_location_is_fractional():
    network = nn.Sequential(DeformConv2d(1, 1, 1), DeformConv2d(1, 1, 1)).eval()
    with torch.no_grad():
        network[0].conv_offset.weight[1] = 1  # dx is the image's value
        network[1].conv_offset.bias.copy_(torch.tensor([0.0, 0.25]))
    ramp = torch.arange(6.0).square().expand(1, 1, 5, 6)
    found = sampling_locations(observe(network, ramp, "1"), (2, 2))
    assert as_set(found.points) == [(2.25 + (0.75 * 4 + 0.25 * 9) + 0.5, 2.5)]


@pytest.mark.parametrize("layer", [DeformConv2d, ModulatedDeformConv2d, ModulatedDeformKernelConv2d])
def test_each_offset_group_has_its_own_locations(layer):
    network = nn.Sequential(layer(4, 2, 3, padding=1, offset_groups=2)).eval()
    with torch.no_grad():
        network[0].conv_offset.bias[18:36] = 3
    found = sampling_locations(observe(network, image(channels=4), "0"), (5, 6))
    grid = {(x + 0.5, y + 0.5) for x in (5, 6, 7) for y in (4, 5, 6)}
    assert set(as_set(found.points)) == grid | {(x + 3, y + 3) for x, y in grid}


class Block(nn.Module):
    """A residual block whose shortcut, too, has a convolution, run after the main path's as in MMDetection."""

    def __init__(self, conv):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 3, stride=2, padding=1), conv(2, 2, 3, padding=1)
        self.shortcut = nn.Conv2d(2, 2, 1, stride=2)

    def forward(self, x):
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


def test_in_a_residual_block_the_main_path_is_followed():
    network = nn.Sequential(Block(DeformConv2d), Block(DeformConv2d)).eval()
    seen = observe(network, image(), "1")
    assert [step.name for step in seen.path] == ["1.conv2", "convolution", "0.conv2", "convolution"]
    assert len(sampling_locations(seen, (3, 4)).points) == 81
    assert len(sampling_locations(seen, (3, 4), levels=1).points) == 9


def test_a_rigid_network_fans_out_in_its_own_convolutions():
    network = nn.Sequential(Block(nn.Conv2d), Block(nn.Conv2d)).eval()
    seen = observe(network, image(), "1")
    points = sampling_locations(seen, (3, 4), levels=1).points
    assert as_set(points) == sorted((x * 4 + 0.5, y * 4 + 0.5) for x in (3, 4, 5) for y in (2, 3, 4))
    kernels = nn.Sequential(LocalDeformKernel2d(2, 2, 3, padding=1)).eval()
    assert len(sampling_locations(observe(kernels, image(), "0"), (3, 4)).points) == 9


def test_torchvisions_layer_is_understood():
    torchvision = pytest.importorskip("torchvision")

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Conv2d(2, 18, 3, padding=1)
            self.conv = torchvision.ops.DeformConv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x, self.offset(x), mask=torch.full((1, 9, *x.shape[2:]), 0.25))

    network = Theirs().eval()
    with torch.no_grad():
        network.offset.weight.zero_()
        network.offset.bias.view(9, 2).copy_(torch.tensor([0.0, 2.0]))
    found = sampling_locations(observe(network, image(), "conv"), (5, 6))
    assert as_set(found.points) == sorted((x + 2.5, y + 0.5) for x in (5, 6, 7) for y in (4, 5, 6))
    assert torch.allclose(found.weights, torch.full((9,), 0.25, dtype=torch.float64))


def test_a_point_finds_its_node_and_the_node_its_point():
    seen = observe(Mixed().eval(), image(61, 59), "high")
    for node in ((0, 0), (2, 3), (4, 1)):
        x, y = seen.rest_position(node)
        assert seen.node_at((x + 1.2, y - 1.2)) == node
    assert seen.node_at((0, 0)) == (0, 0)


def test_strength_is_the_gradient_by_the_location():
    # R = 2 * x(p): the gradient by a location is twice the slope of the image there, dy and dx.
    ramp = 3 * torch.arange(7.0)[:, None] + 4 * torch.arange(8.0)
    deformable, rigid = nn.Sequential(DeformConv2d(1, 1, 3, bias=False)), nn.Sequential(nn.Conv2d(1, 1, 3, bias=False))
    for network in (deformable, rigid):
        network.eval()
        with torch.no_grad():
            network[0].weight.zero_()
            network[0].weight[0, 0, 1, 2] = 2
    with torch.no_grad():
        deformable[0].conv_offset.bias += 0.25  # off the kinks of bilinear interpolation
    for network in (deformable, rigid):
        seen = observe(network, ramp.expand(1, 1, 7, 8), "0")
        weights = sampling_locations(seen, (2, 3), strength=True).weights
        assert torch.allclose(weights, torch.tensor([0.0] * 5 + [10.0] + [0.0] * 3, dtype=torch.float64), atol=1e-5)


def test_strength_of_a_rigid_layer_is_that_of_a_resting_deformable_one():
    """On a piecewise linear signal both sides of a kink have their own slope; a mean of the two sides is ours."""
    rigid = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2).eval()
    data = image(13, 15, channels=4)
    found = sampling_locations(observe(nn.Sequential(rigid).eval(), data, "0"), (2, 3), strength=True).weights
    slopes = []
    for sign in (-1e-3, 1e-3):
        both = []
        for axis in (0, 1):
            layer = DeformConv2d.from_rigid(rigid)
            with torch.no_grad():
                layer.conv_offset.bias[axis::2] = sign
            seen = observe(nn.Sequential(layer).eval(), data, "0")
            offset = seen.calls[0].sampling["offset"]
            (gradient,) = torch.autograd.grad(seen.output[0, :, 2, 3].sum(), offset)
            both.append(gradient[0, axis::2, 2, 3])
        slopes.append(torch.stack(both))
    assert torch.allclose(found.float(), sum(slopes).div(2).norm(dim=0), atol=1e-3)


def test_bins_at_rest_divide_the_roi_and_offsets_move_them_by_its_size():
    rois = torch.tensor([[0.0, 10, 20, 50, 40]])
    middles, size = bin_locations(rois, (2, 4))
    assert middles.shape == (1, 1, 2, 4, 2)
    assert middles[0, 0, 0, :, 0].tolist() == [15, 25, 35, 45]
    assert middles[0, 0, :, 0, 1].tolist() == [25, 35]
    assert size.tolist() == [[10, 10]]
    offset = torch.zeros(1, 2, 2, 4)
    offset[0, 0, 1, 2], offset[0, 1, 1, 2] = 1, -2  # x by 0.1 * 40, y by -0.2 * 20
    moved, _ = bin_locations(rois, (2, 4), offset)
    assert (moved - middles)[0, 0, 1, 2].tolist() == pytest.approx([4, -4])
    assert (moved - middles).abs().sum() == pytest.approx(8)


def test_position_sensitive_bins_follow_their_parts_and_round_the_roi():
    rois = torch.tensor([[0.0, 9.6, 20.4, 48.5, 38.7]])  # 10 to 50, 20 to 40
    middles, size = bin_locations(rois, (2, 4), position_sensitive=True)
    assert middles[0, 0, 0, :, 0].tolist() == [15, 25, 35, 45]
    assert size.tolist() == [[10, 10]]
    offset = torch.zeros(1, 4, 1, 2)  # two classes, one row and two columns of parts
    offset[0, 2, 0, 1] = 1  # class 1, x, right part
    moved, _ = bin_locations(rois, (2, 4), offset, position_sensitive=True)
    assert (moved - middles)[0, 0].abs().max() == 0
    assert (moved - middles)[0, 1, :, :, 0].tolist() == [[0, 0, 4, 4]] * 2


@pytest.mark.parametrize("layer", [DeformRoIPool((2, 3), 4), DeformPSRoIPool((2, 3), 4, 5, group_size=2)])
def test_roi_layers_tell_what_they_pass_to_their_operator(layer):
    network = nn.Sequential(layer).eval()
    with listening(network) as calls:
        layer(torch.rand(1, 4, 16, 16), torch.tensor([[0.0, 1, 2, 9, 12]]))
    assert [call.name for call in calls] == ["0"]
    assert calls[0].sampling["offset"].shape == (1, 2, 2, 3)
    assert not calls[0].sampling["offset"].any()
    assert "sampling" not in vars(layer)


def test_learned_taps_are_in_pixels_from_the_middle():
    evolved = KernelEvolutionConv2d(2, 2, 3, padding=2, dilation=2, use_attention=False)
    active = ActiveConv2d(2, 2, (3, 1))
    with torch.no_grad():
        evolved.tap_offset[0, 0] = torch.tensor([0.25, -0.5])
        evolved.tap_offset[1, 0] = torch.tensor([0.75, 1.0])
        active.tap_offset[2] = torch.tensor([0.5, 0.0])
    assert learned_taps(evolved)[:, 0].tolist() == [[-1.5, -3], [-0.5, 0]]
    assert learned_taps(evolved)[1, 1:].tolist() == [[y, x] for y in (-2, 0, 2) for x in (-2, 0, 2)][1:]
    assert learned_taps(active).tolist() == [[[-1, 0], [0, 0], [1.5, 0]]]
    # A node's locations are the means over channels: those of (4, 3), whose middle tap lies on pixel (4, 3).
    found = sampling_locations(observe(nn.Sequential(evolved).eval(), image(9, 8), "0"), (4, 3))
    assert found.points[0].tolist() == [3.5 + (-3 + 0) / 2, 4.5 + (-1.5 - 0.5) / 2]
    assert found.points[1].tolist() == [3.5, 4.5 - 2]


def test_taps_of_a_deformable_kernel_rest_in_the_middle_of_the_scope_and_are_clipped():
    layer = LocalDeformKernel2d(2, 2, 3, padding=1)  # scope 4x4
    offsets = layer.sampling(image(5, 6))["kernel_offset"]
    positions = kernel_locations(layer, offsets)
    assert positions.shape == (1, 9, 2, 5, 6)
    rest = [[y, x] for y in (0.5, 1.5, 2.5) for x in (0.5, 1.5, 2.5)]
    assert positions[0, :, :, 3, 2].tolist() == rest
    assert kernel_locations(layer, offsets + 1)[0, :, :, 0, 0].tolist() == [
        [min(y + 1, 3), min(x + 1, 3)] for y, x in rest
    ]


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: observe(Mixed(), image(), "high"), "training mode"),
        (lambda: observe(Mixed().eval(), image(), "layer9.high"), "no module 'layer9.high'; near: high"),
        (lambda: observe(Mixed().eval(), image()[0], "high"), r"image must be \[1, C, H, W\]"),
        (lambda: observe(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten()).eval(), image(), "1"), "no map"),
        (lambda: observe(Mixed().eval(), image(61, 59), "high").node_at((60, 1)), r"\(60, 1\) is outside .* 59 x 61"),
        (
            lambda: sampling_locations(observe(nn.Sequential(nn.Conv2d(2, 2, 1)).eval(), image(), "0"), (0, 0)),
            "samples",
        ),
        (lambda: observe(Flat().eval(), image(), "conv").path, "UpsampleNearest2DBackward0, which are not followed"),
        (lambda: sampling_locations(observe(Mixed().eval(), image(61, 59), "high"), (0, 0), levels=0), "samples more"),
        (lambda: default_layer(nn.Sequential(nn.Conv2d(2, 2, 1))), "no convolution of more than one tap"),
    ],
)
def test_wrong_input(act, message):
    with pytest.raises(UserError, match=message):
        act()


def test_the_default_layer_is_no_offset_branch():
    assert default_layer(Mixed()) == "high"
    assert default_layer(nn.ModuleDict({"a": Mixed(), "b": nn.Conv2d(1, 1, 3)}), "a.") == "a.high"


def coordinates(height, width):
    """An image whose two channels are x and y of each pixel: what samples it bilinearly gets where it looked."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows]).float()[None] + 0.5


def test_the_operator_samples_where_the_locations_are():
    layer = DeformConv2d(2, 2, 1, stride=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2)[..., None, None])
        layer.conv_offset.weight.normal_(0, 0.05)
    seen = observe(nn.Sequential(layer).eval(), coordinates(21, 25), "0")
    for node in ((4, 5), (6, 8)):
        found = sampling_locations(seen, node)
        assert (found.points[0] - torch.tensor(found.center)).norm() > 0.1
        assert torch.allclose(found.points[0].float(), seen.output[0, :, node[0], node[1]], atol=1e-4)


def test_the_operators_pool_where_the_bins_are():
    maps, scale = coordinates(32, 40), 0.5
    rois = torch.tensor([[0.0, 12, 14, 44, 40], [0, 21.3, 20.8, 50.1, 43.9]])
    offset = torch.rand(2, 2, 2, 3) - 0.5
    middles, _ = bin_locations(rois, (2, 3), offset)
    pooled = deform_roi_pool(maps, rois, (2, 3), offset=offset, spatial_scale=scale, sampling_ratio=2)
    assert torch.allclose(pooled.movedim(1, -1) / scale, middles[:, 0].float(), atol=1e-3)

    middles, size = bin_locations(rois, (2, 3), offset, position_sensitive=True, spatial_scale=scale)
    pooled = deform_psroi_pool(
        maps, rois, (2, 3), offset=offset, spatial_scale=scale, output_channels=2, group_size=1, samples_per_part=4
    )
    # The original takes its samples from the start of a bin on, not around its middle: an eighth of the bin earlier.
    expected = middles[:, 0] - size[:, None, None] / 8
    assert torch.allclose(pooled.movedim(1, -1) / scale, expected.float(), atol=1e-3)


def test_norms_of_offsets_are_root_mean_squares():
    network = nn.Sequential(DeformConv2d(2, 2, 1), ModulatedDeformKernelConv2d(2, 2, 1)).eval()
    with torch.no_grad():
        network[0].conv_offset.bias.copy_(torch.tensor([3.0, -4.0]))
        network[1].kernel_offset.bias.copy_(torch.tensor([0.0, 0.5]))
    with listening(network) as calls:
        network(image())
    assert offset_norms(calls) == {"0": pytest.approx(5), "1": 0, "1/kernel": pytest.approx(0.5)}


def test_a_network_in_training_goes_on_as_it_was():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Dropout())).train()
    network[0].eval()
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, False, True, True]
