"""The switch of the fused kernels, and which calls they serve."""

import math
import warnings

import torch

from dk_detection.ops._operator import memory_format
from dk_detection.ops.deform_conv2d import _output_shape

_library: torch.library.Library | None = None


class use_fused:
    """Lets fused kernels serve calls on CUDA: `use_fused()` from here on, `with use_fused():` inside the block.

    A fused kernel multiplies samples by the filter as it takes them, on tensor cores, without a buffer of columns. They
    are off by default, until figures from a GPU are recorded. The switch is one for the whole process. It exchanges the
    kernels behind `torch.ops.dk_detection.*`, so it holds alike for functions, layers, compiled and exported programs,
    and for the backward of what ran forward before.

    Served are calls of `deform_conv2d`, forward and backward, if

    - input is float16 or bfloat16, or float32 while torch lets CUDA's matrix products use TF32
      (`torch.backends.cuda.matmul.fp32_precision` or `allow_tf32`);
    - 16 divides the output channels of a group, and the number of input channels in a row that are of one group and of
      one offset group: gcd(C / groups, C / offset_groups). Depthwise filters are not among these;
    - the batch is not empty, and the GPU's compute capability is 8.0 or higher;
    - in the backward, `torch.use_deterministic_algorithms(True)` is not set: its sums are by atomics.

    Every other call, and every other operator, goes to the kernels that serve it without the switch.

    Args:
        mode: Whether fused kernels are used.

    Raises:
        RuntimeError: the compiled library has no CUDA kernels, or Triton, of which the fused kernels are made and which
            comes with torch for CUDA on Linux, is missing or older than 3.6.
    """

    def __init__(self, mode: bool = True) -> None:
        self._previous = _switch(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        _switch(self._previous)


def _switch(mode):
    global _library
    previous = _library is not None
    if previous and not mode:
        _library._destroy()
        _library = None
    elif mode and not previous:
        _library = install("CUDA", "cuda")
    return previous


def install(key: str, other: str) -> torch.library.Library:
    """Puts fused kernels behind a dispatch key, until the result's `_destroy`.

    Args:
        key: Such as "CUDA".
        other: Suffix of the operators that serve the calls that are not covered: `_deform_conv2d_<other>`.
    """
    others = [getattr(torch.ops.dk_detection, f"_deform_conv2d_{other}{suffix}", None) for suffix in ("", "_backward")]
    if None in others:
        raise RuntimeError(f"use_fused: the compiled library of dk_detection has no kernels for {key}")
    try:
        import triton

        from dk_detection.ops._fused_deform_conv2d import Call
    except ImportError as error:
        raise RuntimeError(f"use_fused: the fused kernels need Triton 3.6 or newer ({error})") from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        raise RuntimeError(f"use_fused: the fused kernels need Triton 3.6 or newer, got {triton.__version__}")

    def forward(input, offset, mask, weight, bias, stride, padding, dilation):
        out_shape = _output_shape(input, offset, mask, weight, bias, stride, padding, dilation)
        if not covers(input, offset, weight):
            return others[0](input, offset, mask, weight, bias, stride, padding, dilation)
        with torch.cuda.device_of(input):
            call = Call(input, offset, mask, weight, stride, padding, dilation, out_shape[2:])
            return _in_format(call.forward(bias), input)

    def backward(grad_output, input, offset, mask, weight, stride, padding, dilation, output_mask):
        out_shape = _output_shape(input, offset, mask, weight, None, stride, padding, dilation)
        fits = (grad_output.shape, grad_output.dtype, grad_output.device) == (out_shape, input.dtype, input.device)
        served = fits and covers(input, offset, weight) and not torch.are_deterministic_algorithms_enabled()
        if not served or (mask is None and output_mask[2]):
            return others[1](grad_output, input, offset, mask, weight, stride, padding, dilation, output_mask)
        with torch.cuda.device_of(input):
            call = Call(input, offset, mask, weight, stride, padding, dilation, out_shape[2:])
            gradients = call.backward(grad_output.permute(0, 2, 3, 1).contiguous(), output_mask)
            by_input, by_offset, by_mask, by_weight, by_bias = (
                input.new_empty(0) if gradient is None else gradient.to(like.dtype)
                for gradient, like in zip(gradients, (input, offset, mask, weight, weight), strict=True)
            )
            if output_mask[0]:
                by_input = _in_format(by_input, input)
            if output_mask[3]:
                by_weight = by_weight.permute(0, 3, 1, 2).contiguous()
            return by_input, by_offset, by_mask, by_weight, by_bias

    library = torch.library.Library("dk_detection", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the purpose
        library.impl("deform_conv2d", forward, key, allow_override=True)
        library.impl("deform_conv2d_backward", backward, key, allow_override=True)
    return library


def covers(input: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether fused kernels serve a call of `deform_conv2d`, its arguments checked, and its backward."""
    if input.is_cuda and torch.cuda.get_device_capability(input.device) < (8, 0):
        return False
    if input.dtype not in (torch.float16, torch.bfloat16) and not (input.dtype == torch.float32 and _tf32()):
        return False
    outputs, group_in, kernel_h, kernel_w = weight.shape
    channels = input.shape[1]
    groups, offset_groups = channels // group_in, offset.shape[1] // (2 * kernel_h * kernel_w)
    in_a_row = math.gcd(group_in, channels // offset_groups)
    return len(input) > 0 and outputs // groups % 16 == 0 and in_a_row % 16 == 0


def _tf32():
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 the old name is an error where the new one has been set.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _in_format(result, input):
    """[N, H, W, C] as [N, C, H, W] in the memory format of `input`."""
    return result.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(input))
