import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import reference
from dk_detection.ops import deform_psroi_pool
from dk_detection.ops.flops import MULTIPLY_ADDS
from tests.ops.suite import BACKENDS, HOST_BACKENDS, Case, RoIPoolSuite, backend, find_wrong_rois, gradcheck

SCALE, GAMMA = 0.5, 0.2
# On a map of 9 x 7 pixels at half the image's size: inside; over the upper left corner; over the lower right one; less
# than a pixel wide; beside the map; inverted. Images come in no order.
ROIS = torch.tensor(
    [
        [1, 2.3, 3.1, 9.8, 13.2],
        [0, -4.6, -3.3, 5.2, 6.1],
        [1, 8.4, 10.7, 19.1, 23.9],
        [0, 5.5, 7.2, 5.8, 7.3],
        [1, 30.2, 2.7, 41.3, 9.9],
        [0, 9.9, 12.6, 4.7, 8.4],
    ],
    dtype=torch.float32,
)


def smooth_offset(rois, output_size, part_size, samples, classes, map_size):
    """Random offsets `[n, 2 * classes, *part_size]` of a few pixels that keep all samples of all bins away from kinks
    and jumps.

    Kinks are on the integers, jumps half a pixel beyond the outermost ones.
    """
    offset = torch.zeros(len(rois), classes, 2, *part_size, dtype=torch.float64)
    corners = rois.double()[:, 1:]
    corners = corners.sign() * (corners.abs() + 0.5).floor()
    for n, corner in enumerate(corners):
        for axis in (0, 1):  # x, y
            bins, parts, length = output_size[1 - axis], part_size[1 - axis], map_size[1 - axis]
            low = corner[axis] * SCALE - 0.5
            size = ((corner[2 + axis] + 1) * SCALE - 0.5 - low).clamp(min=0.1)
            for part in range(parts):
                rest = [
                    low + size / bins * (b + i / samples)
                    for b in range(bins) if b * parts // bins == part for i in range(samples)
                ]  # fmt: skip
                rest = torch.stack(rest) if rest else torch.tensor([0.5])
                shifts = torch.rand(4000, 1, dtype=torch.float64) * 6 - 3
                position = rest + shifts
                distance = torch.minimum((position - position.round()).abs(), (position - (length - 0.5)).abs())
                distance = torch.minimum(distance, (position + 0.5).abs()).amin(1)
                good = (distance > 0.005).nonzero().flatten()
                # All parts in the other direction and all classes get shifts of their own.
                values = offset[n, :, axis, part, :] if axis else offset[n, :, axis, :, part]
                values.copy_(shifts[good[: values.numel()]].view(values.shape) / (GAMMA * size))
    return offset.flatten(1, 2)


def make_case(
    name, *, output_size=(4, 3), output_channels=4, group_size=2, part_size=None, samples=2, classes=1, size=(9, 7),
    offset=True, mask=False, flat_mask=False, rois=ROIS,
):  # fmt: skip
    torch.manual_seed(0)
    parts = part_size or output_size
    tensors = {"input": torch.randn(2, output_channels * group_size**2, *size, dtype=torch.float64)}
    if offset:
        tensors["offset"] = smooth_offset(rois, output_size, parts, samples, classes, size)
    if mask:
        shape = (len(rois), *parts) if flat_mask else (len(rois), classes, *parts)
        tensors["mask"] = torch.rand(shape, dtype=torch.float64)
    options = {
        "rois": rois, "output_size": output_size, "spatial_scale": SCALE, "output_channels": output_channels,
        "group_size": group_size, "part_size": part_size, "samples_per_part": samples, "gamma": GAMMA,
    }  # fmt: skip
    return Case(name, tensors, options)


def call(function, tensors, options):
    """The operator with its RoIs on the device of its input."""
    return function(**tensors, **options | {"rois": options["rois"].to(tensors["input"].device)})


