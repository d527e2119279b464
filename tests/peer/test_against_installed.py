"""Our operator and the peers' on the same tensors: output and every gradient."""

import dataclasses

import mmcv.ops
import pytest
import torch
import torchvision

from dk_detection.ops import deform_conv2d

# The same sums in another order: some hundred products, of size 1.
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-10), torch.float32: dict(rtol=1e-4, atol=1e-5)}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def tensors(self, dtype, names):
        """The named arguments. Offsets of 1.5 pixels send taps outside the map too; none lands on an integer."""
        generator = torch.Generator().manual_seed(0)
        taps = self.kernel[0] * self.kernel[1]
        out = tuple(
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        shapes = dict(
            input=(self.batch, self.channels, *self.size),
            offset=(self.batch, 2 * self.offset_groups * taps, *out),
            weight=(self.out_channels, self.channels // self.groups, *self.kernel),
            bias=(self.out_channels,),
            mask=(self.batch, self.offset_groups * taps, *out),
        )
        tensors = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
        tensors["offset"] *= 1.5
        return {name: tensors[name].requires_grad_() for name in names}


CASES = {
    "plain": Case(2, 3, 4, (7, 9), (3, 3), padding=(1, 1)),
    "odd": Case(3, 4, 6, (11, 8), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "groups": Case(2, 12, 8, (6, 9), (2, 3), stride=(1, 2), padding=(2, 1), groups=4),
    "offset groups": Case(2, 12, 4, (5, 7), (3, 1), padding=(1, 0), offset_groups=6),
    "both groups": Case(1, 12, 6, (8, 5), (3, 3), padding=(2, 2), dilation=(1, 2), groups=2, offset_groups=3),
    "depthwise": Case(2, 6, 6, (7, 6), (3, 3), padding=(1, 1), groups=6, offset_groups=2),
}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def mmcv_v1(case, input, offset, weight):
    return mmcv.ops.deform_conv2d(input, offset, weight, *case.geometry, case.groups, case.offset_groups)


def mmcv_v2(case, input, offset, mask, weight, bias=None):
    return mmcv.ops.modulated_deform_conv2d(
        input, offset, mask, weight, bias, *case.geometry, case.groups, case.offset_groups
    )


def assert_same(case, peer, tensors, dtype):
    """Both operators agree on the output and on the gradient of every tensor."""
    expected = peer(**tensors)
    output = deform_conv2d(**tensors, **dict(zip(("stride", "padding", "dilation"), case.geometry, strict=True)))
    torch.testing.assert_close(output, expected, **TOLERANCE[dtype])
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    leaves = tuple(tensors.values())
    for name, ours, theirs in zip(
        tensors, torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype], msg=lambda text, name=name: f"d {name}: {text}")


@cases
@dtypes
@pytest.mark.parametrize(
    "names",
    [("input", "offset", "weight"), ("input", "offset", "weight", "bias", "mask")],
    ids=["v1", "v2"],
)
def test_equals_torchvision(case, dtype, names):
    def peer(**tensors):
        stride, padding, dilation = case.geometry
        return torchvision.ops.deform_conv2d(**tensors, stride=stride, padding=padding, dilation=dilation)

    assert_same(case, peer, case.tensors(dtype, names), dtype)


@cases
@dtypes
def test_equals_mmcv_v1(case, dtype):
    tensors = case.tensors(dtype, ("input", "offset", "weight"))
    assert_same(case, lambda **t: mmcv_v1(case, **t), tensors, dtype)


@cases
@dtypes
def test_equals_mmcv_v2(case, dtype):
    tensors = case.tensors(dtype, ("input", "offset", "mask", "weight", "bias"))
    assert_same(case, lambda **t: mmcv_v2(case, **t), tensors, dtype)


def test_gradient_at_minus_one_is_that_of_mmcv():
    """At rest with padding 1 the outer taps look exactly at -1, where the derivative by the offset has a kink.

    torchvision takes a one-sided derivative there; mmcv, detectron2 and this project count the position as outside.
    Outputs agree.
    """
    case = CASES["plain"]
    tensors = case.tensors(torch.float64, ("input", "offset", "mask", "weight"))
    with torch.no_grad():
        tensors["offset"].zero_()
    assert_same(case, lambda **t: mmcv_v2(case, **t), tensors, torch.float64)
    torch.testing.assert_close(
        deform_conv2d(**tensors, padding=case.padding), torchvision.ops.deform_conv2d(**tensors, padding=case.padding)
    )
