"""What the shims share: a peer's error types, the proof that its tests reached our operator, a CUDA that is the CPU."""

import contextlib
from collections.abc import Iterator

import torch

calls = 0


@contextlib.contextmanager
def translated(errors: dict[str, tuple[type[Exception], str]]) -> Iterator[None]:
    """Turns our ValueError into the error that the peer raises.

    Args:
        errors: start of our message -> (the peer's type, the peer's words). Our message follows those words.
    """
    try:
        yield
    except ValueError as error:
        for start, (kind, words) in errors.items():
            if str(error).startswith(start):
                raise kind(words + str(error)) from error
        raise


@contextlib.contextmanager
def our_operator(errors: dict[str, tuple[type[Exception], str]]) -> Iterator[None]:
    """`translated` around a call of our operator or of a layer of ours; the runner wants to have seen some."""
    global calls
    calls += 1
    with translated(errors):
        yield


class CudaIsCpu:
    """torch as a suite's module sees it on a machine without CUDA, for peers that have no CPU kernels."""

    cuda = type("cuda", (), {"is_available": staticmethod(lambda: True)})

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def tensor(self, *args, device: str, **kwargs) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)
