import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import reference
from dk_detection.ops import kernel_evolution_conv2d
from dk_detection.ops.flops import MULTIPLY_ADDS
from tests.ops.suite import BACKENDS, Case, ConvolutionSuite, backend, gradcheck


def grid(kernel, channels=1):
    """The locations of a rigid kernel, [channels, K, 2]."""
    y, x = (torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in kernel)
    return torch.cartesian_prod(y, x).expand(channels, -1, -1)


def make_case(
    name, *, batch=2, channels=4, out_channels=6, size=(7, 5), kernel=(3, 2), locations=None, stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1, attention=True, bias=True, radius=2.0, alpha=2.0,
):  # fmt: skip
    torch.manual_seed(0)
    locations = locations or kernel[0] * kernel[1]
    input = torch.randn(batch, channels, *size, dtype=torch.float64)
    rigid = torch.randn(out_channels, channels // groups, *kernel, dtype=torch.float64)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    out_size = F.conv2d(input, rigid, groups=groups, **geometry).shape[2:]
    tensors = {
        "input": input,
        "location": torch.randn(channels, locations, 2, dtype=torch.float64),
        "weight": torch.randn(out_channels, channels // groups, locations, dtype=torch.float64),
    }
    if bias:
        tensors["bias"] = torch.randn(out_channels, dtype=torch.float64)
    if attention:
        tensors["attention"] = torch.rand(batch, locations, *out_size, dtype=torch.float64)
    return Case(name, tensors, geometry | {"kernel_size": kernel, "radius": radius, "alpha": alpha})


CASES = (
    make_case("attention", stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, radius=1.5, alpha=1.3),
    make_case("constant", stride=(1, 2), padding=(0, 1), dilation=(2, 1), attention=False, bias=False),
    make_case("depthwise", out_channels=4, groups=4, kernel=(2, 3), stride=(2, 3), size=(5, 9), radius=1.0),
    make_case("multiplier", out_channels=8, groups=4, kernel=(1, 2), padding=(0, 0), size=(4, 5), attention=False),
    make_case("no_grid", kernel=(1, 1), locations=3, padding=(0, 0), batch=3, size=(5, 6), radius=2.6),
)


class TestKernelEvolutionConv2d(ConvolutionSuite):
    name = "kernel_evolution_conv2d"
    function = staticmethod(kernel_evolution_conv2d)
    reference = staticmethod(reference.kernel_evolution_conv2d)
    shared = ("location", "weight", "bias")
    cases = CASES

    def test_gradcheck(self, case, device):
        # The rule for locations is their derivative where the pixels around each lie symmetrically: on pixels and
        # halfway between them, with none on the rim.
        tensors = self.tensors(case, device)
        tensors["location"] = (2 * tensors["location"].detach()).round().div(2).requires_grad_()
        options = case.options | {"radius": 1.9}
        names = list(tensors)
        assert gradcheck(
            lambda *values: self.function(**dict(zip(names, values, strict=True)), **options),
            tuple(tensors.values()),
            fast_mode=True,
        )

    def backward_arguments(self, grad, args):
        input, origin, window, attention, weight, bias, *geometry = args
        wanted = [True, True, attention is not None, True, bias is not None]
        return grad, input, origin, window, attention, weight, *geometry, wanted


@pytest.fixture(params=BACKENDS)
def device(request):
    with backend(request.param, "kernel_evolution_conv2d") as device:
        yield device


def on(device, case, dtype=torch.float64, requires_grad=True):
    return {name: t.to(device, dtype).requires_grad_(requires_grad) for name, t in case.tensors.items()}


def gaussian(location, pixels, radius=2.0, alpha=2.0):
    """Weights [P] of pixels [P, 2] before they are normalised."""
    squared = (pixels - location).square().sum(-1)
    return torch.where(squared <= radius**2, torch.exp(-alpha * squared), 0)


@pytest.mark.parametrize("location", [(0.3, -0.4), (1.0, 0.7), (0.0, 0.0), (-0.5, 0.5)])
def test_locations_get_the_gradient_of_equation_15(device, location):
    torch.manual_seed(1)
    input = torch.randn(1, 1, 9, 9, dtype=torch.float64, device=device)
    location = torch.tensor(location, dtype=torch.float64, device=device)
    moving = location.clone().view(1, 1, 2).requires_grad_()
    output = kernel_evolution_conv2d(input, moving, torch.ones_like(input[0, :1, :1, :1]).view(1, 1, 1))
    (gradient,) = torch.autograd.grad(output[0, 0, 4, 4], moving)

    pixels = torch.cartesian_prod(*[torch.arange(-4, 5, dtype=torch.float64, device=device)] * 2)
    weights = gaussian(location, pixels)
    values = input[0, 0].flatten()  # of pixels, seen from the middle
    weights = weights / weights.sum()
    torch.testing.assert_close(output[0, 0, 4, 4], (weights * values).sum())
    rule = (2 * 2.0 * weights[:, None] * (pixels - location) * values[:, None]).sum(0)
    torch.testing.assert_close(gradient.view(2), rule)

    # It is the derivative of what a normaliser that stays as it is would give.
    constant = gaussian(location, pixels).sum()
    assert torch.autograd.gradcheck(
        lambda y: (gaussian(y, pixels, radius=2.1) / constant * values).sum(), location.clone().requires_grad_()
    )


def test_gradient_of_one_pixel_points_at_it(device):
    # The agreement that bilinear interpolation lacks: the direction is s - y wherever y is.
    torch.manual_seed(2)
    input = torch.zeros(1, 1, 7, 7, dtype=torch.float64, device=device)
    input[0, 0, 3, 3] = 1
    for y in (2 * torch.rand(20, 2, dtype=torch.float64) - 1).to(device):
        location = y.view(1, 1, 2).requires_grad_()
        output = kernel_evolution_conv2d(input, location, input.new_ones(1, 1, 1))
        (gradient,) = torch.autograd.grad(output[0, 0, 3, 3], location)
        assert F.cosine_similarity(gradient.flatten(), -y, dim=0) > 1 - 1e-9


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_sharp_and_on_the_grid_it_is_conv2d(device, groups):
    case = make_case(
        "rest", channels=6, stride=(2, 1), dilation=(1, 2), padding=(1, 2), groups=groups, alpha=1e4, attention=False
    )
    tensors = on(device, case) | {"location": grid((3, 2), 6).to(device)}
    wanted = [tensors[name] for name in ("input", "weight", "bias")]
    output = kernel_evolution_conv2d(**tensors, **case.options)
    geometry = {name: case.options[name] for name in ("stride", "padding", "dilation")}
    weight = tensors["weight"].unflatten(2, (3, 2))
    plain = F.conv2d(tensors["input"], weight, tensors["bias"], groups=groups, **geometry)
    torch.testing.assert_close(output, plain)
    grad = torch.randn_like(plain)
    torch.testing.assert_close(torch.autograd.grad(output, wanted, grad), torch.autograd.grad(plain, wanted, grad))


def larger_filter(location, weight, size, *, radius=2.0, alpha=2.0):
    """The filter [out, in, size, size] of the rigid convolution that a layer of one group and no attention is."""
    half = size // 2
    pixels = torch.cartesian_prod(*[torch.arange(-half, half + 1, dtype=location.dtype)] * 2)
    squared = (pixels - location.unsqueeze(-2)).square().sum(-1)  # [C, K, pixels]
    weights = torch.where(squared <= radius**2, torch.exp(-alpha * squared), 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("ock,ckp->ocp", weight, weights).unflatten(2, (size, size))


@pytest.mark.parametrize("stride", [1, 2])
def test_without_attention_it_is_a_rigid_convolution_with_a_larger_filter(device, stride):
    case = make_case("constant", attention=False, kernel=(3, 3))
    tensors = on(device, case)
    filter = larger_filter(tensors["location"].cpu(), tensors["weight"].cpu(), 15).to(device)
    output = kernel_evolution_conv2d(**tensors, stride=stride, padding=1, kernel_size=3)
    plain = F.conv2d(tensors["input"], filter, tensors["bias"], stride, padding=7)
    torch.testing.assert_close(output, plain)
    grad = torch.randn_like(plain)
    wanted = [tensors[name] for name in ("input", "weight", "bias")]
    torch.testing.assert_close(torch.autograd.grad(output, wanted, grad), torch.autograd.grad(plain, wanted, grad))


# More channels than one block holds, more positions than one tile, in more than one image, rows that end within a tile.
@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(130, 1, (4, 5)), (72, 2, (5, 4)), (9, 1, (37, 41)), (6, 6, (19, 33))]
)
def test_many_channels_and_positions(device, channels, groups, size):
    case = make_case("many", channels=channels, out_channels=channels, groups=groups, size=size, kernel=(3, 3))
    case.tensors["location"].clamp_(-1.9, 1.9)
    tensors = on(device, case)
    output = kernel_evolution_conv2d(**tensors, **case.options)
    parts = [
        F.unfold(tensors["input"][:, [c]], 9, padding=5)  # what a location of one channel may read
        for c in range(channels)
    ]
    pixels = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, dtype=torch.float64, device=device)] * 2)
    expected = 0
    for c, part in enumerate(parts):
        squared = (pixels - tensors["location"][c][:, None]).square().sum(-1)
        weights = torch.where(squared <= 4, torch.exp(-2 * squared), 0)
        weights = weights / weights.detach().sum(-1, keepdim=True)  # [K, 81]
        windows = part.unflatten(-1, (size[0] + 2, size[1] + 2))[..., 1:-1, 1:-1]
        read = torch.einsum("kp,nphw->nkhw", weights, windows) * tensors["attention"]
        group_in, group_out = channels // groups, channels // groups
        g = c // group_in
        term = torch.einsum("ok,nkhw->nohw", tensors["weight"][g * group_out : (g + 1) * group_out, c % group_in], read)
        expected = expected + F.pad(term, (0, 0, 0, 0, g * group_out, channels - (g + 1) * group_out))
    expected = expected + tensors["bias"].view(-1, 1, 1)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors.values(), grad), torch.autograd.grad(expected, tensors.values(), grad)
    )


