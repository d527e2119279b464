#!/usr/bin/env python
"""Builds, tests and measures everything on a machine with a GPU, and writes one report.

    python tools/gpu_check.py                                  # all parts, half an hour to two hours
    python tools/gpu_check.py --parts build tests              # some of them
    python tools/gpu_check.py --dry-run                        # what would run

Needed are a Python with torch for CUDA, numpy and pytest, and nvcc; no network, no virtual environment. torchvision,
mmcv and ninja are used where they are installed.

A part is a number of steps. Each step is a process with a limit of its own, eight minutes at most, and a log; one that
fails or is stopped by its limit does not keep the others from running. What has passed is not run again unless sources,
PyTorch or the GPU are others than then, so the same command goes on where Ctrl-C stopped it; --again forgets that.
OUT/report.md is written after each step. The exit status is 0 if no step failed, 1 if one did, 2 if nothing could run.

Parts:
    build       compiles the extension in place, with the CUDA kernels; what is compiled stays if the limit cuts it off
    cost        registers, spills and instructions of kernels, by their machine code; needs no GPU
    tests       the tests that need a GPU, a step for each file
    sanitizer   compute-sanitizer over all operators on small cases, forward and backward in every data type
    benchmarks  all operators and data types beside their peers, with peak memory and fused kernels on and off, as
                OUT/<operator>-cuda-<type>.md and .json: the names of docs/benchmarks
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "cost", "tests", "sanitizer", "benchmarks")
WITHOUT_GPU = {"build", "cost"}
DTYPES = ("float32", "tf32", "float64", "float16", "bfloat16")
LIMIT = 480  # seconds
PEERS = ("torchvision", "mmcv", "ONNX Runtime")
PASSED, FAILED, SKIPPED, STOPPED = "passed", "FAILED", "skipped", "FAILED: over its limit"


@dataclass
class Step:
    """One process. `missing` says why it cannot run here."""

    name: str
    part: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    figures: bool = False  # whether it writes a table, OUT/<name>.md
    missing: str | None = None


@dataclass
class Outcome:
    """What became of a step; kept in OUT/<name>.outcome."""

    result: str
    seconds: float
    note: str  # the last line of the log
    of: str  # what it was about: see `fingerprint`


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="PART", default=PARTS, choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--only", metavar="TEXT", default="", help="only steps with this in their names")
    parser.add_argument("--out", type=Path, metavar="OUT", default=ROOT / "work_dirs" / "gpu_check", help="folder")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"seconds that a step may take (default {LIMIT})")
    parser.add_argument("--quick", action="store_true", help="benchmarks of the first size only, in short rounds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try benchmarks without a GPU")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and end")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> list[Step]:
    """All steps of the parts that are asked for, in the order in which they run."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    found = []
    if "build" in args.parts:
        demand = {} if args.device == "cpu" else {"DK_DETECTION_CUDA": os.environ.get("DK_DETECTION_CUDA", "1")}
        found.append(Step("build", "build", [*python, "setup.py", "build_ext", "--inplace"], demand))
    if "cost" in args.parts:
        missing = None if _has("triton") else "Triton is not installed"
        for file in sorted((ROOT / "benchmarks").glob("*_cost.py")):
            command = [*python, str(file), "--markdown", str(args.out / f"{file.stem}.md")]
            found.append(Step(file.stem, "cost", command, figures=True, missing=missing))
    if "tests" in args.parts:
        found += [Step(f"tests-{_stem(file)}", "tests", [*pytest, str(file)]) for file in cuda_tests()]
    if "sanitizer" in args.parts:
        sanitizer = find_sanitizer()
        missing = None if sanitizer else "there is no compute-sanitizer: it comes with the CUDA toolkit"
        # Each allocation alone, or what lies beyond a tensor is still memory of PyTorch's.
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        cases = ["-k", "test_equals_reference or test_half_types or test_same_result_twice or test_on_a_gpu"]
        for tool in ("memcheck", "racecheck"):
            run = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            found += [
                Step(f"{tool}-{_stem(file)}", "sanitizer", [*run, *pytest, *cases, str(file)], apart, missing=missing)
                for file in cuda_tests()
                if file.parent == ROOT / "tests" / "ops"
            ]
    if "benchmarks" in args.parts:
        for file in sorted((ROOT / "benchmarks").glob("bench_*.py")):
            for dtype in DTYPES:
                if dtype == "tf32" and "pool" in file.stem:
                    continue  # there are no products in it
                name = f"{file.stem.removeprefix('bench_')}-{args.device}-{dtype}"
                kind = ["--dtype", "float32", "--tf32"] if dtype == "tf32" else ["--dtype", dtype]
                outputs = [f"--{key}={args.out / name}.{end}" for key, end in (("markdown", "md"), ("json", "json"))]
                quick = ["--quick"] if args.quick else []
                command = [*python, str(file), "--device", args.device, *kind, *outputs, *quick]
                found.append(Step(name, "benchmarks", command, figures=True))
    return [step for step in found if args.only in step.name]


