import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import reference
from dk_detection.ops import deform_conv2d, deform_kernel_conv2d, resample_kernel
from dk_detection.ops.flops import MULTIPLY_ADDS
from tests.ops.suite import BACKENDS, Case, ConvolutionSuite, away_from_kinks, backend, gradcheck, in_lock_step


def kernel_offsets(batch, groups, kernel, scope, out_size=()):
    """Random float64 kernel offsets; the sampling positions keep away from whole cells, inside the scope and beyond."""
    shape = (batch, groups, *kernel, *out_size)
    axes = []
    for axis in (0, 1):
        tap = torch.arange(kernel[axis]).view(-1, *[1] * (1 - axis), *[1] * len(out_size))
        position = torch.randint(-2, scope[axis] + 1, shape) + 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)
        axes.append(position - tap - (scope[axis] - kernel[axis]) / 2)
    return torch.stack(axes, dim=4).view(batch, -1, *out_size)


def make_case(
    name, *, batch=2, channels=6, out_channels=4, size=(7, 5), kernel=(3, 2), scope=(4, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1, kernel_offset_groups=1, offset_groups=0, mask_groups=0, bias=True,
    clip=True,
):  # fmt: skip
    torch.manual_seed(0)
    input = torch.randn(batch, channels, *size, dtype=torch.float64)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    out_size = F.conv2d(input, input.new_zeros(1, channels, *kernel), **geometry).shape[2:]
    taps = kernel[0] * kernel[1]
    tensors = {
        "input": input,
        "kernel_offset": kernel_offsets(batch, kernel_offset_groups, kernel, scope, out_size),
        "weight": torch.randn(out_channels, channels // groups, *scope, dtype=torch.float64),
    }
    if bias:
        tensors["bias"] = torch.randn(out_channels, dtype=torch.float64)
    if offset_groups:
        tensors["offset"] = away_from_kinks((batch, 2 * offset_groups * taps, *out_size))
    if mask_groups:
        tensors["mask"] = torch.rand(batch, mask_groups * taps, *out_size, dtype=torch.float64)
    return Case(name, tensors, geometry | {"kernel_size": kernel, "clip": clip})


CASES = (
    make_case("dense", kernel_offset_groups=2, stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    make_case(
        "grouped_moved_modulated", batch=3, out_channels=9, groups=3, kernel_offset_groups=2, offset_groups=3,
        mask_groups=3, size=(5, 6), kernel=(2, 3), scope=(5, 4), stride=(1, 2), bias=False, clip=False,
    ),
    make_case(
        "depthwise", out_channels=6, groups=6, kernel_offset_groups=3, kernel=(2, 3), scope=(3, 5), dilation=(2, 1)
    ),
    make_case(
        "depthwise_moved_modulated", out_channels=6, groups=6, kernel_offset_groups=2, offset_groups=3, mask_groups=3,
        scope=(3, 7), stride=(2, 1), clip=False,
    ),
)  # fmt: skip

# Seen only against the reference. More than 16 cells are more than one tile of them for a device.
MORE_CASES = (
    make_case("moved", offset_groups=2, scope=(3, 2), stride=(1, 2), dilation=(2, 1)),
    make_case("modulated", kernel_offset_groups=6, mask_groups=3, clip=False),
    make_case(
        "depthwise_multiplier_modulated", out_channels=12, groups=6, kernel_offset_groups=3, mask_groups=2,
        scope=(5, 4), size=(4, 5),
    ),
    make_case("depthwise_moved", out_channels=6, groups=6, offset_groups=6, kernel=(2, 2), scope=(9, 8)),
    make_case("pointwise", kernel=(1, 1), scope=(1, 2), padding=(0, 0), stride=(2, 2), offset_groups=1),
    make_case("pointwise_unclipped", kernel=(1, 1), scope=(2, 1), padding=(0, 0), groups=2, clip=False),
    make_case("large_kernel", size=(8, 9), kernel=(8, 9), scope=(9, 9), padding=(1, 0), groups=2),
    # more channels than one panel of a matrix product holds, and slices of channels that cut every kind of group
    make_case(
        "wide", channels=130, out_channels=70, kernel_offset_groups=2, offset_groups=5, kernel=(2, 2), size=(3, 5)
    ),
    make_case(
        "wide_groups", channels=136, out_channels=136, groups=2, kernel_offset_groups=4, kernel=(2, 2), size=(3, 5)
    ),
    make_case("many_groups", channels=96, out_channels=96, groups=12, offset_groups=3, kernel=(2, 2), size=(3, 5)),
    make_case(
        "wide_depthwise", channels=160, out_channels=160, groups=160, kernel_offset_groups=5, kernel=(2, 2), size=(3, 5)
    ),
    # more output positions than one tile holds, in more than one image
    make_case("tiles", channels=8, kernel_offset_groups=2, kernel=(2, 2), scope=(3, 3), size=(19, 23)),
    make_case(
        "depthwise_tiles", channels=8, out_channels=8, groups=8, offset_groups=2, kernel=(2, 2), scope=(3, 3),
        size=(19, 23),
    ),
)  # fmt: skip


class TestDeformKernelConv2d(ConvolutionSuite):
    name = "deform_kernel_conv2d"
    function = staticmethod(deform_kernel_conv2d)
    reference = staticmethod(reference.deform_kernel_conv2d)
    cases = CASES

    def backward_arguments(self, grad, args):
        input, kernel_offset, offset, mask, weight, bias, *options = args
        wanted = [True, True, offset is not None, mask is not None, True, bias is not None]
        return grad, input, kernel_offset, offset, mask, weight, *options, wanted


@pytest.fixture(params=BACKENDS)
def device(request):
    with backend(request.param, "deform_kernel_conv2d") as device:
        yield device


def tensors_of(case, device, requires_grad=True):
    return {name: t.to(device).requires_grad_(requires_grad) for name, t in case.tensors.items()}


@in_lock_step
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_equals_reference(case, device):
    tensors = tensors_of(case, device)
    output = deform_kernel_conv2d(**tensors, **case.options)
    expected = reference.deform_kernel_conv2d(**tensors, **case.options)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(output)
    for name, got, wanted in zip(
        tensors,
        torch.autograd.grad(output, tensors.values(), grad),
        torch.autograd.grad(expected, tensors.values(), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@in_lock_step
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("groups", (1, 272))
def test_half_types_at_full_width(device, dtype, groups):
    # Eight channels a load, more of them than the lanes of a warp take at once.
    case = make_case(
        "wide", channels=272, out_channels=272 if groups > 1 else 8, groups=groups, offset_groups=1, mask_groups=1,
        size=(4, 3), kernel=(2, 2),
    )  # fmt: skip
    tensors = {
        name: t.to(device, dtype if name in ("input", "weight", "bias") else torch.float32).requires_grad_()
        for name, t in case.tensors.items()
    }
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    output = deform_kernel_conv2d(**tensors, **case.options)
    expected = reference.deform_kernel_conv2d(**exact, **case.options)
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors.values(), grad)
    wanted = torch.autograd.grad(expected, exact.values(), grad.double())
    for got, right in zip((output, *gradients), (expected, *wanted), strict=True):
        assert (got.double() - right).abs().max() < 4 * torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_gradcheck_element_by_element(device, groups):
    case = make_case(
        "tiny", batch=1, channels=4, out_channels=4, size=(3, 2), kernel=(2, 1), scope=(3, 2), padding=(0, 1),
        groups=groups, kernel_offset_groups=2, offset_groups=2, mask_groups=2,
    )  # fmt: skip
    names, values = zip(*tensors_of(case, device).items(), strict=True)
    assert gradcheck(
        lambda *values: deform_kernel_conv2d(**dict(zip(names, values, strict=True)), **case.options), values
    )


# The identities below hold up to the order of sums of a few dozen float64 terms.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
groups = pytest.mark.parametrize("groups", (1, 2, 6))


@groups
@pytest.mark.parametrize("clip", (True, False))
def test_no_kernel_offset_in_a_scope_of_kernel_size_is_conv2d(device, groups, clip):
    case = make_case("rest", out_channels=6, groups=groups, scope=(3, 2), stride=(2, 1), padding=(2, 1), clip=clip)
    tensors = tensors_of(case, device)
    tensors["kernel_offset"] = torch.zeros_like(tensors["kernel_offset"])
    plain = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], (2, 1), (2, 1), groups=groups)
    output = deform_kernel_conv2d(**tensors, **case.options)
    torch.testing.assert_close(output, plain, **EXACT)
    grad, wanted = torch.randn_like(plain), [tensors[name] for name in ("input", "weight", "bias")]
    torch.testing.assert_close(
        torch.autograd.grad(output, wanted, grad), torch.autograd.grad(plain, wanted, grad), **EXACT
    )


@groups
@pytest.mark.parametrize("scope", ((4, 3), (5, 2), (6, 7)))
def test_no_kernel_offset_is_conv2d_with_the_resampled_kernel(device, groups, scope):
    case = make_case("rest", out_channels=6, groups=groups, scope=scope)
    tensors = tensors_of(case, device, requires_grad=False)
    kernel = resample_kernel(tensors["weight"], torch.zeros(1, 12, device=device).double(), kernel_size=(3, 2))[0]
    plain = F.conv2d(tensors["input"], kernel, tensors["bias"], padding=1, groups=groups)
    tensors["kernel_offset"].zero_()
    torch.testing.assert_close(deform_kernel_conv2d(**tensors, **case.options), plain, **EXACT)


@groups
def test_equal_kernel_offsets_everywhere_are_the_global_kernel(device, groups):
    case = make_case("global", out_channels=6, groups=groups)
    tensors = tensors_of(case, device, requires_grad=False)
    offset = kernel_offsets(2, 1, (3, 2), (4, 3)).to(device)
    tensors["kernel_offset"] = offset[:, :, None, None].expand_as(tensors["kernel_offset"])
    kernels = resample_kernel(tensors["weight"], offset, kernel_size=(3, 2))
    plain = torch.cat(
        [
            F.conv2d(image, kernel, tensors["bias"], padding=1, groups=groups)
            for image, kernel in zip(tensors["input"].split(1), kernels, strict=True)
        ]
    )
    torch.testing.assert_close(deform_kernel_conv2d(**tensors, **case.options), plain, **EXACT)


@groups
def test_no_kernel_offset_under_data_offsets_is_deform_conv2d(device, groups):
    case = make_case("dcn", out_channels=6, groups=groups, scope=(3, 2), offset_groups=3, mask_groups=3, stride=(1, 2))
    tensors = tensors_of(case, device)
    del tensors["kernel_offset"]
    peer = deform_conv2d(**tensors, stride=(1, 2), padding=1)
    nothing = torch.zeros_like(case.tensors["kernel_offset"]).to(device)
    output = deform_kernel_conv2d(kernel_offset=nothing, **tensors, **case.options)
    torch.testing.assert_close(output, peer, **EXACT)
    grad = torch.randn_like(peer)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors.values(), grad), torch.autograd.grad(peer, tensors.values(), grad), **EXACT
    )


