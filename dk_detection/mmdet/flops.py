"""Makes `mmengine.analysis` (mmdet's get_flops.py) see our operators; without a handle they count as nothing."""

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from dk_detection.ops.flops import MULTIPLY_ADDS


def _handle(multiply_adds):
    def handle(inputs, outputs):  # values of a jit trace
        return multiply_adds([_argument(value) for value in inputs], get_shape(outputs[0]))

    return handle


def _argument(value):
    """The shape of a tensor, a constant as it is, and None for all else."""
    shape = get_shape(value)
    return value.toIValue() if shape is None else shape


def register() -> None:
    """Adds handles for the FLOPs and the activations of each operator. May be called again."""
    for operator, multiply_adds in MULTIPLY_ADDS.items():
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[operator] = _handle(multiply_adds)
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[operator] = generic_activation_jit()