def cuda_tests() -> list[Path]:
    """The files with tests that need a GPU: those of the operators, and those that say so."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    signs = re.compile(r"mark\.cuda\b|from tests\.ops\.suite import [^)]*\bBACKENDS\b")
    return [file for file in files if signs.search(file.read_text(encoding="utf-8"))]


def _stem(file: Path) -> str:
    return "-".join(file.relative_to(ROOT / "tests").with_suffix("").parts).replace("test_", "")


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def find_sanitizer() -> Path | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer"), *(Path(home) / "bin" / "compute-sanitizer" for home in homes if home)]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def environment() -> dict[str, str]:
    """What the report says of the machine; no names of hosts, users or folders."""
    import torch

    facts = {"python": platform.python_version(), "torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    if torch.cuda.is_available():
        facts |= {
            f"GPU {i}": f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        }
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    facts["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    facts["nvcc"] = _first_line(["nvcc", "--version"], -1)
    import importlib.metadata

    for package in ("triton", "torchvision", "mmcv", "numpy", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    facts["commit"] = _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    return facts


def _first_line(command: list[str], line: int = 0) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip().splitlines()[line]
    return "not found"


def fingerprint(step: Step, facts: dict[str, str]) -> str:
    """Of all that a result rests on: sources, versions, the GPU, the command."""
    machine = {name: value for name, value in facts.items() if name != "commit"}
    digest = hashlib.sha256(json.dumps([step.command, step.environment, machine]).encode())
    folders = ("csrc", "dk_detection", "benchmarks", "tests", "setup.py")
    for file in sorted(file for folder in folders for file in (ROOT / folder, *(ROOT / folder).rglob("*"))):
        if file.is_file() and file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def run(step: Step, args: argparse.Namespace, of: str) -> Outcome:
    """Runs a step in a process group of its own, which ends with it."""
    started = time.monotonic()
    log = args.out / f"{step.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
            | step.environment, start_new_session=True,
        )  # fmt: skip
        try:
            result = {0: PASSED, 5: SKIPPED if step.command[2:3] == ["pytest"] else FAILED}.get(
                process.wait(args.limit), FAILED
            )
        except subprocess.TimeoutExpired:
            result = STOPPED
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if step.part == "benchmarks" and result == PASSED and (broken := broken_contenders(args.out / f"{step.name}.json")):
        return Outcome(FAILED, time.monotonic() - started, broken, of)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    note = (lines or [""])[-1] if result == PASSED or not errors else errors[-1]
    return Outcome(result, time.monotonic() - started, "" if step.figures and result == PASSED else note[:200], of)


def broken_contenders(figures: Path) -> str:
    """Which contenders raised what, but for peers, which may lack what a case asks for."""
    results = json.loads(figures.read_text())["results"]
    reasons = {f"{result['contender']}: {result['reason']}" for result in results if result["reason"]}
    return "; ".join(sorted(reason for reason in reasons if not reason.startswith(PEERS) and ": fused: " not in reason))


def report(args: argparse.Namespace, facts: dict[str, str], outcomes: dict[str, Outcome], figures: list[Step]) -> str:
    """Markdown: the machine, what became of each step, all tables."""
    rows = [
        f"| {name} | {outcome.result} | {outcome.seconds:.0f} | {outcome.note.replace('|', '/')} |"
        for name, outcome in outcomes.items()
    ]
    parts = [
        "# GPU check",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "\n".join(["| step | result | seconds | |", "|---|---|---|---|", *rows]),
    ]
    for step in figures:
        table = args.out / f"{step.name}.md"
        if step.name in outcomes and outcomes[step.name].result == PASSED and table.is_file():
            parts.append(f"## {step.name}\n\n{table.read_text().strip()}")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    args.out = args.out.resolve()
    todo = steps(args)
    if args.dry_run:
        for step in todo:
            variables = "".join(f"{name}={value} " for name, value in step.environment.items())
            print(f"{step.name}: {f'not here: {step.missing}' if step.missing else variables + ' '.join(step.command)}")
        return 0
    try:
        import torch
    except ImportError as error:
        print(f"gpu_check.py: {error}: run it with a Python that has torch", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        able = [step for step in todo if step.part in WITHOUT_GPU]
        if len(able) < len(todo):
            print(
                "gpu_check.py: PyTorch sees no CUDA device: only `--parts build cost` can run here"
                + ("; going on with those" if able else ""), file=sys.stderr,
            )  # fmt: skip
            if not able:
                return 2
        todo = able
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment()
    outcomes: dict[str, Outcome] = {}
    try:
        for number, step in enumerate(todo, 1):
            kept = args.out / f"{step.name}.outcome"
            of = fingerprint(step, facts)
            print(f"[{number}/{len(todo)}] {step.name} ... ", end="", flush=True)
            before = Outcome(**json.loads(kept.read_text())) if kept.is_file() else None
            if step.missing:
                outcome = Outcome(SKIPPED, 0, step.missing, of)
            elif before and before.of == of and before.result in (PASSED, SKIPPED) and not args.again:
                outcome = before
            else:
                kept.unlink(missing_ok=True)
                outcome = run(step, args, of)
                kept.write_text(json.dumps(asdict(outcome)))
            outcomes[step.name] = outcome
            print(f"{outcome.result}, {outcome.seconds:.0f} s", flush=True)
            (args.out / "report.md").write_text(report(args, facts, outcomes, [s for s in todo if s.figures]))
    except KeyboardInterrupt:
        print("\ngpu_check.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    failed = [name for name, outcome in outcomes.items() if outcome.result in (FAILED, STOPPED)]
    print(f"{len(failed)} of {len(outcomes)} steps failed; report.md and the logs are in {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