@groups
def test_no_data_offset_is_the_kernel_alone(device, groups):
    case = make_case("dk", out_channels=6, groups=groups, kernel_offset_groups=2, stride=(2, 1))
    tensors = tensors_of(case, device)
    alone = deform_kernel_conv2d(**tensors, **case.options)
    nothing = torch.zeros(2, 2 * 6 * 3, *alone.shape[2:], device=device)
    output = deform_kernel_conv2d(**tensors, **case.options, offset=nothing)
    torch.testing.assert_close(output, alone, **EXACT)
    grad = torch.randn_like(alone)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors.values(), grad), torch.autograd.grad(alone, tensors.values(), grad), **EXACT
    )


@pytest.mark.parametrize(
    ("clip", "position", "value", "slope"),
    [
        (True, -0.5, 1, 0),  # clipped: held at the first cell
        (True, 0, 1, 9),  # on the edge: the slope from inside
        (True, 0.25, 3.25, 9),
        (True, 1, 10, 90),  # on a cell: the slope towards the next one
        (True, 2, 100, 90),  # on the other edge: the slope from inside
        (True, 2.5, 100, 0),
        (True, float("inf"), 100, 0),
        (True, float("-inf"), 1, 0),
        (True, float("nan"), 0, 0),
        (False, -1, 0, 0),  # outside; just inside the scope fades out over one cell
        (False, -0.5, 0.5, 1),
        (False, 2, 100, -100),
        (False, 2.5, 50, -100),
        (False, 3, 0, 0),
        (False, float("inf"), 0, 0),
        (False, float("nan"), 0, 0),
    ],
)
def test_edges_of_the_scope(device, clip, position, value, slope):
    for axis in (0, 1):
        weight = torch.tensor([1.0, 10, 100], device=device).view((1, 1, 3, 1) if axis == 0 else (1, 1, 1, 3))
        offset = torch.zeros(1, 2, 1, 1, device=device)
        offset[0, axis] = position - 1  # a single tap rests on the cell in the middle
        offset.requires_grad_()
        output = deform_kernel_conv2d(torch.ones(1, 1, 1, 1, device=device), offset, weight, kernel_size=1, clip=clip)
        output.backward()
        assert output.item() == value
        assert offset.grad[0, axis].item() == slope
        if clip:  # along an axis of one cell there is nowhere to go
            assert offset.grad[0, 1 - axis].item() == 0