@pytest.mark.parametrize("distance", [4.5, 1e3, 1e9, 1e30])
def test_locations_far_outside_read_zeros(device, distance):
    case = make_case("far", size=(4, 5), kernel=(3, 3), stride=(1, 2))
    tensors = on(device, case)
    far = tensors["location"].detach().clone()
    for k, (y, x) in enumerate(((-1, 0), (0, -1), (1, 0), (0, 1), (1, 1), (-1, -1))):
        far[:, k] += distance * torch.tensor([y, x], dtype=far.dtype, device=device)
    far.requires_grad_()
    output = kernel_evolution_conv2d(**tensors | {"location": far}, **case.options)
    expected = reference.kernel_evolution_conv2d(**tensors | {"location": far.clamp(-100, 100)}, **case.options)
    torch.testing.assert_close(output, expected)
    leaves = [far if name == "location" else t for name, t in tensors.items()]
    grad = torch.randn_like(output)
    for got, wanted in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_the_rim_of_the_radius_belongs_to_it(device):
    # From a pixel, 13 pixels lie within a radius of 2: four of them on the rim.
    input = torch.zeros(1, 1, 7, 7, dtype=torch.float64, device=device)
    input[0, 0, 3, 5] = 1
    weights = gaussian(torch.zeros(2), torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 2))
    assert weights.count_nonzero() == 13
    location = torch.zeros(1, 1, 2, dtype=torch.float64, device=device)
    for radius, expected in ((2.0, math.exp(-8) / weights.sum().item()), (math.nextafter(2.0, 0.0), 0.0)):
        output = kernel_evolution_conv2d(input, location, input.new_ones(1, 1, 1), radius=radius)
        assert output[0, 0, 3, 3].item() == pytest.approx(expected)


