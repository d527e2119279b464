import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import reference
from dk_detection.ops import deform_conv2d
from dk_detection.ops.flops import MULTIPLY_ADDS
from tests.ops.suite import BACKENDS, Case, ConvolutionSuite, away_from_kinks, backend, gradcheck, in_lock_step


def make_case(
    name, *, batch=2, channels=6, out_channels=4, size=(7, 5), kernel=(3, 2), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), groups=1, offset_groups=1, mask=True, bias=True,
):  # fmt: skip
    torch.manual_seed(0)
    weight = torch.randn(out_channels, channels // groups, *kernel, dtype=torch.float64)
    input = torch.randn(batch, channels, *size, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    out_size = F.conv2d(input, weight, groups=groups, **options).shape[2:]
    taps = kernel[0] * kernel[1]
    tensors = {
        "input": input,
        "offset": away_from_kinks((batch, 2 * offset_groups * taps, *out_size)),
        "weight": weight,
    }
    if bias:
        tensors["bias"] = torch.randn(out_channels, dtype=torch.float64)
    if mask:
        tensors["mask"] = torch.rand(batch, offset_groups * taps, *out_size, dtype=torch.float64)
    return Case(name, tensors, options)


CASES = (
    make_case("v2", stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, offset_groups=3),
    make_case("v1", stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=1, offset_groups=2, mask=False, bias=False),
    make_case("grouped", batch=3, out_channels=9, groups=3, offset_groups=1, size=(5, 6)),
    make_case("depthwise", out_channels=6, groups=6, offset_groups=2, kernel=(2, 3)),
    make_case("depthwise_multiplier", out_channels=12, groups=6, offset_groups=3, kernel=(2, 2), size=(4, 5)),
    make_case("pointwise", kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
)


class TestDeformConv2d(ConvolutionSuite):
    name = "deform_conv2d"
    function = staticmethod(deform_conv2d)
    reference = staticmethod(reference.deform_conv2d)
    cases = CASES

    def backward_arguments(self, grad, args):
        input, offset, mask, weight, bias, *geometry = args
        wanted = [True, True, mask is not None, True, bias is not None]
        return grad, input, offset, mask, weight, *geometry, wanted


@pytest.fixture(params=BACKENDS)
def device(request):
    with backend(request.param, "deform_conv2d") as device:
        yield device


def test_gradcheck_element_by_element(device):
    case = make_case(
        "tiny",
        batch=2,
        channels=4,
        out_channels=2,
        size=(3, 2),
        kernel=(2, 1),
        padding=(0, 1),
        groups=2,
        offset_groups=2,
    )
    names, values = zip(*((name, t.to(device).requires_grad_()) for name, t in case.tensors.items()), strict=True)
    assert gradcheck(lambda *values: deform_conv2d(**dict(zip(names, values, strict=True)), **case.options), values)


# More channels than one panel of a matrix product holds, and slices of channels that cut weight and offset groups. On a
# device one tap at a time has all lanes of a warp, or two have.
@in_lock_step
@pytest.mark.parametrize(("channels", "groups", "offset_groups"), [(130, 1, 2), (136, 2, 1), (72, 9, 3), (160, 160, 5)])
def test_many_channels(device, channels, groups, offset_groups):
    case = make_case(
        "many",
        channels=channels,
        out_channels=channels,
        groups=groups,
        offset_groups=offset_groups,
        size=(4, 5),
        kernel=(2, 3),
    )
    tensors = {name: t.to(device).requires_grad_() for name, t in case.tensors.items()}
    output = deform_conv2d(**tensors, **case.options)
    expected = reference.deform_conv2d(**tensors, **case.options)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors.values(), grad), torch.autograd.grad(expected, tensors.values(), grad)
    )


def test_several_tiles(device):
    # More output positions than one tile holds, in more than one image.
    case = make_case("tiles", channels=8, size=(37, 41), kernel=(3, 3), offset_groups=2)
    tensors = {name: t.to(device, torch.float32).requires_grad_() for name, t in case.tensors.items()}
    output = deform_conv2d(**tensors, **case.options)
    expected = reference.deform_conv2d(**tensors, **case.options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(output)
    for got, wanted in zip(
        torch.autograd.grad(output, tensors.values(), grad),
        torch.autograd.grad(expected, tensors.values(), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@in_lock_step
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_at_full_width(device, dtype):
    # Eight channels a load, more of them than the lanes of a warp take at once.
    case = make_case("wide", channels=544, out_channels=8, size=(4, 3), kernel=(2, 2))
    tensors = {
        name: t.to(device, dtype if name in ("input", "weight", "bias") else torch.float32).requires_grad_()
        for name, t in case.tensors.items()
    }
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    output = deform_conv2d(**tensors, **case.options)
    expected = reference.deform_conv2d(**exact, **case.options)
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors.values(), grad)
    wanted = torch.autograd.grad(expected, exact.values(), grad.double())
    for got, right in zip((output, *gradients), (expected, *wanted), strict=True):
        assert (got.double() - right).abs().max() < 4 * torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("groups", (1, 2, 6))
@pytest.mark.parametrize("with_mask", (False, True))
def test_zero_offset_is_conv2d(device, groups, with_mask):
    case = make_case(
        "rest", out_channels=6, groups=groups, stride=(2, 1), dilation=(1, 2), padding=(1, 2), mask=with_mask
    )
    tensors = {name: t.to(device) for name, t in case.tensors.items()}
    tensors["offset"].zero_()
    if with_mask:
        tensors["mask"].fill_(1)
    plain = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], groups=groups, **case.options)
    torch.testing.assert_close(deform_conv2d(**tensors, **case.options), plain)


def test_gradients_of_zero_offsets_are_conv2d_gradients(device):
    case = make_case("rest", groups=2)
    tensors = {
        name: t.to(device).requires_grad_(name in ("input", "weight", "bias")) for name, t in case.tensors.items()
    }
    tensors["offset"].zero_()
    tensors["mask"].fill_(1)
    wanted = [t for t in tensors.values() if t.requires_grad]
    plain = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], groups=2, **case.options)
    grad = torch.randn_like(plain)
    torch.testing.assert_close(
        torch.autograd.grad(deform_conv2d(**tensors, **case.options), wanted, grad),
        torch.autograd.grad(plain, wanted, grad),
    )


