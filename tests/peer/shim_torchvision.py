"""torchvision's `TestDeformConv` over our function and layer."""

import functools

import adapter
import torch
import torch.testing._internal.optests as optests
import torchvision
from torch import Tensor

import dk_detection.layers
import dk_detection.ops

SELECTED = ("test_ops.py::TestDeformConv",)
DESELECTED: dict[str, str] = {}

_ERRORS = {
    "deform_conv2d: offset": (RuntimeError, "the shape of the offset: "),
    "deform_conv2d: mask": (RuntimeError, "mask.shape[1] is not valid: "),
}


def _deform_conv2d(input, offset, weight, bias, *rest):
    with adapter.our_operator(_ERRORS):
        try:
            return dk_detection.ops.deform_conv2d(input, offset, weight, bias, *rest)
        except TypeError:
            # torchvision finds a wrong shape before a wrong dtype, ours the other way round, and `test_wrong_sizes`
            # calls a float32 module with float64 tensors of the wrong shape.
            weight, bias = (t if t is None else t.to(input.dtype) for t in (weight, bias))
            dk_detection.ops.deform_conv2d(input, offset, weight, bias, *rest)
            raise


# The suite also scripts function and module. TorchScript does not compile our Python checks, so scripted code calls the
# C++ operator, which has checks of its own.
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        output = _deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    else:
        output = torch.ops.dk_detection.deform_conv2d(
            input,
            offset,
            mask,
            weight,
            bias,
            [stride[0], stride[1]],
            [padding[0], padding[1]],
            [dilation[0], dilation[1]],
        )
    return output


class DeformConv2d(dk_detection.layers.DeformConv2d):
    """Our layer with torchvision's forward: the caller brings the offset that our branch would compute."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


def install() -> None:
    for module in (torchvision.ops, torchvision.ops.deform_conv):
        module.deform_conv2d = deform_conv2d
        module.DeformConv2d = DeformConv2d

    generate = optests.generate_opcheck_tests

    @functools.wraps(generate)
    def generate_for_ours(*args, testcase, namespaces, **kwargs):
        if testcase.__name__ == "TestDeformConv":
            namespaces = ["dk_detection"]
        return generate(*args, testcase=testcase, namespaces=namespaces, **kwargs)

    optests.generate_opcheck_tests = generate_for_ours