@groups
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e30))
@pytest.mark.parametrize("which", ("kernel_offset", "offset"))
def test_offsets_that_sample_nothing(device, groups, which, value):
    case = make_case("v2", out_channels=6, groups=groups, offset_groups=3, mask_groups=3, clip=False)
    tensors = tensors_of(case, device)
    broken = dict(tensors, **{which: torch.full_like(tensors[which], value).requires_grad_()})
    output = deform_kernel_conv2d(**broken, **case.options)
    torch.testing.assert_close(output, tensors["bias"].view(1, -1, 1, 1).expand_as(output))
    for name in ("input", "kernel_offset", "offset", "mask", "weight"):
        assert torch.autograd.grad(output.sum(), broken[name], retain_graph=True)[0].count_nonzero() == 0, name


@groups
def test_one_tap_without_a_value_leaves_the_others(device, groups):
    case = make_case("v2", out_channels=6, groups=groups, mask_groups=1)
    tensors = tensors_of(case, device, requires_grad=False)
    mask = tensors["mask"].clone()
    mask[0, 2, 2, 1] = 0
    expected = deform_kernel_conv2d(**dict(tensors, mask=mask), **case.options)
    tensors["kernel_offset"][0, 4, 2, 1] = float("nan")
    torch.testing.assert_close(deform_kernel_conv2d(**tensors, **case.options), expected)


