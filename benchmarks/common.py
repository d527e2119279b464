"""Timing of operators, in one place: a benchmark file states sizes and contenders, everything measured is here.

Contenders are timed in interleaved rounds (A B C, A B C, ...), so that a machine that slows down slows all of them
down, and each figure stands beside its ratio to a baseline of the same run: ratios travel between machines better than
milliseconds do.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FORWARD, BACKWARD = "forward", "forward+backward"
PACKAGES = ("torch", "torchvision", "mmcv", "onnxruntime", "numpy", "dk_detection")


class Unsupported(Exception):
    """Raised by a contender that cannot run a case; its text becomes a footnote of the table."""


@dataclass(frozen=True)
class Call:
    """What one contender does in one case.

    Args:
        forward: computes the output from tensors that it holds.
        leaves: the tensors that forward+backward differentiates; None if the contender has no backward.
        answer: contenders of the same answer must give the same output; None if nothing else computes it.
        context: makes the context manager that the call runs in; entering it is not timed.
    """

    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...] | None
    answer: str | None = None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def run(self, mode: str, grad: Tensor | None) -> Any:
        if mode == FORWARD:
            with torch.no_grad():
                return self.forward()
        return torch.autograd.grad(self.forward(), self.leaves, grad)


class Step(NamedTuple):
    """What is timed."""

    run: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager]


@dataclass
class Result:
    """The measurements of one contender in one case and one mode."""

    case: str
    contender: str
    mode: str
    seconds: list[float] = field(default_factory=list)  # per call, one figure per round
    peak_bytes: int | None = None  # device memory above what the inputs hold; CUDA only
    reason: str | None = None  # why there are no measurements


@dataclass(frozen=True)
class Settings:
    """How to measure; `add_arguments` and `from_arguments` are its command line."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    rounds: int
    seconds: float  # each round repeats a call until it takes about this long
    tf32: bool = False  # float32 products on CUDA may be rounded, those of cuDNN and cuBLAS alike

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "Settings":
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: PyTorch sees no CUDA device on this machine")
        rounds = args.rounds or (2 if args.quick else 20 if device.type == "cuda" else 5)
        seconds = 0.02 if args.quick else 0.2
        return cls(device, DTYPES[args.dtype], args.threads, rounds, seconds, args.tf32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks share."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender (default 2)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--tf32", action="store_true", help="on CUDA, let products of float32 use TF32")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 5 on CPU, 20 on CUDA)")
    parser.add_argument("--quick", action="store_true", help="the first size only, 2 short rounds: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement and the environment")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table and the environment")


