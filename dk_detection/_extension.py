"""Loads the compiled library. Where that fails the reason is kept and told at the first call of an operator."""

from collections.abc import Sequence

import torch

from dk_detection.errors import UserError

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
    operator = getattr(torch.ops.dk_detection, "deform_conv2d", None) if is_available() else None
    return operator is not None and operator.default.has_kernel_for_dispatch_key("CUDA")


def find(operator: str, arguments: Sequence[str]) -> tuple | None:
    """`operator` and its backward from the compiled library.

    Args:
        operator: Its name.
        arguments: The names of its arguments, in order.

    Returns:
        Both, or None if the library is missing or has no such operator: it was then built from other sources than the
        Python files beside it.
    """
    if not is_available():
        return None
    found = [getattr(torch.ops.dk_detection, name, None) for name in (operator, f"{operator}_backward")]
    if None in found or [a.name for a in found[0].default._schema.arguments] != list(arguments):
        return None
    return tuple(packet.default for packet in found)


class MissingOperatorError(UserError, RuntimeError):
    """The compiled library is not there, or of other sources."""


def missing(operator: str) -> MissingOperatorError:
    """The error that says why `operator`, which `find` did not find, cannot run, and the way out."""
    if is_available():
        reason = "does not have this operator as it is called here: it was built from other sources. Build it again"
    else:
        reason = f"could not be loaded ({_error}). It has to be built for the installed torch {torch.__version__}"
    error = MissingOperatorError(
        f"{operator}: the compiled library of dk_detection {reason}: in the project's folder run `{_BUILD}`, or "
        "`make setup`."
    )
    error.__cause__ = _error
    return error