def test_the_smallest_radius_always_holds_a_pixel(device):
    locations = torch.rand(1, 200, 2, dtype=torch.float64, device=device)
    locations[0, 0] = 0.5
    for dtype in (torch.float64, torch.float32):
        input = torch.ones(1, 1, 5, 5, dtype=dtype, device=device)
        for alpha in (0.01, 2.0, 1e6):
            output = kernel_evolution_conv2d(
                input, locations.to(dtype), input.new_ones(1, 1, 200), radius=math.sqrt(0.5), alpha=alpha
            )
            assert output[0, 0, 2, 2].item() == pytest.approx(200, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_locations_have_to_be_finite(value):
    case = make_case("broken")
    location = case.tensors["location"].clone()
    location[2, 1, 0] = value
    with pytest.raises(ValueError, match="location must be finite, but that of input channel 2, number 1, is not"):
        kernel_evolution_conv2d(**case.tensors | {"location": location}, **case.options)
    with backend("host_run", "kernel_evolution_conv2d"):  # a device is not waited for; it says so in the output
        output = kernel_evolution_conv2d(**case.tensors | {"location": location}, **case.options)
    assert output.isnan().any()


@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(device, groups):
    case = make_case("empty", out_channels=4, groups=groups)
    tensors = {
        name: (t[:0] if name in ("input", "attention") else t).detach().requires_grad_()
        for name, t in on(device, case).items()
    }
    output = kernel_evolution_conv2d(**tensors, **case.options)
    assert output.shape == (0, 4, 7, 6)
    output.sum().backward()
    for tensor in tensors.values():
        assert tensor.grad.shape == tensor.shape and tensor.grad.count_nonzero() == 0


def test_mixed_dtypes(device):
    case = make_case("mixed")
    for data, position in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ):
        tensors = {
            name: t.to(device, position if name in ("location", "attention") else data).requires_grad_()
            for name, t in case.tensors.items()
        }
        output = kernel_evolution_conv2d(**tensors, **case.options)
        assert output.dtype == data
        for tensor, gradient in zip(tensors.values(), torch.autograd.grad(output.sum(), tensors.values()), strict=True):
            assert gradient.dtype == tensor.dtype


