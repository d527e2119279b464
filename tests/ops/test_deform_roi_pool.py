import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dk_detection import reference
from dk_detection.ops import deform_psroi_pool, deform_roi_pool
from dk_detection.ops.flops import MULTIPLY_ADDS
from tests.ops.suite import (
    BACKENDS,
    HOST_BACKENDS,
    Case,
    RoIPoolSuite,
    backend,
    find_wrong_rois,
    gradcheck,
    late_reports,
)

SCALE, GAMMA = 0.5, 0.2
# On a map of 9 x 7 pixels at half the image's size: inside; over the upper left corner; over the lower right one; less
# than a pixel wide; beside the map; larger than the map. Images come in no order.
ROIS = torch.tensor(
    [
        [1, 2.3, 3.1, 9.8, 13.2],
        [0, -4.6, -3.3, 5.2, 6.1],
        [1, 8.4, 10.7, 19.1, 23.9],
        [0, 5.5, 7.2, 6.3, 8.1],
        [1, 30.2, 2.7, 41.3, 9.9],
        [0, -9.1, -12.6, 31.7, 28.4],
    ],
    dtype=torch.float32,
)
INVERTED = torch.tensor([[0, 9.7, 3.2, 2.1, 12.9], [1, 3.4, 14.3, 10.8, 2.2], [0, 12.2, 14.1, 2.3, 1.7]])


def grid_sizes(rois, output_size, ratio):
    """Samples along (x, y) for each RoI, `[n, 2]`."""
    if ratio > 0:
        return torch.full((len(rois), 2), ratio)
    bins = (rois[:, 3:] - rois[:, 1:3]) * SCALE / torch.tensor(output_size[::-1])
    return bins.ceil().clamp(min=0).long()


def smooth_offset(rois, output_size, ratio):
    """Random offsets `[n, 2, *output_size]` of a few pixels that keep all samples of all bins away from the integers.

    Sampling has kinks there, and at the border of the map jumps.
    """
    offset = torch.zeros(len(rois), 2, *output_size, dtype=torch.float64)
    grids = grid_sizes(rois, output_size, ratio)
    for n, roi in enumerate(rois.double()):
        for axis in (0, 1):  # x, y
            low, high = roi[1 + axis] * SCALE - 0.5, roi[3 + axis] * SCALE - 0.5
            bins, grid = output_size[1 - axis], int(grids[n, axis])
            for i in range(output_size[0]):
                for j in range(output_size[1]):
                    start = low + (high - low) / bins * (j, i)[axis]
                    rest = start + (torch.arange(grid) + 0.5) * (high - low) / bins / max(grid, 1)  # [grid]
                    shifts = torch.rand(2000, 1, dtype=torch.float64) * 6 - 3
                    distance = ((rest + shifts) - (rest + shifts).round()).abs().amin(1) if grid else torch.ones(1)
                    assert distance.max() > 0.02
                    shift = shifts[distance.argmax() if distance.max() < 0.05 else (distance > 0.05).nonzero()[0]]
                    offset[n, axis, i, j] = shift.item() / (GAMMA * (high - low))
    return offset


def make_case(name, *, channels=5, size=(9, 7), output_size=(3, 2), ratio=2, offset=True, mask=None, rois=ROIS):
    torch.manual_seed(0)
    tensors = {"input": torch.randn(2, channels, *size, dtype=torch.float64)}
    if offset:
        tensors["offset"] = smooth_offset(rois, output_size, ratio)
    if mask is not None:
        tensors["mask"] = torch.rand(len(rois), *mask, *output_size, dtype=torch.float64)
    options = {
        "rois": rois, "output_size": output_size, "spatial_scale": SCALE, "sampling_ratio": ratio, "gamma": GAMMA
    }  # fmt: skip
    return Case(name, tensors, options)


def call(function, tensors, options):
    """The operator with its RoIs on the device of its input."""
    return function(**tensors, **options | {"rois": options["rois"].to(tensors["input"].device)})


