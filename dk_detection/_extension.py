"""Loads the compiled library. Where that fails the reason is kept and told at the first call of an operator."""

import torch

_BUILD = "pip install --no-build-isolation -e ."

try:
    from dk_detection import _C  # noqa: F401  (importing it registers the operators)

    _error = None
except ImportError as error:
    _error = error


def is_available() -> bool:
    """Whether the compiled library is loaded."""
    return _error is None


def built_with_cuda() -> bool:
    """Whether the compiled library holds the CUDA kernels."""
    return is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("dk_detection::deform_conv2d", "CUDA")


def require(operator: str) -> None:
    """Raises RuntimeError with the way out if `operator` cannot run because the compiled library is missing."""
    if _error is not None:
        raise RuntimeError(
            f"{operator}: the compiled library of dk_detection could not be loaded ({_error}). It has to be built for "
            f"the installed torch {torch.__version__}: in the project's folder run `{_BUILD}`, or `make setup`."
        ) from _error
