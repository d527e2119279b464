"""Makes fvcore (Detectron2's analyze_model.py) see our operators; without a handle they count as nothing."""

from fvcore.nn.activation_count import _DEFAULT_SUPPORTED_OPS as ACTIVATION_OPS
from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS as FLOP_OPS
from fvcore.nn.jit_handles import generic_activation_jit, get_shape

from dk_detection.ops.flops import MULTIPLY_ADDS, jit_handle


def register() -> None:
    """Adds handles for the FLOPs and the activations of each operator. May be called again."""
    for operator, multiply_adds in MULTIPLY_ADDS.items():
        FLOP_OPS[operator] = jit_handle(multiply_adds, get_shape)
        ACTIVATION_OPS[operator] = generic_activation_jit()