CASES = (
    make_case("v2", mask=(1,)),
    make_case("v1_adaptive", ratio=0, channels=8, output_size=(2, 3)),
    make_case("mask_only", ratio=3, channels=4, offset=False, mask=(), output_size=(1, 2)),
    make_case("aligned", ratio=0, offset=False),
    make_case("inverted", ratio=2, mask=(1,), rois=INVERTED, channels=3),
    make_case("many_channels", ratio=1, mask=(), channels=72, rois=ROIS[:4]),
)


class TestDeformRoIPool(RoIPoolSuite):
    name = "deform_roi_pool"
    function = staticmethod(deform_roi_pool)
    reference = staticmethod(reference.deform_roi_pool)
    cases = CASES


@pytest.fixture(params=BACKENDS)
def device(request):
    with backend(request.param, "deform_roi_pool") as device:
        yield device


def test_gradcheck_element_by_element(device):
    case = make_case("tiny", channels=2, size=(4, 3), output_size=(1, 2), mask=(1,), rois=ROIS[:3])
    names, values = zip(*((name, t.to(device).requires_grad_()) for name, t in case.tensors.items()), strict=True)
    assert gradcheck(lambda *values: call(deform_roi_pool, dict(zip(names, values, strict=True)), case.options), values)


# The published numbers of mmcv's tests: output, and gradient of the input for an output gradient of ones.
MMCV = {
    "one_channel": ([[[1, 2], [3, 4]]], 1, [[[1, 1.25], [1.5, 1.75]]], [[[3.0625, 0.4375], [0.4375, 0.0625]]]),
    "two_channels": (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        1,
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
    ),
    "four_by_four": (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        3,
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [
            [
                [0.47265625, 0.4296875, 0.4296875, 0.04296875],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.04296875, 0.0390625, 0.0390625, 0.00390625],
            ]
        ],
    ),
}


@pytest.mark.parametrize(("input", "corner", "output", "gradient"), MMCV.values(), ids=MMCV)
def test_numbers_of_mmcv(device, input, corner, output, gradient):
    input = torch.tensor([input], dtype=torch.float32, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, corner, corner]], device=device)
    offset = torch.zeros(1, 2, 2, 2, device=device)
    result = deform_roi_pool(input, rois, 2, offset=offset, sampling_ratio=2)
    result.sum().backward()
    assert result[0].tolist() == output
    torch.testing.assert_close(input.grad[0], torch.tensor(gradient, device=device))


# torchvision 0.26 fails on RoIs that are inverted along one axis if its grid is adaptive, so those come with a fixed
# grid only.
@pytest.mark.parametrize(("ratio", "rois"), [(0, ROIS), (1, ROIS), (2, ROIS), (3, torch.cat([ROIS, INVERTED]))])
@pytest.mark.parametrize("rest", (False, True))
def test_equals_aligned_roi_pooling_at_rest(device, ratio, rois, rest):
    input = torch.randn(2, 6, 9, 7, dtype=torch.float64, device=device, requires_grad=True)
    rois = torch.cat([rois, torch.tensor([[1, 3.0, 3.0, 3.0, 3.0], [0, 2.0, 4.0, 2.0, 9.0]])]).double().to(device)
    parts = {"offset": torch.zeros(len(rois), 2, 3, 4), "mask": torch.ones(len(rois), 1, 3, 4)} if rest else {}
    parts = {name: part.to(device) for name, part in parts.items()}
    output = deform_roi_pool(input, rois, (3, 4), spatial_scale=0.3, sampling_ratio=ratio, **parts)
    roi_align = pytest.importorskip("torchvision.ops").roi_align
    expected = roi_align(input, rois, (3, 4), 0.3, ratio or -1, aligned=True)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, input, grad), torch.autograd.grad(expected, input, grad))