CASES = (
    make_case("rfcn", output_size=(3, 3), group_size=3, samples=3),
    make_case("classes", part_size=(2, 3), classes=2, mask=True),
    make_case("faster_rcnn", output_size=(2, 3), group_size=1, output_channels=5, mask=True, flat_mask=True),
    make_case("more_parts_than_bins", part_size=(5, 4), output_size=(3, 2), group_size=2, output_channels=2),
    make_case("mask_only", part_size=(2, 2), classes=3, output_channels=6, offset=False, mask=True, group_size=3),
    make_case("rigid", output_size=(3, 2), group_size=2, offset=False, samples=4),
    make_case(
        "many_channels", output_size=(1, 2), group_size=2, output_channels=72, classes=2, samples=1, rois=ROIS[:4]
    ),
)


class TestDeformPSRoIPool(RoIPoolSuite):
    name = "deform_psroi_pool"
    function = staticmethod(deform_psroi_pool)
    reference = staticmethod(reference.deform_psroi_pool)
    cases = CASES


@pytest.fixture(params=BACKENDS)
def device(request):
    with backend(request.param, "deform_psroi_pool") as device:
        yield device


def test_gradcheck_element_by_element(device):
    case = make_case("tiny", size=(4, 3), output_size=(2, 1), classes=2, output_channels=2, mask=True, rois=ROIS[:3])
    names, values = zip(*((name, t.to(device).requires_grad_()) for name, t in case.tensors.items()), strict=True)
    assert gradcheck(
        lambda *values: call(deform_psroi_pool, dict(zip(names, values, strict=True)), case.options), values
    )


def test_published_numbers(device):
    # The example that the PyTorch ports of the original carry. In mmcv's geometry it gives 0.98855 and 1.97711.
    input = torch.zeros(2, 16, 64, 64, device=device)
    input[0, :, 16:26, 16:26] = 1
    input[1, :, 10:20, 20:30] = 2
    rois = torch.tensor([[0.0, 65, 65, 103, 103], [1, 81, 41, 119, 79]], device=device)
    for offset in (None, torch.zeros(2, 2, 7, 7, device=device)):
        output = deform_psroi_pool(
            input, rois, 7, offset=offset, spatial_scale=0.25, output_channels=16, group_size=1, gamma=0.0
        )
        assert [f"{value:.6f}" for value in output.mean((1, 2, 3)).tolist()] == ["0.971507", "1.943014"]


def test_left_edges(device):
    # mmcv's hand case in this geometry: the RoI is two pixels wide, and samples lie at -0.5, 0, 0.5 and 1.
    input = torch.tensor([[1.0, 2], [3, 4]], device=device).view(1, 1, 2, 2)
    rois = torch.tensor([[0.0, 0, 0, 1, 1]], device=device)
    output = deform_psroi_pool(input, rois, 2, output_channels=1, group_size=1, samples_per_part=2)
    assert output[0, 0].tolist() == [[1, 1.75], [2.5, 3.25]]


def test_each_bin_reads_its_own_channel(device):
    # Channel (c * g + i) * g + j holds its own number everywhere.
    channels, group = 3, 2
    input = torch.arange(12.0, device=device).view(1, 12, 1, 1).expand(1, 12, 8, 8).contiguous()
    rois = torch.tensor([[0.0, 1, 1, 6, 6]], device=device)
    output = deform_psroi_pool(input, rois, (4, 2), output_channels=channels, group_size=group)
    c, i, j = torch.arange(3).view(3, 1, 1), torch.tensor([0, 0, 1, 1]).view(4, 1), torch.arange(2)
    assert torch.equal(output[0].cpu(), ((c * group + i) * group + j).float())


def test_offsets_are_x_then_y_of_each_class_and_part(device):
    # Values are x + 100 * y; the RoI is 8 wide and 4 high, gamma 0.25.
    grid = torch.arange(20.0, device=device)
    input = (grid + 100 * grid[:, None]).expand(1, 2, 20, 20).contiguous()
    rois = torch.tensor([[0.0, 4, 4, 11, 7]], device=device)

    def pool(offset):
        return deform_psroi_pool(
            input,
            rois,
            2,
            offset=offset,
            output_channels=2,
            group_size=1,
            part_size=(1, 2),
            samples_per_part=1,
            gamma=0.25,
        )

    rest = pool(None)
    assert rest[0, 0].tolist() == [[353.5, 357.5], [553.5, 557.5]]
    offset = torch.zeros(1, 4, 1, 2, device=device)
    offset[0, 2, 0, 1] = 1.5  # second class, x, right part
    offset[0, 3, 0, 0] = -0.5  # second class, y, left part
    moved = pool(offset) - rest
    assert moved[0, 0].tolist() == [[0, 0], [0, 0]]
    assert moved[0, 1].tolist() == [[-0.5 * 0.25 * 4 * 100, 1.5 * 0.25 * 8]] * 2


