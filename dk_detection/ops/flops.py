"""Multiply-adds of our operators, for every tool that counts FLOPs.

`MULTIPLY_ADDS` maps the operator's name in a trace to a function of its tensors' shapes. A multiply-add is one FLOP
here, as in the papers and in mmengine and fvcore; `torch.utils.flop_counter`, which counts two, gets twice as many.
"""

from collections.abc import Callable, Sequence

import torch

# What one value costs that was obtained by bilinear sampling, in multiply-adds: the counting rule under which the
# figures of Deformable Kernels, Tables 1 and 2, come out.
SAMPLED_VALUE = 2

MULTIPLY_ADDS: dict[str, Callable[[Sequence, Sequence], int]] = {}


def register(operator: str, multiply_adds: Callable[[Sequence, Sequence], int]) -> None:
    """Makes the FLOP counters see `operator`.

    Args:
        operator: name without the namespace, e.g. "deform_conv2d".
        multiply_adds: from the shapes of all arguments (None for what is no tensor, in the schema's order) and the
            shape of the output to the number of multiply-adds.
    """
    from torch.utils.flop_counter import register_flop_formula

    MULTIPLY_ADDS[f"dk_detection::{operator}"] = multiply_adds
    namespace = torch.ops.dk_detection

    @register_flop_formula(getattr(namespace, operator))
    def forward(*shapes, out_shape=None, **kwargs):
        return 2 * multiply_adds(shapes, out_shape)

    @register_flop_formula(getattr(namespace, f"{operator}_backward"))
    def backward(grad_shape, *shapes, out_shape=None, **kwargs):
        # The gradients of the input and of the weight cost a forward each.
        return 2 * 2 * multiply_adds(shapes, grad_shape)