@groups
def test_a_pixel_reaches_as_far_as_in_conv2d(device, groups):
    # Without data offsets the neighbours of the taps are not even multiplied by zero.
    case = make_case("nan", out_channels=6, groups=groups)
    tensors = tensors_of(case, device, requires_grad=False)
    tensors["input"][0, :, 3, 2] = float("nan")
    output = deform_kernel_conv2d(**tensors, **case.options)
    reached = F.conv2d(tensors["input"], torch.ones(1, 6, 3, 2, device=device).double(), padding=1).isnan()
    assert torch.equal(output.isnan(), reached.expand_as(output))


@groups
def test_empty_batch(device, groups):
    case = make_case("v2", out_channels=6, groups=groups, offset_groups=2, mask_groups=2)
    tensors = {
        name: (t if name in ("weight", "bias") else t[:0]).to(device).requires_grad_()
        for name, t in case.tensors.items()
    }
    output = deform_kernel_conv2d(**tensors, **case.options)
    assert output.shape == (0, 6, 7, 6)
    output.sum().backward()
    for tensor in tensors.values():
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.count_nonzero() == 0


def test_mixed_dtypes(device):
    # Data in half, positions in float32 or the other way round: everything a model under AMP brings together.
    case = make_case("v2", offset_groups=2, mask_groups=2)
    for data, position in ((torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16,) * 2):
        tensors = {
            name: t.to(device, data if name in ("input", "weight", "bias") else position).requires_grad_()
            for name, t in case.tensors.items()
        }
        output = deform_kernel_conv2d(**tensors, **case.options)
        assert output.dtype == data
        for tensor, gradient in zip(tensors.values(), torch.autograd.grad(output.sum(), tensors.values()), strict=True):
            assert gradient.dtype == tensor.dtype


def _good():
    return {
        "input": torch.rand(2, 6, 7, 5),
        "kernel_offset": torch.rand(2, 54, 7, 5),
        "weight": torch.rand(4, 3, 4, 4),
        "bias": torch.rand(4),
        "padding": 1,
        "kernel_size": 3,
        "offset": torch.rand(2, 36, 7, 5),
        "mask": torch.rand(2, 18, 7, 5),
    }