def test_rounding_and_least_size(device):
    # Halves are rounded away from zero: -0.5 to -1, 2.5 to 3. A RoI that is then empty is a tenth of a pixel wide.
    input = torch.arange(12.0, device=device).expand(1, 1, 12, 12).contiguous()

    def means(x1, x2):
        rois = torch.tensor([[0, x1, 2.0, x2, 4.0]], device=device)
        return deform_psroi_pool(input, rois, (1, 1), output_channels=1, group_size=1, samples_per_part=2).item()

    assert means(2.5, 8.5) == pytest.approx((2.5 + 6) / 2)  # from 2.5 to 9.5, samples at its start and its middle
    # From -1.5 to 6.5: the sample at -1.5 is off the map and does not count.
    assert means(-0.5, 6.49) == pytest.approx(2.5)
    assert means(7.0, 3.0) == pytest.approx((6.5 + 6.55) / 2)


def at(device, y, x):
    """One sample at (y, x) of a 3 x 4 map of 10 * row ** 2 + column ** 2: value, and gradients by x, y and mask."""
    row, column = torch.arange(3.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    input = (10 * row[:, None] ** 2 + column**2).view(1, 1, 3, 4).to(device)
    # The RoI is one pixel, and its sample lies at its left edge, (0.5, 0.5); one unit of offset is one pixel.
    rois = torch.tensor([[0.0, 1, 1, 1, 1]], dtype=torch.float64, device=device)
    offset = torch.tensor([x - 0.5, y - 0.5], dtype=torch.float64, device=device).view(1, 2, 1, 1).requires_grad_()
    mask = torch.full((1, 1, 1), 0.5, dtype=torch.float64, device=device, requires_grad=True)
    output = deform_psroi_pool(
        input, rois, 1, offset=offset, mask=mask, output_channels=1, group_size=1, samples_per_part=1, gamma=1.0
    )
    output.backward()
    return [output.item(), *offset.grad.flatten().tolist(), mask.grad.item()]


@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [
        (0.25, 1.5, [2.5, 1.5, 5, 5]),
        # Beyond the outermost pixel centres the value does not change: the gradient of that axis is zero, that of the
        # other is not.
        (-0.25, 1.5, [1.25, 1.5, 0, 2.5]),
        (2.25, 1.5, [21.25, 1.5, 0, 42.5]),
        (0.25, -0.5, [1.25, 0, 5, 2.5]),
        (0.25, 3.5, [5.75, 0, 5, 11.5]),
        # More than half a pixel beyond them there is nothing.
        (-0.75, 1.5, [0, 0, 0, 0]),
        (2.75, 1.5, [0, 0, 0, 0]),
        (0.25, -0.75, [0, 0, 0, 0]),
        (0.25, 3.75, [0, 0, 0, 0]),
        # On a pixel the gradient is the one from the right, at the last pixel zero.
        (1, 2, [7, 2.5, 15, 14]),
        (2, 3, [24.5, 0, 0, 49]),
    ],
)
def test_value_and_gradients_of_one_sample(device, y, x, expected):
    torch.testing.assert_close(at(device, y, x), [float(e) for e in expected])


