"""Makes `mmengine.analysis` (mmdet's get_flops.py) see our operators; without a handle they count as nothing."""

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from dk_detection.ops.flops import MULTIPLY_ADDS, jit_handle


def register() -> None:
    """Adds handles for the FLOPs and the activations of each operator. May be called again."""
    for operator, multiply_adds in MULTIPLY_ADDS.items():
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[operator] = jit_handle(multiply_adds, get_shape)
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[operator] = generic_activation_jit()
