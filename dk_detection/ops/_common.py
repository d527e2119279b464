"""What the functions of all operators share: arguments, autocast, tensor-likes that take a call over."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function, has_torch_function


def overridable(function: Callable) -> Callable:
    """Lets arguments with a `__torch_function__` take the call over, as torch's own functions do.

    The proxies of `torch.fx` have one, so in a traced graph the call is one node, whoever makes it.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        values = (*args, *kwargs.values())
        relevant = tuple(v for value in values for v in (value if isinstance(value, (list, tuple)) else (value,)))
        if has_torch_function(relevant):
            return handle_torch_function(call, relevant, *args, **kwargs)
        return function(*args, **kwargs)

    # Code of its own, or torch.compile counts the recompilations of all operators together.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return call


def pair(operator: str, name: str, value, least: int) -> tuple[int, int]:
    """An int or a pair of ints as (vertical, horizontal).

    Raises:
        TypeError: `value` is neither.
        ValueError: a value is below `least`.
    """
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != 2 or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{operator}: {name} must be an int or a pair of ints, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{operator}: {name} must be at least {least}, got {value!r}")
    return values


def check_tensor(
    operator: str, name: str, tensor, like: torch.Tensor | None = None, *, same_dtype: bool = True
) -> None:
    """Checks that `tensor` is a floating-point tensor on the device (and of the dtype) of `like`, the operator's input.

    Raises:
        TypeError: not a tensor, or the wrong dtype.
        ValueError: another device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{operator}: {name} must be floating-point, got {tensor.dtype}")
    if like is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{operator}: {name} is on {tensor.device}, expected the device of input, {like.device}")
    if same_dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{operator}: {name} is {tensor.dtype}, expected the dtype of input, {like.dtype}")


def _has_autocast(device_type: str) -> bool:
    """Not on the meta device. (`torch.amp.is_autocast_available` would break the graph of `torch.compile`.)"""
    return device_type != "meta"


def autocast(device_type: str, *tensors):
    """Casts tensors as torch's own convolution does under autocast: to its dtype, except float64 and integers.

    Sampling positions are not for casting: float16 cannot tell neighbouring pixels apart at coordinate 2048.
    """
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches autocast off, on devices that have it."""
    if _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