def test_samples_off_the_map_do_not_count(device):
    # On a map of ones every bin with a sample on it is 1, wherever the RoI lies; the others are 0.
    input = torch.ones(2, 12, 9, 7, device=device)
    output = call(deform_psroi_pool, {"input": input}, CASES[0].options | {"output_channels": 3, "group_size": 2})
    torch.testing.assert_close(output, (output > 0).float())
    assert 0 < output.count_nonzero() < output.numel() and output[4].count_nonzero() == 0


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e30))
def test_offsets_that_are_not_finite_sample_nothing(device, value):
    case = CASES[1]
    tensors = {name: t.to(device).requires_grad_() for name, t in case.tensors.items()}
    offset = tensors["offset"].detach().clone()
    offset[0, 3, 1, 2] = value  # second class, y; part (1, 2) holds the bins of the last column's lower half
    offset.requires_grad_()
    output = call(deform_psroi_pool, dict(tensors, offset=offset), case.options)
    expected = call(deform_psroi_pool, tensors, case.options).detach().clone()
    expected[0, 2:, 2:, 2] = 0
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.sum(), (tensors["input"], offset, tensors["mask"]))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[1][0, 2:, 1, 2].tolist() == [0, 0] and gradients[2][0, 1, 1, 2] == 0


@pytest.mark.parametrize("side", (1e9, 1e20, 1e37))
def test_huge_rois(device, side):
    input = torch.rand(1, 2, 6, 5, device=device, requires_grad=True)
    rois = torch.tensor([[0, -side, -side, side, side]], device=device)
    output = deform_psroi_pool(input, rois, 2, output_channels=2, group_size=1)
    assert output.isfinite().all() and torch.autograd.grad(output.sum(), input)[0].isfinite().all()


def test_no_rois(device):
    input = torch.rand(2, 8, 9, 7, device=device, requires_grad=True)
    offset, mask = torch.zeros(0, 4, 3, 2, device=device), torch.zeros(0, 2, 3, 2, device=device)
    offset.requires_grad_(), mask.requires_grad_()
    output = deform_psroi_pool(
        input, torch.zeros(0, 5, device=device), (3, 2), offset=offset, mask=mask, output_channels=2, group_size=2
    )
    assert output.shape == (0, 2, 3, 2)
    output.sum().backward()
    for tensor in (input, offset, mask):
        assert tensor.grad.shape == tensor.shape and tensor.grad.count_nonzero() == 0


def test_rois_as_a_list(device):
    input = torch.rand(3, 4, 9, 7, device=device)
    boxes = [torch.rand(k, 4, device=device) * 3 + torch.tensor([0, 0, 4, 4], device=device) for k in (2, 0, 1)]
    rois = torch.cat([torch.tensor([[0.0], [0], [2]], device=device), torch.cat(boxes)], 1)
    options = {"output_channels": 1, "group_size": 2}
    assert torch.equal(deform_psroi_pool(input, boxes, 2, **options), deform_psroi_pool(input, rois, 2, **options))


def test_mixed_dtypes(device):
    case = CASES[1]
    for data, position in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ):
        tensors = {
            name: t.to(device, data if name == "input" else position).requires_grad_()
            for name, t in case.tensors.items()
        }
        output = call(deform_psroi_pool, tensors, case.options | {"rois": ROIS.to(position)})
        assert output.dtype == data
        for tensor, gradient in zip(tensors.values(), torch.autograd.grad(output.sum(), tensors.values()), strict=True):
            assert gradient.dtype == tensor.dtype


def _good():
    return {
        "input": torch.rand(2, 16, 7, 5),
        "rois": torch.tensor([[0, 1.0, 1, 3, 4], [1, 0, 2, 4, 4], [1, 2, 2, 3, 3]]),
        "output_size": (3, 2),
        "offset": torch.rand(3, 4, 2, 2),
        "mask": torch.rand(3, 2, 2, 2),
        "spatial_scale": 1.0,
        "output_channels": 4,
        "group_size": 2,
        "part_size": (2, 2),
        "samples_per_part": 3,
        "gamma": 0.1,
    }


def _rois(row, column, value):
    rois = _good()["rois"]
    rois[row, column] = value
    return rois