def at(device, y, x, mask=1.0):
    """One sample at (y, x) of a 3 x 4 map of 10 * row ** 2 + column ** 2: value, and gradients by x, y and mask."""
    row, column = torch.arange(3.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    input = (10 * row[:, None] ** 2 + column**2).view(1, 1, 3, 4).to(device)
    # The RoI's only sample lies in its middle, (1.5, 1.5) on the map; one unit of offset is one pixel.
    rois = torch.tensor([[0, 1.5, 1.5, 2.5, 2.5]], dtype=torch.float64, device=device)
    offset = torch.tensor([x - 1.5, y - 1.5], dtype=torch.float64, device=device).view(1, 2, 1, 1).requires_grad_()
    mask = torch.full((1, 1, 1), mask, dtype=torch.float64, device=device, requires_grad=True)
    output = deform_roi_pool(input, rois, 1, offset=offset, mask=mask, sampling_ratio=1, gamma=1.0)
    output.backward()
    return [output.item(), *offset.grad.flatten().tolist(), mask.grad.item()]


@pytest.mark.parametrize(
    ("y", "x", "expected"),
    [
        (0.25, 1.5, [2.5 + 2.5, 3, 10, 5]),
        # Beyond the outermost pixel centres the value does not change: the gradient of that axis is zero, that of the
        # other is not.
        (-0.5, 1.5, [2.5, 3, 0, 2.5]),
        (2.75, 1.5, [42.5, 3, 0, 42.5]),
        (0.25, -0.75, [2.5, 0, 10, 2.5]),
        (0.25, 3.75, [11.5, 0, 10, 11.5]),
        (-0.5, 3.5, [9, 0, 0, 9]),
        # More than a pixel beyond them there is nothing.
        (-1.25, 1.5, [0, 0, 0, 0]),
        (3.25, 1.5, [0, 0, 0, 0]),
        (0.25, -1.25, [0, 0, 0, 0]),
        (0.25, 4.25, [0, 0, 0, 0]),
        # On a pixel the gradient is the one from the right, at the last pixel zero, at exactly one pixel beyond still a
        # value.
        (1, 2, [14, 5, 30, 14]),
        (0, 0, [0, 1, 10, 0]),
        (2, 3, [49, 0, 0, 49]),
        (-1, 4, [9, 0, 0, 9]),
    ],
)
def test_value_and_gradients_of_one_sample(device, y, x, expected):
    torch.testing.assert_close(at(device, y, x), [float(e) for e in expected])
    value, by_x, by_y, by_mask = expected
    torch.testing.assert_close(at(device, y, x, mask=0.5), [value / 2, by_x / 2, by_y / 2, float(by_mask)])


def test_offsets_are_x_then_y_in_units_of_the_roi(device):
    input = torch.arange(20.0, device=device).expand(1, 1, 20, 20).contiguous()  # the value is x
    rois = torch.tensor([[0.0, 4, 4, 12, 8]], device=device)  # 8 wide, 4 high
    offset = torch.zeros(1, 2, 1, 2, device=device)
    offset[0, :, 0, 1] = torch.tensor([0.5, 100.0])
    output = deform_roi_pool(input, rois, (1, 2), offset=offset, sampling_ratio=2, gamma=0.25)
    assert output.flatten().tolist() == [5.5, 0]  # 100 * 0.25 * 4 pixels down there is no map
    offset[0, 1, 0, 1] = 1
    output = deform_roi_pool(input, rois, (1, 2), offset=offset, sampling_ratio=2, gamma=0.25)
    assert output.flatten().tolist() == [5.5, 9.5 + 0.5 * 0.25 * 8]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e30))
