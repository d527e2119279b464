"""Parameters and FLOPs of networks.

A FLOP is one multiply-add. It is counted while the network runs, by torch's own counter, to which our operators are
known: convolutions, matrix products, 2 for each value obtained by bilinear sampling, 1 for its modulation. What is
linear in the size of a map, such as normalisation, activation and averaging, is not counted. Networks run on the meta
device, which computes shapes only, so that size costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Called before each step of something long with the step's number, from 0 on, the number of steps and the step's name.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Part:
    """A part of a network.

    Attributes:
        name: What it is.
        parameters: Number of its parameters, buffers left out.
        multiply_adds: FLOPs of one forward pass.
    """

    name: str
    parameters: int
    multiply_adds: int


def parameters(*modules: nn.Module | None) -> int:
    """The number of parameters of some modules together; what they share is counted once."""
    return sum(p.numel() for p in {p for module in modules if module is not None for p in module.parameters()})


def multiply_adds(run: Callable[[], object]) -> int:
    """The FLOPs of what `run` computes with torch's operators, without gradients."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # which counts a multiplication and an addition as two


def count_modules(network: nn.Module, shape: tuple[int, int]) -> dict[str, int]:
    """The FLOPs of one forward pass of a network that maps one image to whatever.

    Args:
        network: On any device; on the meta device its size costs nothing. It is put into evaluation mode.
        shape: (H, W) of the image.

    Returns:
        FLOPs by the dotted names of the modules that have any; those of the whole network under "".
    """
    device = next(network.parameters()).device
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *shape, device=device))
    root = type(network).__name__
    counts = {name.removeprefix(root).removeprefix("."): by for name, by in counter.get_flop_counts().items()}
    return {name: sum(by.values()) // 2 for name, by in counts.items() if name != "Global"}


def count_network(network: nn.Module, shape: tuple[int, int]) -> list[Part]:
    """Counts a network that maps one image to whatever; its arguments are those of `count_modules`.

    Returns:
        A part for each child of the network.
    """
    counts = count_modules(network, shape)
    parts = [Part(name, parameters(child), counts.get(name, 0)) for name, child in network.named_children()]
    return [part for part in parts if part.parameters or part.multiply_adds]


def total(parts: Sequence[Part]) -> Part:
    """The sum of parts that share nothing."""
    return Part("total", sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts))


def format_parts(parts: Sequence[Part]) -> str:
    """A table of parts and their sum: parameters in millions, FLOPs in thousands of millions of multiply-adds."""
    rows = [(p.name, f"{p.parameters / 1e6:.2f}", f"{p.multiply_adds / 1e9:.2f}") for p in (*parts, total(parts))]
    return format_table(("part", "#P (M)", "GFLOPs"), rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too: words to the left, numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    numeric = [all(cell == "" or cell.lstrip("+-").replace(".", "", 1).isdigit() for cell in c[1:]) for c in columns]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