def environment(settings: Settings) -> dict[str, Any]:
    """What a reader needs to place the figures; no names of hosts, users or folders."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    facts = {
        "cpu": _cpu_name(),
        "threads": settings.threads,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **versions,
    }
    if settings.device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": settings.tf32,
            "cudnn_benchmark": True,
        }
    return facts


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def measure(
    cases: dict[str, Callable[[Settings], Any]],
    contenders: dict[str, Callable[[Any, Settings], Call]],
    settings: Settings,
) -> list[Result]:
    """Times every contender in every case, forward and forward+backward.

    Args:
        cases: label -> function that makes the tensors of the case.
        contenders: name -> function that prepares its call on those tensors, or raises `Unsupported`.
        settings: how to measure.

    Returns:
        One result for each case, contender and mode. What was measured before Ctrl-C is kept.
    """
    torch.set_num_threads(settings.threads)
    if settings.device.type == "cuda":
        # The baseline at its best for the arithmetic that all contenders share, with tuned algorithms.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        torch.backends.cudnn.benchmark = True
    results: list[Result] = []
    try:
        for index, (label, make) in enumerate(cases.items(), 1):
            print(f"[{index}/{len(cases)}] {label}", file=sys.stderr, flush=True)
            case = make(settings)
            for mode in (FORWARD, BACKWARD):
                print(f"  {mode}", file=sys.stderr, flush=True)
                _measure_mode(label, case, mode, contenders, settings, results)
    except KeyboardInterrupt:
        print("\ninterrupted: the table holds what was measured so far", file=sys.stderr)
    return results


def _measure_mode(
    label: str,
    case: Any,
    mode: str,
    contenders: dict[str, Callable[[Any, Settings], Call]],
    settings: Settings,
    results: list[Result],
) -> None:
    ready: list[tuple[Result, Step, int]] = []
    answers: dict[str, Tensor] = {}
    for name, prepare in contenders.items():
        result = Result(label, name, mode)
        results.append(result)
        _progress(f"    warm-up of {name}")
        # A contender fails in its own way (missing package, data type, memory): the reason is told under the table and
        # the others go on.
        try:
            call = prepare(case, settings)
            if mode == BACKWARD and call.leaves is None:
                raise Unsupported("forward only")
            step = _step(call, mode, settings, answers)
            repeats = _repeats(step, settings)
            result.peak_bytes = _peak_bytes(step, settings)
            ready.append((result, step, repeats))
        except Exception as error:
            result.reason = _one_line(error)
    started = time.perf_counter()
    for done in range(settings.rounds):
        for result, step, repeats in ready:
            left = (time.perf_counter() - started) * (settings.rounds / done - 1) if done else math.nan
            _progress(f"    round {done + 1}/{settings.rounds}, {left:.0f} s left, {result.contender}")
            result.seconds.append(_seconds(step, repeats, settings))
    _progress("")


def _step(call: Call, mode: str, settings: Settings, answers: dict[str, Tensor]) -> Step:
    """What to time. Its first output is compared with that of the others that compute the same."""
    with call.context():
        out = call.run(FORWARD, None)
    out = torch.as_tensor(out[0] if isinstance(out, list) else out).to(settings.device)
    # In 16 bits the peers round the sampling positions themselves, so their outputs are not comparable point by point.
    if call.answer is not None and settings.dtype in (torch.float32, torch.float64) and not settings.tf32:
        expected = answers.setdefault(call.answer, out)
        difference = ((out - expected).abs().max() / expected.abs().max()).item()
        if not difference < 1e-3:
            raise Unsupported(f"its output differs from that of the contenders above (relative {difference:.1e})")
    grad = None
    if mode == BACKWARD:
        grad = torch.randn(out.shape, dtype=out.dtype, device=out.device)
    return Step(lambda: call.run(mode, grad), call.context)


def _seconds(step: Step, repeats: int, settings: Settings) -> float:
    with step.context():
        if settings.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                step.run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
        started = time.perf_counter()
        for _ in range(repeats):
            step.run()
        return (time.perf_counter() - started) / repeats


def _repeats(step: Step, settings: Settings) -> int:
    """Warms up, then says how many calls fill a round."""
    once = _seconds(step, 1, settings)
    if once < settings.seconds:
        once = min(once, _seconds(step, 1, settings))
    return min(1000, math.ceil(settings.seconds / once))


def _peak_bytes(step: Step, settings: Settings) -> int | None:
    if settings.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with step.context():
        step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    text = text[0] if text else type(error).__name__
    return re.sub(r"(?:/[\w.+-]+){2,}/?", "<path>", text)  # a recorded table names no folder of the machine


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def table(results: Sequence[Result], baseline: str) -> str:
    """One Markdown table: median and minimum of the rounds, and the ratio of the medians to that of `baseline`."""
    by_key = {(r.case, r.contender, r.mode): r for r in results}
    rows_of = list(dict.fromkeys((r.case, r.contender) for r in results))
    memory = any(r.peak_bytes is not None for r in results)
    header = ["case", "contender"]
    for mode in (FORWARD, BACKWARD):
        header += [f"{mode} ms", "min ms", f"x {baseline}"] + (["peak MiB"] if memory else [])
    notes: list[str] = []
    rows = []
    previous = None
    for case, contender in rows_of:
        row = ["" if case == previous else case, contender]
        previous = case
        for mode in (FORWARD, BACKWARD):
            result = by_key.get((case, contender, mode))
            base = by_key.get((case, baseline, mode))
            if result is None or not result.seconds:
                reason = (result and result.reason) or "interrupted"
                if reason not in notes:
                    notes.append(reason)
                row += [f"- [{notes.index(reason) + 1}]", "-", "-"] + (["-"] if memory else [])
                continue
            median = statistics.median(result.seconds)
            ratio = f"{median / statistics.median(base.seconds):.2f}" if base is not None and base.seconds else "-"
            row += [f"{median * 1e3:.2f}", f"{min(result.seconds) * 1e3:.2f}", ratio]
            if memory:
                row.append(f"{result.peak_bytes / 2**20:.0f}")
        rows.append(row)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if notes:
        lines += ["", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1))]
    return "\n".join(lines)


def report(
    title: str, description: str, results: Sequence[Result], baseline: str, settings: Settings, args: argparse.Namespace
) -> None:
    """Prints the table and writes the files that the command line asks for."""
    facts = environment(settings)
    cut = any(result.reason is None and len(result.seconds) < settings.rounds for result in results)
    text = "\n\n".join(
        (
            f"{title} on {facts.get('gpu', facts['cpu'])}",
            description,
            f"{settings.rounds} interleaved rounds{' (interrupted)' if cut else ''}; "
            + ", ".join(f"{key} {value}" for key, value in facts.items()),
            table(results, baseline),
        )
    )
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        content = {
            "title": title,
            "description": description,
            "environment": facts,
            "rounds": settings.rounds,
            "baseline": baseline,
            "results": [vars(result) for result in results],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
