"""Multiply-adds of our operators, for every tool that counts FLOPs.

`MULTIPLY_ADDS` maps the operator's name in a trace to a function of its arguments. A multiply-add is one FLOP
here, as in the papers and in mmengine and fvcore; `torch.utils.flop_counter`, which counts two, gets twice as many.
"""

from collections.abc import Callable, Sequence

import torch

# What one value costs that was obtained by bilinear sampling, in multiply-adds: the counting rule under which the steps
# from a rigid network to one with local DK, with DCN and with both come out as in Deformable Kernels, Tables 1 and 2.
SAMPLED_VALUE = 2
# What its modulation adds, a product. With it the last step of Deformable ConvNets v2, Table 1, comes out.
MODULATED_VALUE = 1

MULTIPLY_ADDS: dict[str, Callable[[Sequence, Sequence], int]] = {}


def jit_handle(multiply_adds: Callable[[Sequence, Sequence], int], get_shape: Callable) -> Callable:
    """The handle by which a counter of fvcore's kind, also MMEngine's, counts an operator in a jit trace.

    Args:
        multiply_adds: As in `MULTIPLY_ADDS`.
        get_shape: The counter's own function, from a value of the trace to its shape or to None.
    """

    def argument(value):
        """The shape of a tensor, a constant as it is, and None for all else."""
        shape = get_shape(value)
        return value.toIValue() if shape is None else shape

    def handle(inputs, outputs):  # values of a jit trace
        return multiply_adds([argument(value) for value in inputs], get_shape(outputs[0]))

    return handle


def register(operator: str, multiply_adds: Callable[[Sequence, Sequence], int], *, compiled: bool) -> None:
    """Makes the FLOP counters see `operator`.

    Args:
        operator: name without the namespace, e.g. "deform_conv2d".
        multiply_adds: from all arguments, in the schema's order, and the shape of the output to the number of
            multiply-adds. Tensors come as their shapes; numbers as they are, where the counting tool knows them, and
            lists of numbers as they are or as None.
        compiled: whether there is such an operator for `torch.utils.flop_counter` to see.
    """
    MULTIPLY_ADDS[f"dk_detection::{operator}"] = multiply_adds
    if not compiled:
        return
    from torch.utils.flop_counter import register_flop_formula

    namespace = torch.ops.dk_detection

    @register_flop_formula(getattr(namespace, operator))
    def forward(*shapes, out_shape=None, **kwargs):
        return 2 * multiply_adds(shapes, out_shape)

    @register_flop_formula(getattr(namespace, f"{operator}_backward"))
    def backward(grad_shape, *shapes, out_shape=None, **kwargs):
        # The gradients of the input and of the weight cost a forward each.
        return 2 * 2 * multiply_adds(shapes, grad_shape)