def test_offset_gradient_at_the_border(device):
    # A tap exactly at -1 lies outside: value and gradient are zero, as in mmcv (torchvision gives a one-sided gradient
    # there). On other integers the gradient is the one from the right: x(p + 1) - x(p).
    input = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], device=device).view(1, 1, 2, 2)
    offset = torch.zeros(1, 2, 2, 2, device=device)
    offset[0, 0, 0] = -1  # the first output row looks at y = -1
    offset.requires_grad_()
    output = deform_conv2d(input, offset, torch.ones(1, 1, 1, 1, device=device))
    output.sum().backward()
    assert output.flatten().tolist() == [0, 0, 100, 1000]
    assert offset.grad[0, 0].tolist() == [[0, 0], [-100, -1000]]
    assert offset.grad[0, 1].tolist() == [[0, 0], [900, -1000]]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e30))
def test_offsets_that_are_not_finite_sample_nothing(device, value):
    case = make_case("v2", groups=2, offset_groups=3)
    tensors = {name: t.to(device).requires_grad_() for name, t in case.tensors.items()}
    broken = dict(tensors, offset=torch.full_like(tensors["offset"], value).requires_grad_())
    output = deform_conv2d(**broken, **case.options)
    torch.testing.assert_close(output, tensors["bias"].view(1, -1, 1, 1).expand_as(output))
    for name in ("input", "offset", "mask", "weight"):
        assert torch.autograd.grad(output.sum(), broken[name], retain_graph=True)[0].count_nonzero() == 0

    # One such tap leaves the others as they are.
    offset = tensors["offset"].detach().clone()
    mask = tensors["mask"].detach().clone()
    offset[0, 4, 2, 1] = value
    got = deform_conv2d(**dict(tensors, offset=offset), **case.options)
    mask[0, 2, 2, 1] = 0
    torch.testing.assert_close(got, deform_conv2d(**dict(tensors, mask=mask), **case.options))


@pytest.mark.parametrize("depthwise", (False, True))
def test_empty_batch(device, depthwise):
    case = make_case("v2", out_channels=6, groups=6 if depthwise else 2, offset_groups=2)
    tensors = {
        name: (t if name in ("weight", "bias") else t[:0]).to(device).requires_grad_()
        for name, t in case.tensors.items()
    }
    output = deform_conv2d(**tensors, **case.options)
    assert output.shape == (0, 6, 7, 6)
    output.sum().backward()
    for tensor in tensors.values():
        assert tensor.grad.shape == tensor.shape and tensor.grad.count_nonzero() == 0


def test_input_smaller_than_kernel_but_padded(device):
    input, weight = torch.randn(1, 2, 1, 1, device=device), torch.randn(3, 2, 3, 3, device=device)
    offset = torch.zeros(1, 18, 1, 1, device=device)
    torch.testing.assert_close(deform_conv2d(input, offset, weight, padding=1), F.conv2d(input, weight, padding=1))


