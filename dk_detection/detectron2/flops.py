"""Makes fvcore (Detectron2's analyze_model.py) see our operators; without a handle they count as nothing."""

from fvcore.nn.activation_count import _DEFAULT_SUPPORTED_OPS as ACTIVATION_OPS
from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS as FLOP_OPS
from fvcore.nn.jit_handles import generic_activation_jit, get_shape

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
        FLOP_OPS[operator] = _handle(multiply_adds)
        ACTIVATION_OPS[operator] = generic_activation_jit()