def test_half_types_keep_their_place_on_wide_maps(device):
    for dtype in (torch.float16, torch.bfloat16):
        input = (torch.arange(4096, device=device) % 7).to(dtype).view(1, 1, 1, -1)
        location = torch.zeros(1, 1, 2, device=device, dtype=dtype)
        output = kernel_evolution_conv2d(input, location, input.new_ones(1, 1, 1), alpha=1e4)
        assert torch.equal(output, input)


def _good():
    return {
        "input": torch.rand(2, 6, 7, 5),
        "location": torch.rand(6, 9, 2),
        "weight": torch.rand(4, 3, 9),
        "bias": torch.rand(4),
        "padding": 1,
        "kernel_size": 3,
        "attention": torch.rand(2, 9, 7, 5),
    }


WRONG = {
    "input_rank": ({"input": torch.rand(7, 5)}, ValueError, r"input must be \[N, C, H, W\] or .* got shape \[7, 5\]"),
    "single_input": ({"input": torch.rand(6, 7, 5)}, ValueError, r"attention has shape .* expected 3 dimensions"),
    "input_type": ({"input": [1, 2]}, TypeError, "input must be a tensor, got list"),
    "input_dtype": ({"input": torch.ones(2, 6, 7, 5, dtype=torch.int64)}, TypeError, "input must be floating-point"),
    "weight_rank": ({"weight": torch.rand(4, 3, 3, 3)}, ValueError, r"weight must be .* got shape \[4, 3, 3, 3\]"),
    "weight_empty": ({"weight": torch.rand(0, 3, 9)}, ValueError, r"weight must be .* got shape \[0, 3, 9\]"),
    "weight_dtype": ({"weight": torch.rand(4, 3, 9).double()}, TypeError, "weight is torch.float64, expected"),
    "weight_device": ({"weight": torch.rand(4, 3, 9, device="meta")}, ValueError, "weight is on meta"),
    "channels": ({"weight": torch.rand(4, 4, 9)}, ValueError, r"input has 6 channels, .* weight.shape\[1\] = 4"),
    "out_channels": ({"weight": torch.rand(5, 3, 9)}, ValueError, "weight has 5 output channels, .* groups = 2"),
    "location_channels": (
        {"location": torch.rand(3, 9, 2)},
        ValueError,
        r"location has shape \[3, 9, 2\], expected \[6, 9, 2\] = \[in_channels, K, 2\]",
    ),
    "location_number": ({"location": torch.rand(6, 8, 2)}, ValueError, r"location has shape \[6, 8, 2\], expected"),
    "location_rank": ({"location": torch.rand(9, 2)}, ValueError, r"location has shape \[9, 2\], expected \[6, 9, 2\]"),
    "location_dtype": ({"location": torch.ones(6, 9, 2).long()}, TypeError, "location must be floating-point"),
    "location_device": ({"location": torch.rand(6, 9, 2, device="meta")}, ValueError, "location is on meta"),
    "location_finite": (
        {"location": torch.full((6, 9, 2), torch.inf)},
        ValueError,
        "location must be finite, but that",
    ),
    "attention_size": (
        {"attention": torch.rand(2, 9, 5, 7)},
        ValueError,
        r"attention has shape \[2, 9, 5, 7\], expected \[2, 9, 7, 5\] = \[N, K, outH, outW\]",
    ),
    "attention_number": ({"attention": torch.rand(2, 8, 7, 5)}, ValueError, r"attention has shape \[2, 8, 7, 5\]"),
    "attention_dtype": ({"attention": torch.ones(2, 9, 7, 5).int()}, TypeError, "attention must be floating-point"),
    "attention_device": ({"attention": torch.rand(2, 9, 7, 5, device="meta")}, ValueError, "attention is on meta"),
    "bias_size": ({"bias": torch.rand(6)}, ValueError, r"bias has shape \[6\], expected \[4\]"),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "padding": ({"padding": (1, -1)}, ValueError, r"padding must be at least 0, got \(1, -1\)"),
    "dilation": ({"dilation": (1, 2, 3)}, TypeError, "dilation must be an int or a pair of ints"),
    "kernel_size": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    "too_small": ({"padding": 0, "dilation": 4}, ValueError, "input 7x5 .* is smaller than the kernel 3x3 .*"),
    "radius": ({"radius": 0.7}, ValueError, "radius must be at least the square root of 0.5, .*, got 0.7"),
    "radius_infinite": ({"radius": math.inf}, ValueError, "radius must be at least .*, got inf"),
    "radius_nan": ({"radius": math.nan}, ValueError, "radius must be at least .*, got nan"),
    "radius_type": ({"radius": "2"}, TypeError, "radius must be a number, got '2'"),
    "alpha": ({"alpha": 0.0}, ValueError, "alpha must be positive and finite, got 0.0"),
    "alpha_negative": ({"alpha": -2}, ValueError, "alpha must be positive and finite, got -2"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=f"kernel_evolution_conv2d: {message}"):
        kernel_evolution_conv2d(**_good() | change)


COMPILED = {
    "input": (torch.rand(7, 5), ValueError),
    "origin": (torch.rand(6, 8, 2), ValueError),
    "origin_dtype": (torch.ones(6, 9, 2).long(), TypeError),
    "window": (torch.rand(6, 8, 5, 5), ValueError),
    "window_rank": (torch.rand(6, 9, 25), ValueError),
    "attention": (torch.rand(2, 9, 7, 6), ValueError),
    "weight": (torch.rand(4, 3, 9).double(), TypeError),
    "weight_rank": (torch.rand(4, 27), ValueError),
    "bias": (torch.rand(5), ValueError),
}


@pytest.mark.parametrize("name", COMPILED)
def test_wrong_input_to_the_compiled_operator(device, name):
    # The compiled operator is public too (exported programs, C++): it guards itself.
    good = {"origin": torch.zeros(6, 9, 2), "window": torch.rand(6, 9, 5, 5)}
    good |= {key: _good()[key] for key in ("input", "attention", "weight", "bias")}
    value, error = COMPILED[name]
    args = good | {name.split("_")[0]: value}
    tensors = [args[key].to(device) for key in ("input", "origin", "window", "attention", "weight", "bias")]
    with pytest.raises(error, match="kernel_evolution_conv2d: "):
        torch.ops.dk_detection.kernel_evolution_conv2d(*tensors, (3, 3), (1, 1), (1, 1), (1, 1))


def test_wrong_gradient_to_the_compiled_operator(device):
    args = {key: _good()[key].to(device) for key in ("input", "attention", "weight")}
    window = torch.zeros(6, 9, 2, device=device), torch.rand(6, 9, 5, 5, device=device)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    backward = torch.ops.dk_detection.kernel_evolution_conv2d_backward
    grad = torch.rand(2, 4, 7, 5, device=device)

    def call(grad, attention=args["attention"]):
        backward(grad, args["input"], *window, attention, args["weight"], *geometry, [True] * 5)

    with pytest.raises(ValueError, match="grad_output has shape"):
        call(torch.rand(2, 4, 7, 6, device=device))
    with pytest.raises(TypeError, match="grad_output is Double"):
        call(grad.double())
    with pytest.raises(ValueError, match="there is no attention"):
        call(grad, None)


def test_flops():
    case = make_case("counted", groups=2)
    tensors = {name: t.requires_grad_() for name, t in case.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        output = kernel_evolution_conv2d(**tensors, **case.options)
        forward = counter.get_total_flops()
        output.sum().backward()
    # 2 images, 7 x 6 positions, 6 locations: 6 outputs from 2 inputs each, and 4 inputs of 13 pixels and the attention.
    multiply_adds = 2 * 7 * 6 * 6 * (6 * 2 + 4 * (13 + 1))
    assert forward == 2 * multiply_adds
    assert counter.get_total_flops() == 3 * forward
    shapes = [(2, 4, 7, 5), (4, 6, 2), (4, 6, 5, 5), None, (6, 2, 6), (6,)]
    count = MULTIPLY_ADDS["dk_detection::kernel_evolution_conv2d"]
    assert count(shapes, output.shape) == 2 * 7 * 6 * 6 * (6 * 2 + 4 * 13)
    shapes[2] = (4, 6, 4, 4)  # a radius of 1.5
    assert count(shapes, output.shape) == 2 * 7 * 6 * 6 * (6 * 2 + 4 * 7)


def test_locations_that_move_compile_nothing_anew():
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    function = torch.compile(kernel_evolution_conv2d, fullgraph=True, backend=backend)
    case = make_case("moving")
    for shift in (0.0, 0.3, 1.0, 1e6):
        tensors = case.tensors | {"location": case.tensors["location"] + shift}
        torch.testing.assert_close(
            function(**tensors, **case.options), kernel_evolution_conv2d(**tensors, **case.options)
        )
    assert len(compilations) == 1


def test_compile_with_dynamic_shapes():
    function = torch.compile(kernel_evolution_conv2d, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((7, 5), (9, 8)):
        case = make_case("sizes", size=size)
        torch.testing.assert_close(
            function(**case.tensors, **case.options), kernel_evolution_conv2d(**case.tensors, **case.options)
        )


def test_export():
    class Net(torch.nn.Module):
        def forward(self, input, location, attention, weight):
            return kernel_evolution_conv2d(input, location, weight, padding=1, kernel_size=3, attention=attention)

    case = make_case("exported", kernel=(3, 3), bias=False)
    args = tuple(case.tensors[name] for name in ("input", "location", "attention", "weight"))
    program = torch.export.export(Net(), args)
    torch.testing.assert_close(program.module()(*args), Net()(*args))