def test_mixed_dtypes(device):
    # Data in half, positions in float32 or the other way round: everything a model under AMP brings together.
    case = make_case("v2")
    for data, position in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ):
        tensors = {
            name: t.to(device, position if name in ("offset", "mask") else data).requires_grad_()
            for name, t in case.tensors.items()
        }
        output = deform_conv2d(**tensors, **case.options)
        assert output.dtype == data
        for tensor, gradient in zip(tensors.values(), torch.autograd.grad(output.sum(), tensors.values()), strict=True):
            assert gradient.dtype == tensor.dtype


def test_half_types_keep_their_place_on_wide_maps(device):
    # Beyond 2048 neighbouring float16 numbers are 2 pixels apart (bfloat16: beyond 256). Coordinates are not.
    for dtype in (torch.float16, torch.bfloat16):
        input = (torch.arange(4096, device=device) % 7).to(dtype).view(1, 1, 1, -1)
        offset = torch.zeros(1, 2, 1, 4096, device=device, dtype=dtype)
        output = deform_conv2d(input, offset, torch.ones(1, 1, 1, 1, device=device, dtype=dtype))
        assert torch.equal(output, input)


def _good():
    return {
        "input": torch.rand(2, 6, 7, 5),
        "offset": torch.rand(2, 36, 7, 5),
        "weight": torch.rand(4, 3, 3, 3),
        "bias": torch.rand(4),
        "padding": 1,
        "mask": torch.rand(2, 18, 7, 5),
    }