def test_offsets_that_are_not_finite_sample_nothing(device, value):
    case = make_case("v2", mask=(1,))
    tensors = {name: t.to(device).requires_grad_() for name, t in case.tensors.items()}
    offset = tensors["offset"].detach().clone()
    offset[0, 0, 1, 1] = value
    offset.requires_grad_()
    output = call(deform_roi_pool, dict(tensors, offset=offset), case.options)
    expected = call(deform_roi_pool, tensors, case.options).detach().clone()
    expected[0, :, 1, 1] = 0
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.sum(), (tensors["input"], offset, tensors["mask"]))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[1][0, :, 1, 1].tolist() == [0, 0] and gradients[2][0, 0, 1, 1] == 0


def test_degenerate_rois(device):
    # Inverted, without area, and far outside: zeros where the grid is adaptive, never NaN, and no gradient for the
    # input.
    rois = torch.tensor(
        [[0.0, 6, 6, 2, 2], [0, 6, 2, 2, 6], [0, 3, 3, 3, 3], [0, 90, 90, 99, 99], [0, -99, -99, -90, -90]]
    )
    input = torch.rand(1, 3, 9, 7, device=device, requires_grad=True)
    offset, mask = (torch.rand(5, c, 2, 2, device=device, requires_grad=True) for c in (2, 1))
    output = deform_roi_pool(input, rois.to(device), 2, offset=offset, mask=mask)
    assert output.count_nonzero() == 0
    for gradient in torch.autograd.grad(output.sum(), (input, offset, mask)):
        assert gradient.count_nonzero() == 0
    # With a fixed grid a RoI without area is a point.
    output = deform_roi_pool(input, rois[2:3].to(device), 1, sampling_ratio=2)
    torch.testing.assert_close(output.flatten(), input[0, :, 2:4, 2:4].mean((1, 2)))


@pytest.mark.parametrize("side", (1e3, 1e5))
def test_large_adaptive_rois_equal_the_reference(device, side):
    # More than a hundred samples for each pixel of the map: only those on it are visited, all are counted.
    input = torch.rand(1, 2, 6, 5, dtype=torch.float64, device=device)
    rois = torch.tensor([[0, -side / 3, -side / 2, side, 7.7], [0, -3.1, -side, 9.2, side]], dtype=torch.float64)
    offset = torch.rand(2, 2, 2, 1, dtype=torch.float64) * 6 / side
    output = deform_roi_pool(input, rois.to(device), (2, 1), offset=offset.to(device))
    expected = reference.deform_roi_pool(input.cpu(), rois, (2, 1), offset=offset)
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(output.cpu(), expected, atol=0, rtol=1e-9)


@pytest.mark.parametrize("side", (1e9, 1e20, 1e37))
def test_huge_rois_take_no_time(device, side):
    input = torch.rand(1, 2, 6, 5, device=device, requires_grad=True)
    rois = torch.tensor([[0, -side, -side, side, side]], device=device)
    output = deform_roi_pool(input, rois, 2)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert output.isfinite().all() and gradient.isfinite().all() and output.abs().max() < 1e-12


def test_bits_do_not_depend_on_threads():
    case = make_case("threads", ratio=0, channels=72, mask=(1,))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            tensors = {name: t.float().requires_grad_() for name, t in case.tensors.items()}
            output = call(deform_roi_pool, tensors, case.options)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors.values())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rois(device):
    input = torch.rand(2, 3, 9, 7, device=device, requires_grad=True)
    offset, mask = (torch.zeros(0, c, 3, 2, device=device, requires_grad=True) for c in (2, 1))
    output = deform_roi_pool(input, torch.zeros(0, 5, device=device), (3, 2), offset=offset, mask=mask)
    assert output.shape == (0, 3, 3, 2)
    output.sum().backward()
    for tensor in (input, offset, mask):
        assert tensor.grad.shape == tensor.shape and tensor.grad.count_nonzero() == 0
    empty = deform_roi_pool(input[:0], torch.zeros(0, 5, device=device), 2)
    assert empty.shape == (0, 3, 2, 2)
    assert torch.autograd.grad(empty.sum(), input)[0].count_nonzero() == 0


