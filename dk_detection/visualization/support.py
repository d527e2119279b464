"""Which pixels a response depends on: the effective receptive field, and the error-bounded saliency region."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dk_detection.errors import UserError
from dk_detection.visualization.paths import check_image, find_layer

# From an image [1, C, H, W] to what is asked about, a tensor of any shape: the channels of a node, the scores of a RoI.
Response = Callable[[Tensor], Tensor]

_FEWEST = 8  # trials, however little time there is: they find the region to a 256th of the image


def node_response(
    network: nn.Module, layer: str, node: tuple[int, int], run: Callable[[Tensor], object] | None = None
) -> Response:
    """The response of a node: the channels of a module's output at one position.

    Args:
        network: Any network in evaluation mode.
        layer: Dotted name of the module.
        node: (row, column) in its output.
        run: How to run the network; None: `network(image)`.

    Returns:
        A function from an image to [C].

    Raises:
        UserError: The network is in training mode or has no such module.
    """
    module = find_layer(network, layer)

    def stop(module, args, output):
        raise _Reached(output)

    def response(image: Tensor) -> Tensor:
        handle = module.register_forward_hook(stop)  # what comes behind the node need not be computed
        try:
            (run or network)(image)
        except _Reached as reached:
            return reached.output[0, :, node[0], node[1]]
        finally:
            handle.remove()
        raise UserError(f"{layer} did not run")

    return response


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        self.output = output


def effective_receptive_field(response: Response, image: Tensor) -> Tensor:
    """How much each pixel sways a response: Luo et al. (2016), Section 2.1 of Deformable ConvNets v2 (2018).

    Args:
        response: What is asked about. Its values are summed.
        image: [1, C, H, W].

    Returns:
        [H, W], the absolute gradient of the sum by each pixel, summed over the image's channels. All zero where the
        response is flat, as behind a ReLU that is off.

    Raises:
        UserError: The response does not depend on the image.
    """
    return _response_and_field(response, image)[1]


def _response_and_field(response: Response, image: Tensor) -> tuple[Tensor, Tensor]:
    check_image(image)
    leaf = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = response(leaf)
        total = values.sum()
    gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise UserError("the response does not depend on the image, so it has no receptive field")
    return values.detach(), gradient[0].abs().sum(0)


@dataclass(frozen=True)
class Region:
    """What of an image is enough for a response.

    Attributes:
        mask: [H, W], true where the image has to be seen.
        error: Relative difference of the response to the region and to the whole image.
        evaluations: How often the response was computed.
        is_minimal: Whether no cell of it can be left out; otherwise the search ended early.
    """

    mask: Tensor
    error: float
    evaluations: int
    is_minimal: bool


def saliency_region(
    response: Response,
    image: Tensor,
    *,
    bound: float = 0.1,
    cell: int = 8,
    max_evaluations: int = 300,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> Region:
    """A smallest region of an image that gives the same response within a bound: Section 2.1, Deformable ConvNets v2.

    The paper masks the image progressively. Here it is cut into square cells, in the order of what the effective
    receptive field has in them, the least first, and the image's mean colour takes the place of cells. First, by
    bisection, comes a run of cells from the beginning, as long as the response stays within the bound. Then runs of
    what is left are tried, at first half of it; after each pass over what is left, runs are half as long, down to
    single cells. Passes over single cells are repeated until one masks nothing. The region then is smallest in the
    sense that none of its cells can be left out; finding the smallest of all is not feasible.

    Args:
        response: What is asked about.
        image: [1, C, H, W].
        bound: Largest norm of the response's change, relative to the norm of the response.
        cell: Side of a cell in pixels.
        max_evaluations: The search ends after so many computations of the response; its region keeps the bound, but may
            be larger than need be.
        seconds: The same after so much time, but not before 8 trials.
        progress: Called before each computation, with how many are done and `max_evaluations`.

    Returns:
        The region.

    Raises:
        UserError: The response is zero, or does not depend on the image.
    """
    start = time.monotonic()
    whole, field = _response_and_field(response, image)
    if not whole.norm() > 0:
        raise UserError("the response is zero on the whole image, so that no error is relative to it")
    height, width = field.shape
    rows, columns = -(-height // cell), -(-width // cell)
    cell_of = (torch.arange(height) // cell)[:, None] * columns + torch.arange(width) // cell  # [H, W]
    sums = torch.zeros(rows * columns).index_add(0, cell_of.flatten(), field.detach().cpu().float().flatten())
    left = sums.argsort(stable=True).tolist()
    mean = image.mean((2, 3), keepdim=True)
    masked = torch.zeros(rows * columns, dtype=torch.bool)
    evaluations, error = 1, 0.0

    def may_go_on() -> bool:
        return evaluations < max_evaluations and (evaluations <= _FEWEST or time.monotonic() - start < seconds)

    def mask(cells: list[int]) -> bool:
        """Masks cells, if the response stays within the bound."""
        nonlocal masked, error, evaluations
        if progress:
            progress(evaluations, max_evaluations)
        evaluations += 1
        trial = masked.clone()
        trial[cells] = True
        seen = ~trial[cell_of].to(image.device)
        with torch.no_grad():
            change = float((response(torch.where(seen, image, mean)) - whole).norm() / whole.norm())
        if change <= bound:
            masked, error = trial, change
        return change <= bound

    first, last = 0, len(left)  # so many cells can be masked, and so many at most
    while first < last and may_go_on():
        middle = (first + last + 1) // 2
        first, last = (middle, last) if mask(left[:middle]) else (first, middle - 1)
    left = left[first:]
    length, is_minimal = max(len(left) // 2, 1), not left
    while not is_minimal and may_go_on():
        kept, before = [], evaluations
        for place in range(0, len(left), length):
            run = left[place : place + length]
            if not (may_go_on() and mask(run)):
                kept += run
        all_failed = len(kept) == len(left) and evaluations == before + len(left)
        is_minimal = not kept or (length == 1 and all_failed)
        left, length = kept, max(length // 2, 1)
    return Region(mask=~masked[cell_of], error=error, evaluations=evaluations, is_minimal=is_minimal)
