"""What counting a detector part by part takes, whatever its framework."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dk_detection.complexity.counting import Part, multiply_adds, parameters, total
from dk_detection.convert import fold_scopes
from dk_detection.errors import UserError
from dk_detection.ops.flops import MULTIPLY_ADDS


def count_file(
    path: str | os.PathLike, build: Callable[[str], nn.Module], count: Callable[[nn.Module], list[Part]]
) -> list[Part]:
    """Counts the detector of a config file.

    Args:
        path: The config.
        build: Builds the detector that it describes; here, on the meta device. It is then folded for inference.
        count: Counts a detector.

    Raises:
        UserError: The detector cannot be built, or `count` raises it. The message names the file.
    """
    path = os.fspath(path)
    try:
        with torch.device("meta"):
            detector = fold_scopes(build(path))
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with a file that names classes
        raise UserError(f"{path}: the config's model cannot be built ({type(error).__name__}: {error})") from error
    try:
        return count(detector)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class DetectorCounter:
    """Runs the parts of a detector one after the other and keeps what they count.

    Args:
        detector: The detector; it is put into evaluation mode.
        aligned_pooling: The framework's layer of aligned RoI pooling, with a `sampling_ratio`.
    """

    def __init__(self, detector: nn.Module, aligned_pooling: type[nn.Module]) -> None:
        self.detector = detector.eval()
        self.aligned_pooling = aligned_pooling
        self.parts: list[Part] = []
        self.modules: list[nn.Module] = []

    def __call__(self, name: str, modules: Sequence[nn.Module | None], run: Callable[[], object]):
        """Adds a part whose parameters are those of `modules`, but for those counted before. Returns what `run` does.

        Raises:
            UserError: `run` fails: the image is too small, or an operator computes no shapes on the meta device.
        """
        result = None

        def keep() -> None:
            nonlocal result
            result = run()

        try:
            with self._pooling() as pooled:
                flops = multiply_adds(keep)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"the {name} ({type(modules[0]).__name__}) cannot be counted: {lines[0]}") from error
        modules = [module for module in modules if module is not None]
        self.parts.append(
            Part(name, parameters(*self.modules, *modules) - parameters(*self.modules), flops + sum(pooled))
        )
        self.modules += modules
        return result

    @contextmanager
    def _pooling(self) -> Iterator[list[int]]:
        """Collects what aligned pooling costs, by the rule for our RoI pooling: torch's counter does not see it."""
        pooled = []

        def hook(layer, inputs, output):
            arguments = [None] * 6 + [layer.sampling_ratio]
            pooled.append(MULTIPLY_ADDS["dk_detection::deform_roi_pool"](arguments, output.shape))

        layers = [layer for layer in self.detector.modules() if isinstance(layer, self.aligned_pooling)]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            yield pooled
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> list[Part]:
        """The parts, and last, as "not run", the parameters that are in none of them."""
        rest = parameters(self.detector) - total(self.parts).parameters
        return self.parts + ([Part("not run", rest, 0)] if rest else [])


def zero_on_cpu(module: nn.Module) -> nn.Module:
    """Moves a module from the meta device to the CPU and fills its parameters and buffers with zeros, in place."""
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().zero_()
    return module


def fixed_rois(number: int, shape: tuple[int, int]) -> Tensor:
    """RoIs [number, 5] of one image (H, W), of all sizes that a pyramid tells apart and all over the image."""
    height, width = shape
    index = torch.arange(number)
    side = 2.0 ** (4 + index % 6)  # 16 to 512 pixels
    h, w = side.clamp(max=height), side.clamp(max=width)
    # Steps of the golden ratio and of the square root of 2 spread evenly over the image for any number.
    x, y = (index * 0.618034 % 1) * (width - w), (index * 0.414214 % 1) * (height - h)
    return torch.stack([torch.zeros(number), x, y, x + w, y + h], dim=1)