def test_rois_as_a_list(device):
    input = torch.rand(3, 2, 9, 7, device=device)
    boxes = [torch.rand(k, 4, device=device) * 3 + torch.tensor([0, 0, 4, 4], device=device) for k in (2, 0, 1)]
    rois = torch.cat([torch.tensor([[0.0], [0], [2]], device=device), torch.cat(boxes)], 1)
    assert torch.equal(deform_roi_pool(input, boxes, 2), deform_roi_pool(input, rois, 2))


def test_mixed_dtypes(device):
    case = make_case("v2", mask=(1,))
    for data, position in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ):
        tensors = {
            name: t.to(device, data if name == "input" else position).requires_grad_()
            for name, t in case.tensors.items()
        }
        output = call(deform_roi_pool, tensors, case.options | {"rois": ROIS.to(position)})
        assert output.dtype == data
        for tensor, gradient in zip(tensors.values(), torch.autograd.grad(output.sum(), tensors.values()), strict=True):
            assert gradient.dtype == tensor.dtype


def test_half_types_keep_their_place_on_wide_maps(device):
    # Beyond 2048 neighbouring float16 numbers are 2 pixels apart (bfloat16: beyond 256). Positions must not be rounded
    # so.
    for dtype in (torch.float16, torch.bfloat16):
        input = (torch.arange(4096, device=device) % 7).to(dtype).view(1, 1, 1, -1)
        start = torch.arange(4096.0, device=device)
        rois = torch.stack([0 * start, start, 0 * start, start + 1, 0 * start + 1], 1)
        assert torch.equal(deform_roi_pool(input, rois, 1, sampling_ratio=1).flatten(), input.flatten())


def _good():
    return {
        "input": torch.rand(2, 6, 7, 5),
        "rois": torch.tensor([[0, 1.0, 1, 3, 4], [1, 0, 2, 4, 4], [1, 2, 2, 3, 3]]),
        "output_size": (3, 2),
        "offset": torch.rand(3, 2, 3, 2),
        "mask": torch.rand(3, 1, 3, 2),
    }


def _rois(row, column, value):
    rois = _good()["rois"]
    rois[row, column] = value
    return rois