WRONG = {
    "input_rank": ({"input": torch.rand(7, 5)}, ValueError, r"input must be \[N, C, H, W\] or .* got shape \[7, 5\]"),
    "single_input": (
        {"input": torch.rand(6, 7, 5)},
        ValueError,
        r"offset has shape \[2, 36, 7, 5\], expected 3 dimensions, since input is one image .* of shape \[6, 7, 5\]",
    ),
    "single_input_and_offset": (
        {"input": torch.rand(6, 7, 5), "offset": torch.rand(36, 7, 5)},
        ValueError,
        r"mask has shape \[2, 18, 7, 5\], expected 3 dimensions, since",
    ),
    "single_offset": ({"offset": torch.rand(36, 7, 5)}, ValueError, r"offset must have 4 .* got shape \[36, 7, 5\]"),
    "single_mask": ({"mask": torch.rand(18, 7, 5)}, ValueError, r"mask must have 4 dimensions, got shape \[18, 7, 5\]"),
    "input_type": ({"input": [1, 2]}, TypeError, "input must be a tensor, got list"),
    "input_dtype": (
        {"input": torch.ones(2, 6, 7, 5, dtype=torch.int64)},
        TypeError,
        "input must be floating-point, got",
    ),
    "weight_rank": ({"weight": torch.rand(4, 3, 3)}, ValueError, r"weight must be .* got shape \[4, 3, 3\]"),
    "weight_empty": ({"weight": torch.rand(0, 3, 3, 3)}, ValueError, r"weight must be .* got shape \[0, 3, 3, 3\]"),
    "weight_dtype": (
        {"weight": torch.rand(4, 3, 3, 3).double()},
        TypeError,
        "weight is torch.float64, expected .*float32",
    ),
    "weight_device": (
        {"weight": torch.rand(4, 3, 3, 3, device="meta")},
        ValueError,
        "weight is on meta, expected .* cpu",
    ),
    "channels": ({"weight": torch.rand(4, 4, 3, 3)}, ValueError, r"input has 6 channels, .* weight.shape\[1\] = 4"),
    "out_channels": ({"weight": torch.rand(5, 3, 3, 3)}, ValueError, "weight has 5 output channels, .* groups = 2"),
    "offset_channels": (
        {"offset": torch.rand(2, 16, 7, 5)},
        ValueError,
        r"offset has 16 channels, expected 2 \* offset_groups \* kH \* kW = 18 "
        r"\(offset_groups=1, kernel 3x3, offset shape \[2, 16, 7, 5\]\)",
    ),
    "offset_groups": (
        {"offset": torch.rand(2, 72, 7, 5)},
        ValueError,
        "offset has 72 channels, so offset_groups = 4, which does not divide the 6",
    ),
    "offset_size": (
        {"offset": torch.rand(2, 36, 5, 7)},
        ValueError,
        r"offset has shape \[2, 36, 5, 7\], expected \[2, 36, 7, 5\]",
    ),
    "offset_batch": ({"offset": torch.rand(1, 36, 7, 5)}, ValueError, r"offset has shape \[1, 36, 7, 5\], expected"),
    "offset_dtype": (
        {"offset": torch.ones(2, 36, 7, 5, dtype=torch.int32)},
        TypeError,
        "offset must be floating-point",
    ),
    "offset_device": ({"offset": torch.rand(2, 36, 7, 5, device="meta")}, ValueError, "offset is on meta"),
    "mask_channels": (
        {"mask": torch.rand(2, 9, 7, 5)},
        ValueError,
        r"mask has 9 channels, expected offset_groups \* kH \* kW = 18, half of those of offset",
    ),
    "mask_device": ({"mask": torch.rand(2, 18, 7, 5, device="meta")}, ValueError, "mask is on meta"),
    "bias_size": ({"bias": torch.rand(6)}, ValueError, r"bias has shape \[6\], expected \[4\]"),
    "bias_dtype": ({"bias": torch.rand(4).half()}, TypeError, "bias is torch.float16"),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride_type": ({"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5"),
    "padding": ({"padding": (1, -1)}, ValueError, r"padding must be at least 0, got \(1, -1\)"),
    "dilation": ({"dilation": (1, 2, 3)}, TypeError, "dilation must be an int or a pair of ints"),
    "too_small": (
        {"padding": 0, "dilation": 4},
        ValueError,
        "input 7x5 .* is smaller than the kernel 3x3 .* would be empty",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=f"deform_conv2d: {message}"):
        deform_conv2d(**_good() | change)


@pytest.mark.parametrize("name", [name for name in WRONG if not name.endswith("type") and name != "dilation"])
def test_wrong_input_to_the_compiled_operator(device, name):
    # The compiled operator is public too (exported programs, C++): it guards itself.
    change, error, _ = WRONG[name]
    args = _good() | change
    pairs = [args.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    pairs = [(value, value) if isinstance(value, int) else value for value in pairs]
    tensors = [
        args[key] if args[key].device.type == "meta" else args[key].to(device)
        for key in ("input", "offset", "mask", "weight", "bias")
    ]
    with pytest.raises((error, NotImplementedError), match="deform_conv2d"):
        torch.ops.dk_detection.deform_conv2d(*tensors, *pairs)


def test_wrong_gradient_to_the_compiled_operator(device):
    args = {k: v.to(device) for k, v in _good().items() if isinstance(v, torch.Tensor)}
    tensors = [args[key] for key in ("input", "offset", "mask", "weight")]
    geometry = ((1, 1), (1, 1), (1, 1))
    backward = torch.ops.dk_detection.deform_conv2d_backward
    with pytest.raises(ValueError, match="grad_output has shape"):
        backward(torch.rand(2, 4, 7, 6, device=device), *tensors, *geometry, [True] * 5)
    with pytest.raises(TypeError, match="grad_output is Double"):
        backward(torch.rand(2, 4, 7, 5, device=device).double(), *tensors, *geometry, [True] * 5)
    tensors[2] = None
    with pytest.raises(ValueError, match="there is no mask"):
        backward(torch.rand(2, 4, 7, 5, device=device), *tensors, *geometry, [True] * 5)


def test_flops():
    case = make_case("v2", groups=2, offset_groups=3)
    tensors = {name: t.requires_grad_() for name, t in case.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        output = deform_conv2d(**tensors, **case.options)
        forward = counter.get_total_flops()
        output.sum().backward()
    # 2 images, 7 x 6 positions, 6 taps: 4 outputs from 3 inputs each, and 6 inputs, sampled (2) and modulated (1).
    multiply_adds = 2 * 7 * 6 * 6 * (4 * 3 + 6 * 3)
    assert forward == 2 * multiply_adds
    assert counter.get_total_flops() == 3 * forward
    shapes = [tensors[name].shape for name in ("input", "offset", "mask", "weight", "bias")]
    assert MULTIPLY_ADDS["dk_detection::deform_conv2d"](shapes, output.shape) == multiply_adds
    shapes[2] = None
    assert MULTIPLY_ADDS["dk_detection::deform_conv2d"](shapes, output.shape) == 2 * 7 * 6 * 6 * (4 * 3 + 6 * 2)


def test_compile_with_dynamic_shapes():
    function = torch.compile(deform_conv2d, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((7, 5), (9, 8)):
        case = make_case("v2", size=size)
        torch.testing.assert_close(
            function(**case.tensors, **case.options), deform_conv2d(**case.tensors, **case.options)
        )


def test_export():
    class Net(torch.nn.Module):
        def forward(self, input, offset, mask, weight):
            return deform_conv2d(input, offset, weight, padding=1, mask=mask)

    case = make_case("v2", kernel=(3, 3), bias=False)
    args = tuple(case.tensors[name] for name in ("input", "offset", "mask", "weight"))
    program = torch.export.export(Net(), args)
    torch.testing.assert_close(program.module()(*args), Net()(*args))
