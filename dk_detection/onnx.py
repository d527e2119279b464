"""What a program that `torch.export` has made needs before it goes to ONNX; see docs/onnx.md."""

from collections.abc import Callable

import torch


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """For each of our operators what it is in those that ONNX knows.

    `torch.onnx.export(module, ...)` finds them by itself. A program that has been exported already names our operators;
    `program.run_decompositions(dk_detection.onnx.decompositions())` takes them out of it.
    """
    from dk_detection.ops._operator import OPERATORS

    return {operator.forward: operator.in_onnx for operator in OPERATORS if operator.forward is not None}