WRONG = {
    "input_rank": (
        {"input": torch.rand(6, 7, 5)},
        ValueError,
        r"input must be \[N, C, H, W\] .* got shape \[6, 7, 5\]",
    ),
    "input_empty": ({"input": torch.rand(2, 6, 0, 5)}, ValueError, r"input must be .* got shape \[2, 6, 0, 5\]"),
    "input_type": ({"input": [1, 2]}, TypeError, "input must be a tensor, got list"),
    "input_dtype": (
        {"input": torch.ones(2, 6, 7, 5, dtype=torch.int64)},
        TypeError,
        "input must be floating-point, got",
    ),
    "rois_columns": ({"rois": torch.rand(3, 4)}, ValueError, r"rois must be \[n, 5\] .* got shape \[3, 4\]"),
    "rois_rank": ({"rois": torch.rand(5)}, ValueError, r"rois must be \[n, 5\] .* got shape \[5\]"),
    "rois_dtype": ({"rois": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "rois must be floating-point"),
    "rois_device": ({"rois": torch.zeros(3, 5, device="meta")}, ValueError, "rois is on meta, expected .* cpu"),
    "rois_images": ({"rois": [torch.rand(3, 4)]}, ValueError, "rois is for 1 images, but input holds 2"),
    "rois_list_columns": (
        {"rois": [torch.rand(2, 4), torch.rand(1, 5)]},
        ValueError,
        r"rois\[1\] must be \[k, 4\] .* \[1, 5\]",
    ),
    "rois_list_type": ({"rois": [torch.rand(3, 4), None]}, TypeError, r"rois\[1\] must be a tensor, got NoneType"),
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
    "batch_index_broken": (
        {"rois": _rois(0, 0, 0.5)},
        ValueError,
        r"rois\[0\] = .* has batch index 0.5, expected an integer",
    ),
    "batch_index_nan": ({"rois": _rois(1, 0, math.nan)}, ValueError, r"rois\[1\] = .* has batch index nan"),
    "roi_nan": (
        {"rois": _rois(1, 2, math.nan)},
        ValueError,
        r"rois\[1\] = \[1, 0, nan, 4, 4\] has coordinates that are not fin",
    ),
    "roi_infinite": (
        {"rois": _rois(2, 3, math.inf)},
        ValueError,
        r"rois\[2\] = .* has coordinates that are not finite",
    ),
    "output_size": ({"output_size": 0}, ValueError, "output_size must be at least 1, got 0"),
    "output_size_type": ({"output_size": 2.0}, TypeError, "output_size must be an int or a pair of ints"),
    "offset_rois": (
        {"offset": torch.rand(2, 2, 3, 2)},
        ValueError,
        r"offset has shape \[2, 2, 3, 2\], expected \[3, 2, 3, 2\]",
    ),
    "offset_channels": ({"offset": torch.rand(3, 1, 3, 2)}, ValueError, r"offset has shape \[3, 1, 3, 2\], expected"),
    "offset_size": (
        {"offset": torch.rand(3, 2, 2, 3)},
        ValueError,
        r"offset has shape \[3, 2, 2, 3\], expected \[3, 2, 3, 2\]",
    ),
    "offset_dtype": ({"offset": torch.ones(3, 2, 3, 2, dtype=torch.int32)}, TypeError, "offset must be floating-point"),
    "offset_device": ({"offset": torch.rand(3, 2, 3, 2, device="meta")}, ValueError, "offset is on meta"),
    "mask_channels": (
        {"mask": torch.rand(3, 2, 3, 2)},
        ValueError,
        r"mask has shape \[3, 2, 3, 2\], expected \[3, 1, 3, 2\]",
    ),
    "mask_size": ({"mask": torch.rand(3, 2, 2)}, ValueError, r"mask has shape \[3, 2, 2\], expected .* or \[3, 3, 2\]"),
    "mask_device": ({"mask": torch.rand(3, 1, 3, 2, device="meta")}, ValueError, "mask is on meta"),
    "spatial_scale": ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be positive and finite, got 0.0"),
    "spatial_scale_nan": (
        {"spatial_scale": math.nan},
        ValueError,
        "spatial_scale must be positive and finite, got nan",
    ),
    "spatial_scale_type": ({"spatial_scale": "1"}, TypeError, "spatial_scale must be a number, got '1'"),
    "sampling_ratio_type": ({"sampling_ratio": 1.5}, TypeError, "sampling_ratio must be an int, got 1.5"),
    "gamma": ({"gamma": math.inf}, ValueError, "gamma must be finite, got inf"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input(change, error, message):
    with pytest.raises(error, match=f"deform_roi_pool: {message}"):
        deform_roi_pool(**_good() | change)


COMPILED = [name for name in WRONG if not (name.endswith("type") or name.startswith(("rois_images", "rois_list")))]


@pytest.mark.parametrize("name", COMPILED)
def test_wrong_input_to_the_compiled_operator(device, name):
    # The compiled operator is public too (exported programs, C++): it guards itself.
    change, error, _ = WRONG[name]
    args = {"output_size": 1, "spatial_scale": 1.0, "sampling_ratio": 0, "gamma": 0.1} | _good() | change
    tensors = [
        args[key] if args[key].device.type == "meta" else args[key].to(device)
        for key in ("input", "rois", "offset", "mask")
    ]
    size = (args["output_size"],) * 2 if isinstance(args["output_size"], int) else args["output_size"]
    with pytest.raises((error, NotImplementedError), match="deform_roi_pool"):
        torch.ops.dk_detection.deform_roi_pool(
            *tensors, size, args["spatial_scale"], args["sampling_ratio"], args["gamma"]
        )
        find_wrong_rois(device)


@pytest.mark.parametrize("host", HOST_BACKENDS)
@pytest.mark.parametrize(
    ("roi", "what"),
    [((2, 1, 1, 3, 4), "has a batch index that is none"), ((1, 1, math.inf, 3, 4), "has coordinates that are not fin")],
)
def test_a_device_is_not_waited_for(host, roi, what):
    # What it finds arrives late: the result of a wrong RoI is NaN, the others are as they should be, and the next call
    # raises, whatever that one is about. After that all is well again.
    args = _good()
    wrong = args["rois"].clone()
    wrong[1] = torch.tensor(roi)
    with backend(host, "deform_roi_pool"):
        expected = deform_roi_pool(**args)
        with late_reports():
            output = deform_roi_pool(**args | {"rois": wrong})
            assert torch.equal(deform_roi_pool(**args), expected)
        assert torch.equal(output[::2], expected[::2]) and output[1].isnan().all()
        with pytest.raises(ValueError, match=rf"deform_roi_pool: rois\[1\] of an earlier call, 2 .* {what}"):
            deform_roi_pool(**args)
        assert torch.equal(deform_roi_pool(**args), expected)


def test_wrong_rois_are_reported_to_another_operator_and_after_many_calls():
    args = _good()
    args["rois"][2, 0] = -1
    with backend("host_run", "deform_roi_pool"):
        with late_reports():
            deform_roi_pool(**args)
        with (
            backend("host_run", "deform_psroi_pool"),
            pytest.raises(ValueError, match=r"deform_roi_pool: rois\[2\] of an earlier call, 1 RoI pool"),
        ):
            deform_psroi_pool(args["input"], args["rois"], 1, output_channels=6, group_size=1)
        with late_reports():
            deform_roi_pool(**args)
            for _ in range(1100):
                deform_roi_pool(args["input"], args["rois"][:1], 1)
        with pytest.raises(ValueError, match=r"a RoI operator: rois\[2\] of an earlier call, 1101 RoI pool"):
            deform_roi_pool(**args)


def test_wrong_gradient_to_the_compiled_operator(device):
    args = {k: v.to(device) for k, v in _good().items() if isinstance(v, torch.Tensor)}
    tensors = [args[key] for key in ("input", "rois", "offset", "mask")]
    geometry = ((3, 2), 1.0, 0, 0.1)
    backward = torch.ops.dk_detection.deform_roi_pool_backward
    with pytest.raises(ValueError, match="grad_output has shape"):
        backward(torch.rand(3, 6, 2, 3, device=device), *tensors, *geometry, [True] * 3)
    with pytest.raises(TypeError, match="grad_output is Double"):
        backward(torch.rand(3, 6, 3, 2, device=device).double(), *tensors, *geometry, [True] * 3)
    with pytest.raises(ValueError, match="there is no offset"):
        backward(torch.rand(3, 6, 3, 2, device=device), *tensors[:2], None, None, *geometry, [True, True, False])
    with pytest.raises(ValueError, match="there is no mask"):
        backward(torch.rand(3, 6, 3, 2, device=device), *tensors[:3], None, *geometry, [True] * 3)


@pytest.mark.parametrize("host", HOST_BACKENDS)
@pytest.mark.parametrize("deterministic", (False, True))
def test_device_backward_guards_itself_against_wrong_rois(deterministic, host):
    # Devices report the values of RoIs in the forward only. The bodies must not read or write with them.
    args = _good()
    rois = torch.tensor([[2.0, 1, 1, 3, 4], [-1, 0, 2, 4, 4], [1, math.nan, 2, 3, 3]])
    grad = torch.rand(3, 6, 3, 2)
    torch.use_deterministic_algorithms(deterministic)
    try:
        gradients = getattr(torch.ops.dk_detection, f"_deform_roi_pool_{host}_backward")(
            grad, args["input"], rois, args["offset"], args["mask"], (3, 2), 1.0, 2, 0.1, [True] * 3
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("host", HOST_BACKENDS)
def test_while_a_graph_is_recorded(host):
    # A wrong RoI gives NaN, and an error in the call after a replay; what needs a size from the device is refused.
    args = _good()
    args["input"].requires_grad_()
    others = {name: args[name][::2] for name in ("rois", "offset", "mask")}
    expected = deform_roi_pool(**args | others)
    (wanted,) = torch.autograd.grad(expected.sum(), args["input"])
    args["rois"] = args["rois"].clone()
    args["rois"][1, 0] = 7
    torch.ops.dk_detection._host_run_record(True)
    try:
        with backend(host, "deform_roi_pool"), late_reports():
            output = deform_roi_pool(**args)
            output[::2].sum().backward()
            torch.use_deterministic_algorithms(True)
            with pytest.raises(RuntimeError, match=r"deform_roi_pool: the deterministic gradient .* CUDA graph"):
                deform_roi_pool(**args).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.ops.dk_detection._host_run_record(False)
    torch.testing.assert_close(output[::2], expected)
    assert output[1].isnan().all()
    torch.testing.assert_close(args["input"].grad, wanted)
    with pytest.raises(ValueError, match=r"rois\[1\] of an earlier call"):
        find_wrong_rois(host)


@pytest.mark.cuda
def test_cuda_graph():
    args = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in _good().items()}
    expected = deform_roi_pool(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = deform_roi_pool(**args)
    graph.replay()
    assert torch.equal(output, expected)
    args["rois"][1, 0] = 7
    graph.replay()
    assert torch.equal(output[::2], expected[::2]) and output[1].isnan().all()
    with pytest.raises(ValueError, match=r"deform_roi_pool: rois\[1\] of an earlier call"):
        find_wrong_rois("cuda")


def test_flops():
    case = make_case("v2", mask=(1,), ratio=3)
    tensors = {name: t.requires_grad_() for name, t in case.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        output = call(deform_roi_pool, tensors, case.options)
        forward = counter.get_total_flops()
        output.sum().backward()
    # 6 RoIs, 5 channels, 3 x 2 bins, 3 x 3 sampled values in each, 2 for each, 1 for a bin's modulation
    multiply_adds = 6 * 5 * 3 * 2 * (3 * 3 * 2 + 1)
    assert forward == 2 * multiply_adds
    assert counter.get_total_flops() == 3 * forward
    shapes = [(2, 5, 9, 7), (6, 5), (6, 2, 3, 2), (6, 1, 3, 2), None, None, None, None]
    # A tool that passes only tensors on, and an adaptive grid, count 2 x 2 samples.
    assert MULTIPLY_ADDS["dk_detection::deform_roi_pool"](shapes, output.shape) == 6 * 5 * 3 * 2 * (8 + 1)
    shapes[3], shapes[6] = None, 0
    assert MULTIPLY_ADDS["dk_detection::deform_roi_pool"](shapes, output.shape) == 6 * 5 * 3 * 2 * 8


def test_compile_with_dynamic_shapes():
    function = torch.compile(deform_roi_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (6, 4, 5):
        case = make_case("v2", rois=ROIS[:count], mask=(1,))
        torch.testing.assert_close(
            call(function, case.tensors, case.options), call(deform_roi_pool, case.tensors, case.options)
        )


def test_export():
    class Net(torch.nn.Module):
        def forward(self, input, rois, offset, mask):
            return deform_roi_pool(input, rois, (3, 2), offset=offset, mask=mask, spatial_scale=SCALE)

    case = make_case("v2", mask=(1,))
    args = (case.tensors["input"], ROIS, case.tensors["offset"], case.tensors["mask"])
    program = torch.export.export(Net(), args)
    torch.testing.assert_close(program.module()(*args), Net()(*args))