WRONG = {
    "input_rank": ({"input": torch.rand(5)}, ValueError, r"input must be \[N, C, H, W\] or .* got shape \[5\]"),
    "single_input": (
        {"input": torch.rand(6, 7, 5)},
        ValueError,
        r"kernel_offset has shape \[2, 54, 7, 5\], expected 3 dimensions, since input .* of shape \[6, 7, 5\]",
    ),
    "single_input_and_kernel_offset": (
        {"input": torch.rand(6, 7, 5), "kernel_offset": torch.rand(54, 7, 5)},
        ValueError,
        r"offset has shape \[2, 36, 7, 5\], expected 3 dimensions, since",
    ),
    "single_kernel_offset": (
        {"kernel_offset": torch.rand(54, 7, 5)},
        ValueError,
        r"kernel_offset must have 4 dimensions, got shape \[54, 7, 5\]",
    ),
    "input_type": ({"input": [1, 2]}, TypeError, "input must be a tensor, got list"),
    "input_dtype": ({"input": torch.ones(2, 6, 7, 5).long()}, TypeError, "input must be floating-point, got"),
    "weight_rank": ({"weight": torch.rand(4, 3, 3)}, ValueError, r"weight must be .* got shape \[4, 3, 3\]"),
    "weight_empty": ({"weight": torch.rand(0, 3, 3, 3)}, ValueError, r"weight must be .* got shape \[0, 3, 3, 3\]"),
    "weight_dtype": ({"weight": torch.rand(4, 3, 3, 3).double()}, TypeError, "weight is torch.float64, .*float32"),
    "weight_device": ({"weight": torch.rand(4, 3, 3, 3, device="meta")}, ValueError, "weight is on meta, .* cpu"),
    "scope_height": (
        {"weight": torch.rand(4, 3, 2, 3)},
        ValueError,
        "weight has a scope of 2x3, expected at least kernel_size = 3x3",
    ),
    "scope_width": (
        {"kernel_size": (3, 5), "kernel_offset": torch.rand(2, 30, 7, 3)},
        ValueError,
        "weight has a scope of 4x4, .* kernel_size = 3x5",
    ),
    "channels": ({"weight": torch.rand(4, 4, 3, 3)}, ValueError, r"input has 6 channels, .* weight.shape\[1\] = 4"),
    "out_channels": ({"weight": torch.rand(5, 3, 3, 3)}, ValueError, "weight has 5 output channels, .* groups = 2"),
    "kernel_offset_rank": ({"kernel_offset": torch.rand(2, 18)}, ValueError, r"kernel_offset must have 4 .* \[2, 18\]"),
    "kernel_offset_channels": (
        {"kernel_offset": torch.rand(2, 16, 7, 5)},
        ValueError,
        r"kernel_offset has 16 channels, expected 2 \* kernel_offset_groups \* kH \* kW = 18 "
        r"\(kernel_offset_groups=1, kernel 3x3, kernel_offset shape \[2, 16, 7, 5\]\)",
    ),
    "kernel_offset_groups": (
        {"kernel_offset": torch.rand(2, 72, 7, 5)},
        ValueError,
        "kernel_offset has 72 channels, so kernel_offset_groups = 4, which does not divide the 6",
    ),
    "kernel_offset_size": (
        {"kernel_offset": torch.rand(2, 18, 5, 7)},
        ValueError,
        r"kernel_offset has shape \[2, 18, 5, 7\], expected \[2, 18, 7, 5\]",
    ),
    "kernel_offset_batch": ({"kernel_offset": torch.rand(1, 18, 7, 5)}, ValueError, r"kernel_offset has shape \[1, 18"),
    "kernel_offset_dtype": (
        {"kernel_offset": torch.ones(2, 18, 7, 5).int()},
        TypeError,
        "kernel_offset must be floating-point",
    ),
    "kernel_offset_device": (
        {"kernel_offset": torch.rand(2, 18, 7, 5, device="meta")},
        ValueError,
        "kernel_offset is on",
    ),
    "offset_channels": ({"offset": torch.rand(2, 16, 7, 5)}, ValueError, "offset has 16 channels, expected .* = 18"),
    "offset_groups": (
        {"offset": torch.rand(2, 72, 7, 5)},
        ValueError,
        "offset has 72 channels, so offset_groups = 4, which does not divide the 6",
    ),
    "offset_size": ({"offset": torch.rand(2, 36, 5, 7)}, ValueError, r"offset has shape \[2, 36, 5, 7\], expected"),
    "offset_dtype": ({"offset": torch.ones(2, 36, 7, 5).int()}, TypeError, "offset must be floating-point"),
    "offset_device": ({"offset": torch.rand(2, 36, 7, 5, device="meta")}, ValueError, "offset is on meta"),
    "mask_rank": ({"mask": torch.rand(2, 18)}, ValueError, r"mask must have 4 dimensions, got shape \[2, 18\]"),
    "mask_channels": ({"mask": torch.rand(2, 9, 7, 5)}, ValueError, "mask has 9 channels, expected .* = 18, half of"),
    "mask_size": ({"mask": torch.rand(2, 18, 6, 5)}, ValueError, r"mask has shape \[2, 18, 6, 5\], expected"),
    "mask_alone": (
        {"mask": torch.rand(2, 8, 7, 5), "offset": None},
        ValueError,
        "mask has 8 channels, expected .* = 9",
    ),
    "mask_device": ({"mask": torch.rand(2, 18, 7, 5, device="meta")}, ValueError, "mask is on meta"),
    "bias_size": ({"bias": torch.rand(6)}, ValueError, r"bias has shape \[6\], expected \[4\]"),
    "bias_dtype": ({"bias": torch.rand(4).half()}, TypeError, "bias is torch.float16"),
    "kernel_size": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride_type": ({"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5"),
    "padding": ({"padding": (1, -1)}, ValueError, r"padding must be at least 0, got \(1, -1\)"),
    "dilation": ({"dilation": (1, 2, 3)}, TypeError, "dilation must be an int or a pair of ints"),
    "too_small": ({"padding": 0, "dilation": 4}, ValueError, "input 7x5 .* is smaller than the kernel 3x3 .* empty"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=f"deform_kernel_conv2d: {message}"):
        deform_kernel_conv2d(**_good() | change)


# Which of them the compiled operator cannot meet.
PYTHON_ONLY = (
    *("input_type", "stride_type", "dilation", "kernel_size", "kernel_offset_rank", "kernel_offset_channels"),
    *("single_input_and_kernel_offset", "single_kernel_offset"),
)


@pytest.mark.parametrize("name", [name for name in WRONG if name not in PYTHON_ONLY])
def test_wrong_input_to_the_compiled_operator(device, name):
    # The compiled operator is public too (exported programs, C++): it guards itself.
    change, error, _ = WRONG[name]
    args = _good() | change
    kernel_size = args["kernel_size"] if isinstance(args["kernel_size"], tuple) else (args["kernel_size"],) * 2
    if kernel_size == (3, 3):
        args["kernel_offset"] = args["kernel_offset"].unflatten(1, (-1, 3, 3, 2))
    else:
        args["kernel_offset"] = torch.rand(2, 1, *kernel_size, 2, 7, 3)
    pairs = [args.get(key, 1) for key in ("stride", "padding", "dilation")]
    pairs = [(value, value) if isinstance(value, int) else value for value in pairs]
    tensors = [
        t if t is None or t.device.type == "meta" else t.to(device)
        for t in (args[key] for key in ("input", "kernel_offset", "offset", "mask", "weight", "bias"))
    ]
    with pytest.raises((error, NotImplementedError), match="deform_kernel_conv2d"):
        torch.ops.dk_detection.deform_kernel_conv2d(*tensors, *pairs, True)


@pytest.mark.parametrize("shape", [(2, 54, 7, 5), (2, 3, 3, 3, 1, 7, 5), (2, 0, 3, 3, 2, 7, 5), (2, 3, 0, 3, 2, 7, 5)])
def test_wrong_kernel_offset_to_the_compiled_operator(device, shape):
    args = [_good()[name].to(device) for name in ("input", "weight", "bias")]
    with pytest.raises(
        ValueError, match=r"kernel_offset must be \[batch, kernel_offset_groups, kH, kW, 2, out_h, out_w\]"
    ):
        torch.ops.dk_detection.deform_kernel_conv2d(
            args[0], torch.rand(shape, device=device), None, None, *args[1:], (1, 1), (1, 1), (1, 1), True
        )


def test_wrong_gradient_to_the_compiled_operator(device):
    args = {key: value.to(device) for key, value in _good().items() if isinstance(value, torch.Tensor)}
    args["kernel_offset"] = args["kernel_offset"].unflatten(1, (-1, 3, 3, 2))
    tensors = [args[key] for key in ("input", "kernel_offset", "offset", "mask", "weight")]
    options = ((1, 1), (1, 1), (1, 1), True, [True] * 6)
    backward = torch.ops.dk_detection.deform_kernel_conv2d_backward
    with pytest.raises(ValueError, match="grad_output has shape"):
        backward(torch.rand(2, 4, 7, 6, device=device), *tensors, *options)
    with pytest.raises(TypeError, match="grad_output is Double"):
        backward(torch.rand(2, 4, 7, 5, device=device).double(), *tensors, *options)
    for index, name in ((2, "offset"), (3, "mask")):
        without = [None if i == index else tensor for i, tensor in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"there is no {name}"):
            backward(torch.rand(2, 4, 7, 5, device=device), *without, *options)


@pytest.mark.parametrize(
    ("options", "multiply_adds"),
    [
        # 2 images, 7 x 6 positions, 6 inputs at 6 taps: a product each, and 2 for each resampled filter value
        (dict(out_channels=6, groups=6), 2 * 7 * 6 * 36 * (1 + 2)),
        # and 2 more for each value sampled from the input
        (dict(out_channels=6, groups=6, offset_groups=2), 2 * 7 * 6 * 36 * (1 + 2 + 2)),
        # 4 outputs from 3 inputs at 12 cells; the 36 values are spread over the cells
        (dict(groups=2), 2 * 7 * 6 * (4 * 3 * 12 + 36 * 2)),
        # and each sampled value is modulated
        (dict(groups=2, offset_groups=3, mask_groups=3), 2 * 7 * 6 * (4 * 3 * 12 + 36 * 2 + 36 * 2 + 36)),
    ],
)
def test_flops(options, multiply_adds):
    case = make_case("flops", **options)
    tensors = tensors_of(case, "cpu")
    with FlopCounterMode(display=False) as counter:
        output = deform_kernel_conv2d(**tensors, **case.options)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * multiply_adds
    assert counter.get_total_flops() == 3 * forward


def test_flops_of_the_paper():
    # Table 1 of Deformable Kernels: a local DK in all 3x3 convolutions of ResNet-50-DW takes 3.82 to 4.32 GFLOPs. What
    # it adds are the generators and the resampling.
    added = 0
    for blocks, channels, size in ((3, 128, 56), (4, 256, 28), (6, 512, 14), (3, 1024, 7)):
        map_shape = (1, channels, size, size)
        shapes = [map_shape, (1, 1, 3, 3, 2, size, size), None, None, (channels, 1, 4, 4), None]
        rigid = channels * 9 * size**2
        generator = 18 * rigid
        added += blocks * (MULTIPLY_ADDS["dk_detection::deform_kernel_conv2d"](shapes, map_shape) - rigid + generator)
    assert round(3.82 + added / 1e9, 2) == 4.32


def test_compile_with_dynamic_shapes():
    function = torch.compile(deform_kernel_conv2d, fullgraph=True, backend="aot_eager")
    for size in ((7, 5), (9, 8)):
        case = make_case("v2", size=size)
        for name in ("input", "kernel_offset"):
            torch._dynamo.mark_dynamic(case.tensors[name], (2, 3))
        expected = deform_kernel_conv2d(**case.tensors, **case.options)
        torch.testing.assert_close(function(**case.tensors, **case.options), expected)


def test_export():
    class Net(torch.nn.Module):
        def forward(self, input, kernel_offset, weight, offset, mask):
            return deform_kernel_conv2d(
                input, kernel_offset, weight, padding=1, kernel_size=(3, 2), offset=offset, mask=mask
            )

    case = make_case("v2", bias=False, offset_groups=2, mask_groups=2)
    args = tuple(case.tensors[name] for name in ("input", "kernel_offset", "weight", "offset", "mask"))
    program = torch.export.export(Net(), args)
    torch.testing.assert_close(program.module()(*args), Net()(*args))