WRONG = {
    "input_rank": (
        {"input": torch.rand(16, 7, 5)},
        ValueError,
        r"input must be \[N, C, H, W\] .* got shape \[16, 7, 5\]",
    ),
    "input_dtype": (
        {"input": torch.ones(2, 16, 7, 5, dtype=torch.int64)},
        TypeError,
        "input must be floating-point, got",
    ),
    "input_channels": (
        {"input": torch.rand(2, 15, 7, 5)},
        ValueError,
        r"input has 15 channels, expected output_channels \* group_size\^2 = 16 \(output_channels=4, group_size=2\)",
    ),
    "rois_columns": ({"rois": torch.rand(3, 4)}, ValueError, r"rois must be \[n, 5\] .* got shape \[3, 4\]"),
    "rois_dtype": ({"rois": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "rois must be floating-point"),
    "rois_device": ({"rois": torch.zeros(3, 5, device="meta")}, ValueError, "rois is on meta, expected .* cpu"),
    "batch_index_high": (
        {"rois": _rois(1, 0, 2)},
        ValueError,
        r"rois\[1\] = \[2, 0, 2, 4, 4\] has batch index 2, .* \[0, 2\)",
    ),
    "batch_index_low": (
        {"rois": _rois(2, 0, -1)},
        ValueError,
        r"rois\[2\] = .* has batch index -1, expected an integer",
    ),
    "roi_nan": (
        {"rois": _rois(1, 2, math.nan)},
        ValueError,
        r"rois\[1\] = \[1, 0, nan, 4, 4\] has coordinates that are not fin",
    ),
    "output_size": ({"output_size": (3, 0)}, ValueError, r"output_size must be at least 1, got \(3, 0\)"),
    "output_channels": ({"output_channels": 0}, ValueError, "output_channels must be at least 1, got 0"),
    "group_size": ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    "group_size_wrong": ({"group_size": 4}, ValueError, "input has 16 channels, .* = 64"),
    "group_size_type": ({"group_size": (2, 2)}, TypeError, r"group_size must be an int, got \(2, 2\)"),
    "part_size": ({"part_size": 0}, ValueError, "part_size must be at least 1, got 0"),
    "samples_per_part": ({"samples_per_part": 0}, ValueError, "samples_per_part must be at least 1, got 0"),
    "offset_rank": (
        {"offset": torch.rand(3, 2, 2)},
        ValueError,
        r"offset must be \[n, 2 \* classes, partH, partW\], got",
    ),
    "offset_odd": ({"offset": torch.rand(3, 3, 2, 2)}, ValueError, r"offset must be .* got shape \[3, 3, 2, 2\]"),
    "offset_classes": (
        {"offset": torch.rand(3, 6, 2, 2)},
        ValueError,
        "offset is for 3 classes, expected a divisor of .*=4",
    ),
    "offset_parts": (
        {"offset": torch.rand(3, 4, 3, 2)},
        ValueError,
        r"offset has shape \[3, 4, 3, 2\], expected \[3, 4, 2, 2\]",
    ),
    "offset_rois": ({"offset": torch.rand(2, 4, 2, 2)}, ValueError, r"offset has shape \[2, 4, 2, 2\], expected"),
    "offset_type": ({"offset": 0}, TypeError, "offset must be a tensor, got int"),
    "offset_device": ({"offset": torch.rand(3, 4, 2, 2, device="meta")}, ValueError, "offset is on meta"),
    "mask_classes": (
        {"mask": torch.rand(3, 1, 2, 2)},
        ValueError,
        r"mask has shape \[3, 1, 2, 2\], expected \[3, 2, 2, 2\]",
    ),
    "mask_flat": ({"mask": torch.rand(3, 2, 2)}, ValueError, r"mask has shape \[3, 2, 2\], expected \[3, 2, 2, 2\]"),
    "mask_device": ({"mask": torch.rand(3, 2, 2, 2, device="meta")}, ValueError, "mask is on meta"),
    "mask_alone": (
        {"mask": torch.rand(3, 3, 2, 2), "offset": None},
        ValueError,
        "mask is for 3 classes, expected a divisor of .*=4",
    ),
    "spatial_scale": ({"spatial_scale": -0.5}, ValueError, "spatial_scale must be positive and finite, got -0.5"),
    "gamma": ({"gamma": math.nan}, ValueError, "gamma must be finite, got nan"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=f"deform_psroi_pool: {message}"):
        deform_psroi_pool(**_good() | change)


@pytest.mark.parametrize("name", [name for name in WRONG if not name.endswith("type")])
def test_wrong_input_to_the_compiled_operator(device, name):
    # The compiled operator is public too (exported programs, C++): it guards itself.
    change, error, _ = WRONG[name]
    args = _good() | change
    tensors = [args.pop(key) for key in ("input", "rois", "offset", "mask")]
    tensors = [t if t is None or t.device.type == "meta" else t.to(device) for t in tensors]
    args["part_size"] = (args["part_size"],) * 2 if isinstance(args["part_size"], int) else args["part_size"]
    with pytest.raises((error, NotImplementedError), match="deform_psroi_pool"):
        torch.ops.dk_detection.deform_psroi_pool(*tensors, **args)
        find_wrong_rois(device)


def test_channel_check_does_not_overflow(device):
    args = _good() | {"group_size": 2**32, "output_channels": 2**62}
    tensors = [args.pop(key).to(device) for key in ("input", "rois", "offset", "mask")]
    with pytest.raises(ValueError, match="input has 16 channels"):
        torch.ops.dk_detection.deform_psroi_pool(*tensors, **args)


def test_wrong_gradient_to_the_compiled_operator(device):
    args = _good()
    tensors = [args.pop(key).to(device) for key in ("input", "rois", "offset", "mask")]
    backward = torch.ops.dk_detection.deform_psroi_pool_backward
    with pytest.raises(ValueError, match="grad_output has shape"):
        backward(torch.rand(3, 16, 3, 2, device=device), *tensors, *args_in_order(args), [True] * 3)
    tensors[3] = None
    with pytest.raises(ValueError, match="there is no mask"):
        backward(torch.rand(3, 4, 3, 2, device=device), *tensors, *args_in_order(args), [True] * 3)


def args_in_order(args):
    names = "output_size spatial_scale output_channels group_size part_size samples_per_part gamma"
    return [args[name] for name in names.split()]


@pytest.mark.parametrize("host", HOST_BACKENDS)
@pytest.mark.parametrize("deterministic", (False, True))
def test_device_backward_guards_itself_against_wrong_rois(deterministic, host):
    # Devices report the values of RoIs in the forward only. The bodies must not read or write with them.
    args = _good()
    tensors = [args.pop(key) for key in ("input", "rois", "offset", "mask")]
    tensors[1] = torch.tensor([[2.0, 1, 1, 3, 4], [-1, 0, 2, 4, 4], [1, math.nan, 2, 3, 3]])
    torch.use_deterministic_algorithms(deterministic)
    try:
        gradients = getattr(torch.ops.dk_detection, f"_deform_psroi_pool_{host}_backward")(
            torch.rand(3, 4, 3, 2), *tensors, *args_in_order(args), [True] * 3
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_flops():
    case = CASES[1]
    tensors = {name: t.detach().requires_grad_() for name, t in case.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        output = call(deform_psroi_pool, tensors, case.options)
        forward = counter.get_total_flops()
        output.sum().backward()
    # 6 RoIs, 4 channels, 4 x 3 bins, 2 x 2 sampled values in each, 2 for each, 1 for a bin's modulation
    multiply_adds = 6 * 4 * 4 * 3 * (2 * 2 * 2 + 1)
    assert forward == 2 * multiply_adds
    assert counter.get_total_flops() == 3 * forward
    shapes = [(2, 16, 9, 7), (6, 5), (6, 4, 2, 3), (6, 2, 2, 3), *[None] * 7]
    # A tool that passes only tensors on counts 4 x 4 samples, the default.
    assert MULTIPLY_ADDS["dk_detection::deform_psroi_pool"](shapes, output.shape) == 6 * 4 * 4 * 3 * (4 * 4 * 2 + 1)


def test_compile_with_dynamic_shapes():
    function = torch.compile(deform_psroi_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (6, 4, 5):
        case = make_case("rfcn", output_size=(3, 3), group_size=3, rois=ROIS[:count], mask=True)
        torch.testing.assert_close(
            call(function, case.tensors, case.options), call(deform_psroi_pool, case.tensors, case.options)
        )
