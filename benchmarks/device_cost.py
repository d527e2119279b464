"""What the device kernels cost, read from their machine code and computed from their sizes; no GPU is needed.

Two tables. The first has for every kernel and data type what the compiler made of it: registers, spills, local memory,
instructions, 64-bit divisions, width of loads and stores. The second has, for the sizes of the other benchmarks, the
bytes that an operator moves, its arithmetic, and the time below which no GPU can go: a prediction, not a measurement.

Needs nvcc, and the disassembler that comes with triton. What was compiled is kept in build/device_cost.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "device_cost"
ARCHITECTURES = ("sm_80", "sm_90")
SOURCES = tuple(path.name.removesuffix("_kernel.cu") for path in sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu")))
TYPES = {"double": "float64", "float": "float32", "c10::Half": "float16", "c10::BFloat16": "bfloat16"}


class Gpu(NamedTuple):
    """Peaks of a GPU from its maker's data sheet; the bandwidth of the second-level cache is a measured figure."""

    name: str
    memory: float  # bytes/s
    cache: float  # bytes/s
    issue: float  # instructions of a warp/s: multiprocessors x 4 schedulers x clock
    products: dict[str, float]  # FLOP/s of matrix products


# A100 SXM 80 GB and H100 SXM. float32 products without TF32, as torch has them by default.
GPUS = (
    Gpu("A100", 2.04e12, 4.5e12, 108 * 4 * 1.41e9, {"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12}),
    Gpu("H100", 3.35e12, 5.5e12, 132 * 4 * 1.83e9, {"float64": 67e12, "float32": 67e12, "bfloat16": 989e12}),
)


# Machine code


class Instruction(NamedTuple):
    predicate: str
    name: str  # with its modifiers: LDG.E.128
    operands: str


class Kernel(NamedTuple):
    """What the compiler made of one kernel."""

    source: str
    name: str  # without its namespace and its data types
    dtype: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int  # local memory, spills included
    shared_bytes: int
    instructions: int  # of the kernel, each once
    item: int  # of those, inside the loop over work items
    loop: int  # of those, inside the innermost loop that touches memory most often; 0: there is none
    around: int  # of those, inside the loop right around that one; 0: there is none within the item
    divisions: int  # of 64 bits, by values known at run time
    loop_divisions: int  # of those, inside a loop of a work item
    loads: str  # from global memory: number x bits
    stores: str
    atomics: str


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, or else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or else triton's."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.is_file() else None


@functools.cache
def _flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    folders = [str(ROOT / "csrc"), *include_paths()]
    return ("-O3", "-std=c++17", *COMMON_NVCC_FLAGS, *(f"-I{folder}" for folder in folders))


def compile_kernels(source: Path, architecture: str, cache: Path = CACHE, flags: Sequence[str] | None = None) -> Path:
    """Compiles a .cu file for one architecture; gives the machine code's file, beside which the compiler's report lies.

    Raises:
        RuntimeError: there is no compiler, or it refuses.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found; set CUDA_HOME")
    command = [compiler, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", *(_flags() if flags is None else flags)]
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    digest.update(" ".join(command).encode())
    headers = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    for path in (source, *sorted(headers)):
        digest.update(path.read_bytes())
    cubin = cache / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        made = cubin.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{result.stderr}")
        cubin.with_suffix(".txt").write_text(result.stderr)
        made.rename(cubin)
    return cubin


def kernels(cubin: Path, source: str, architecture: str) -> list[Kernel]:
    """Reads the machine code and the compiler's report of a file that `compile_kernels` made.

    Raises:
        RuntimeError: there is no disassembler.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm was not found: neither in the toolkit nor in triton")
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    resources = _resources(cubin.with_suffix(".txt").read_text())
    found = []
    for part in re.split(r"^\t\.section\t\.text\.", text, flags=re.MULTILINE)[1:]:
        symbol = part.split(",", 1)[0]
        name, dtype = _readable(symbol)
        found.append(
            Kernel(source, name, dtype, architecture, **resources[symbol], **_measures(*_parse(part.splitlines())))
        )
    return sorted(found, key=lambda kernel: (kernel.name, list(TYPES.values()).index(kernel.dtype)))


def _resources(report: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match.group(1)) if match else 0

        found[symbol] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


@functools.cache
def _demangled(symbol: str) -> str:
    return subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()


def _readable(symbol: str) -> tuple[str, str]:
    """`void dk::run_body<dk::SampleColumns<float, float, 4> >(...)` is SampleColumns<4> of float32."""
    match = re.match(r"(?:void )?(?:\w+::)*run_body<(.*)>\(", _demangled(symbol))
    text = match.group(1).strip() if match else symbol
    # The narrowest type is the data's; sums may be wider.
    words = set(re.findall(r"c10::\w+|double|float", text))
    dtype = next((TYPES[word] for word in reversed(TYPES) if word in words), "float32")
    text = re.sub(r"\b(?:c10::\w+|double|float)\b,? ?", "", text).replace("dk::", "").replace(" >", ">")
    text = re.sub(r"\bint\b(?:, )?", "", text)  # the type of indices; that of huge tensors is named: long
    text = re.sub(r"<>|<long>(?=>)|, (?=>)", "", text)
    return text, dtype


def _parse(lines: Iterable[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of a kernel, without the functions that it calls."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        label = re.match(r"(\.L\w+|\$\S+):", line)
        if label:
            if label.group(1).startswith("$"):
                break
            labels[label.group(1)] = len(code)
            continue
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if found and found.group(2) != "NOP":
            code.append(Instruction(found.group(1) or "", found.group(2), found.group(3)))
    return code, labels


def _blocks(code: list[Instruction], labels: dict[str, int]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and for each the numbers of those that may follow."""
    ends = {i + 1 for i, one in enumerate(code) if one.name.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET")}
    starts = sorted({0, *labels.values(), *ends} - {len(code)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    following = []
    for i, block in enumerate(blocks):
        last = code[block.stop - 1]
        kind = last.name.split(".")[0]
        jumps = kind in ("BRA", "JMP")
        targets = [number[labels[t]] for t in re.findall(r"\.L\w+", last.operands) if labels.get(t) in number]
        conditional = last.predicate or "DIV" in last.name or (jumps and "," in last.operands)
        falls = conditional or not (jumps or kind in ("EXIT", "RET", "BRX"))
        following.append((targets if jumps else []) + ([i + 1] if falls and i + 1 < len(blocks) else []))
    return blocks, following


def _loops(following: list[list[int]]) -> list[set[int]]:
    """The natural loops, as sets of blocks: what leads back to a block that dominates it."""
    count = len(following)
    before: list[list[int]] = [[] for _ in range(count)]
    for block, targets in enumerate(following):
        for target in targets:
            before[target].append(block)
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            sets = [dominators[b] for b in before[block]]
            new = {block} | (set.intersection(*sets) if sets else set())
            if new != dominators[block]:
                dominators[block], changed = new, True
    loops: dict[int, set[int]] = {}
    for block, targets in enumerate(following):
        for head in targets:
            if head in dominators[block] and (head != block or len(following[block]) > 1):
                body, left = loops.setdefault(head, {head}), [block]
                while left:
                    one = left.pop()
                    if one not in body:
                        body.add(one)
                        left += before[one]
    return list(loops.values())


def _bits(name: str) -> int:
    for part in name.split(".")[1:]:
        found = re.fullmatch(r"(?:U|S|B|F)?(8|16|32|64|128)(?:x(\d))?", part)
        if found:
            return int(found.group(1)) * int(found.group(2) or 1)
    return 32


def _count(code: Iterable[Instruction], *kinds: str) -> str:
    found = Counter(_bits(one.name) for one in code if one.name.split(".")[0] in kinds)
    return ", ".join(f"{number}x{bits}" for bits, number in sorted(found.items(), reverse=True))


def _measures(code: list[Instruction], labels: dict[str, int]) -> dict[str, Any]:
    blocks, following = _blocks(code, labels)
    loops = sorted(_loops(following), key=len, reverse=True)

    def size(loop: set[int]) -> int:
        return sum(len(blocks[block]) for block in loop)

    def inside(loop: Iterable[int]) -> list[Instruction]:
        return [code[i] for block in loop for i in blocks[block]]

    def touches(loop: set[int]) -> int:
        return sum(one.name.startswith(("LDG", "STG", "RED", "ATOM")) for one in inside(loop))

    def divisions(part: Iterable[Instruction]) -> int:
        return sum(one.name.startswith("CALL") and bool(re.search(r"(div|rem)_[su]64", one.operands)) for one in part)

    # The largest loop is the one over work items, unless it is not there: everything else is inside it.
    item = max(loops, key=size, default=set(range(len(blocks))))
    inner = [loop for loop in loops if loop < item]
    innermost = [loop for loop in inner if not any(other < loop for other in inner)]
    hot = max(innermost, key=lambda loop: (touches(loop), size(loop)), default=set())
    around = min((loop for loop in inner if hot and loop > hot), key=size, default=set())
    within = set().union(*inner) if inner else set()
    return {
        "instructions": len(code),
        "item": size(item),
        "loop": size(hot) if touches(hot) else 0,
        "around": size(around) if touches(hot) else 0,
        "divisions": divisions(code),
        "loop_divisions": divisions(inside(within)),
        "loads": _count(code, "LDG", "LD"),
        "stores": _count(code, "STG", "ST"),
        "atomics": _count(code, "RED", "REDG", "ATOM", "ATOMG"),
    }


# Closed forms


class Step(NamedTuple):
    """One kernel or product: the bytes that it asks for, each access counted, and its arithmetic."""

    name: str
    bytes: float
    flops: float = 0
    kernel: str = ""  # of the first table; empty: a product or an operator of torch
    items: float = 0
    trips: float = 1  # through the innermost loop, an item
    outer: float = 1  # through the loop around that one, an item
    product: bool = False


class Cost(NamedTuple):
    """Steps of one call, and what no way of computing it can go below: every argument read and every result written."""

    forward: list[Step]
    backward: list[Step]
    least_forward: float
    least_backward: float
    columns: float  # bytes of a buffer with the columns of all positions; 0: the operator needs none
    forward_workspace: float  # bytes of columns held at a time
    backward_workspace: float


TAPS, CELLS, LANES, BUFFER, SMALL = 9, 16, 32, 32 << 20, 1 << 20
TABLE = 16  # samples that a warp prepares at a time


def _held(positions: int, columns: int, buffers: int) -> int:
    """Bytes of `buffers` with the columns of a chunk; `columns` are all of one. As chunk_of in common/launch.h."""
    each = columns // positions * buffers
    chunks = -(-positions // max(min(BUFFER, max(columns // 2, SMALL)) // each, 1))
    return -(-positions // chunks) * each


def _partial_blocks(positions: int, warps: int, bytes_: int) -> int:
    """Blocks of output positions that are summed up apart: as blocks_of in common/launch.h."""
    wanted = min(-(-4096 // warps), -(-positions // 32), max(BUFFER // bytes_, 1))
    return -(-positions // -(-positions // wanted))


def _rows(channels: int, vector: int) -> tuple[int, int]:
    """How often a warp goes through taps, and for each through the channels: few channels take a part of its lanes."""
    lanes = 4
    while lanes < LANES and lanes * vector < channels:
        lanes *= 2
    return -(-TAPS // (LANES // lanes)), -(-channels // (lanes * vector))


def deform_conv2d_cost(size: Sequence[int], itemsize: int) -> Cost:
    """Modulated, one offset group. `size` is batch, channels, height, width, groups; as many outputs as inputs."""
    batch, channels, height, width, groups = size
    positions, wide, vector = batch * height * width, max(itemsize, 4), 16 // itemsize
    map_, columns = positions * channels * itemsize, positions * TAPS * channels * itemsize
    table, weight = positions * TAPS * 3 * wide, channels * channels // groups * TAPS * itemsize
    pairs = positions * TAPS * channels
    taps, slices = _rows(channels, vector)
    narrowed = Step("input, narrowed", positions * channels * (2 * wide + itemsize))
    least = 2 * map_ + table + weight
    gradients = Step(
        "input, offset, mask", 2 * table + 6 * columns + 4 * pairs * wide, 24 * pairs,
        f"SampleGradients<{vector}, ColumnGradient", positions, taps * slices, taps,
    )  # fmt: skip
    if groups == channels:
        slices = -(-channels // (LANES * vector))
        forward = Step(
            "forward", table + 5 * columns + map_, 10 * pairs, "ApplyDepthwise", positions, TAPS * slices, slices
        )
        blocks = _partial_blocks(positions, TAPS * slices, TAPS * channels * wide)
        partial = blocks * TAPS * channels * wide
        filter = Step(
            "filter", table + 5 * columns + 2 * partial, 10 * pairs, "DepthwiseFilterGradient", blocks * TAPS * slices,
            positions / blocks, positions / blocks / TABLE,
        )  # fmt: skip
        gradients = gradients._replace(kernel=f"SampleGradients<{vector}, DepthwiseColumnGradient")
        return Cost([forward], [gradients, filter, narrowed], least, 2 * least - map_, 0, 0, partial)
    product = Step("product", columns + map_ + weight, 2 * pairs * channels // groups, product=True)
    sample = Step("sample", table + 5 * columns, 8 * pairs, "SampleColumns", positions, taps * slices, slices)
    backward = [
        product._replace(name="gradient of columns"), gradients, product._replace(name="weight"), narrowed,
    ]  # fmt: skip
    held = _held(positions, columns, 1)  # the columns take the place of their gradient
    return Cost([sample, product], backward, least, 2 * least - map_, columns, held, held)


def deform_kernel_conv2d_cost(size: Sequence[int], itemsize: int, data_offsets: bool) -> Cost:
    """Scope 4x4, no mask, one group of either kind of offsets."""
    batch, channels, height, width, groups = size
    positions, wide, vector = batch * height * width, max(itemsize, 4), 16 // itemsize
    narrow = min(vector, 4)
    depthwise, corners = groups == channels, 4 if data_offsets else 1
    map_, one = positions * channels * itemsize, positions * TAPS * channels * itemsize
    columns = positions * CELLS * channels * itemsize
    table, weight = (
        positions * TAPS * (4 if data_offsets else 2) * wide,
        channels * channels // groups * CELLS * itemsize,
    )
    pairs, (taps, rows) = positions * TAPS * channels, _rows(channels, vector)
    slices, tiles = -(-channels // (LANES * vector)), -(-channels // (LANES * narrow))
    flops = pairs * (2 * corners + 10)
    product = Step("product", columns + map_ + weight, 2 * pairs * CELLS / TAPS * channels // groups, product=True)
    spread = Step("scatter", table + corners * one + columns, flops, "ScatterColumns", positions, TAPS * tiles, tiles)
    cells = (5 if depthwise else 4) * one
    kind = "KernelDepthwiseGradient" if depthwise else "KernelColumnGradient"
    offsets = Step(
        "offsets and input" if data_offsets else "offsets",
        2 * table + corners * one + cells + data_offsets * 4 * pairs * wide, flops + 8 * pairs,
        f"TapGradients<{vector}, {kind}", positions, taps * rows, taps,
    )  # fmt: skip
    input = Step(
        "input", table + cells + 2 * positions * channels * wide, flops, f"PullInputGradient<{vector}, {kind}",
        positions, TAPS * slices, slices,
    )  # fmt: skip
    shared = [offsets] if data_offsets else [offsets, input]
    narrowed = Step("input, narrowed", positions * channels * (2 * wide + itemsize))
    least = 2 * map_ + table + weight
    if depthwise:
        forward = [
            Step(
                "forward",
                table + (corners + 4) * one + map_,
                flops,
                "DepthwiseForward",
                positions,
                TAPS * slices,
                slices,
            )
        ]
        blocks = _partial_blocks(positions, tiles, CELLS * channels * wide)
        partial = blocks * CELLS * channels * wide
        filter = Step(
            "filter", table + (corners + 1) * one + 2 * partial, flops, "KernelFilterGradient", blocks * tiles,
            positions / blocks * TAPS, positions / blocks * TAPS / TABLE,
        )  # fmt: skip
        return Cost(forward, [*shared, filter, narrowed], least, 2 * least - map_, 0, 0, partial)
    backward = [
        product._replace(name="gradient of columns"), *shared, spread, product._replace(name="weight"), narrowed,
    ]  # fmt: skip
    forward_held, backward_held = _held(positions, columns, 1), _held(positions, columns, 2)
    return Cost([spread, product], backward, least, 2 * least - map_, columns, forward_held, backward_held)


def roi_pool_cost(size: Sequence[int], itemsize: int) -> Cost:
    """2x2 samples a bin on 3x3 pixels, offsets and masks. `size` is that of bench_deform_roi_pool."""
    rois, channels, group, height, width, bins, _ = size
    wide, vector = max(itemsize, 4), 16 // itemsize if channels % (16 // itemsize) == 0 else 1
    rule = "RoundedBins" if group > 1 else "AlignedBins"
    items, pairs = rois * bins * bins, rois * bins * bins * channels
    map_, out, table = channels * group**2 * height * width, pairs * itemsize, rois * bins * bins * 3 * wide
    slices, atomics = -(-channels // (LANES * vector)), -(-channels // (LANES * (4 if wide == 4 and vector > 1 else 1)))
    forward = [Step("pool", table + 10 * out, 18 * pairs, f"PoolBins<{rule}, {vector}", items, 9 * slices, 3 * slices)]
    backward = [
        Step(
            "input", table + out + 9 * pairs * wide, 18 * pairs, f"ScatterRoiGradient<{rule}, {vector}", items,
            9 * atomics, 3 * atomics,
        ),
        Step(
            "offset, mask", 2 * table + 10 * out, 18 * pairs, f"PartGradient<{rule}, {vector}", items, 9 * slices,
            3 * slices,
        ),
        Step("input, narrowed", map_ * (2 * wide + itemsize)),
    ]  # fmt: skip
    least = map_ * itemsize + out + table
    return Cost(forward, backward, least, 2 * map_ * itemsize + out + 2 * table, 0, 0, 0)


def kernel_evolution_conv2d_cost(size: Sequence[int], itemsize: int) -> Cost:
    """9 locations of radius 2: 5x5 pixels, of which 13 on average have a weight; no attention."""
    batch, channels, height, width, groups = size
    positions, wide, run, side, seen = batch * height * width, max(itemsize, 4), 256, 5, 13
    map_, columns = positions * channels * itemsize, positions * TAPS * channels * itemsize
    table, weight = channels * TAPS * side**2 * wide, channels * channels // groups * TAPS * itemsize
    pairs = positions * TAPS * channels
    product = Step("product", columns + map_ + weight, 2 * pairs * channels // groups, product=True)
    sample = Step(
        "sample", (seen + 1) * columns, 2 * seen * pairs, "SampleWindows", -(-positions // run) * channels * TAPS,
        side**2, side,
    )  # fmt: skip
    backward = [
        sample,
        product._replace(name="weight"),
        product._replace(name="gradient of columns"),
        Step(
            "windows",
            (1 + side**2) * columns,
            2 * side**2 * pairs,
            "WindowGradient",
            channels * TAPS,
            positions / LANES,
        ),
        Step(
            "input", seen * columns + 2 * positions * channels * wide, 2 * seen * pairs, "GatherMapGradient",
            batch * channels * height, TAPS * side**2 * width / LANES, TAPS * side * width / LANES,
        ),
        Step("input, narrowed", positions * channels * (2 * wide + itemsize)),
    ]  # fmt: skip
    least = 2 * map_ + table + weight
    forward_held, backward_held = _held(positions, columns, 1), _held(positions, columns, 2)
    return Cost([sample, product], backward, least, 2 * least - map_, columns, forward_held, backward_held)


def cases() -> dict[str, Any]:
    """Label -> function of the item size that gives the `Cost`: the sizes of the other benchmarks, and 2x256x50x76."""
    import bench_deform_conv2d
    import bench_deform_kernel_conv2d
    import bench_deform_roi_pool
    import bench_kernel_evolution_conv2d

    found: dict[str, Any] = {}
    sizes = [(2, 256, 50, 76, 1), *((*size, 1) for size in bench_deform_conv2d.SIZES)]
    for size in sizes + [size for size in bench_deform_kernel_conv2d.SIZES if size[4] > 1]:
        found[f"deform_conv2d {_label(size)}"] = functools.partial(deform_conv2d_cost, size)
    for size in bench_deform_kernel_conv2d.SIZES:
        for data_offsets in (False, True):
            name = "local DK + DCN" if data_offsets else "local DK"
            found[f"{name} {_label(size)}"] = functools.partial(
                deform_kernel_conv2d_cost, size, data_offsets=data_offsets
            )
    for size in bench_kernel_evolution_conv2d.SIZES:
        found[f"kernel_evolution_conv2d {_label(size)}"] = functools.partial(kernel_evolution_conv2d_cost, size)
    for size in bench_deform_roi_pool.SIZES:
        rois, channels, group, height, width, bins, _ = size
        name = "deform_psroi_pool" if group > 1 else "deform_roi_pool"
        found[f"{name} {rois} RoIs, {channels * group**2}x{height}x{width} to {channels}x{bins}x{bins}"] = (
            functools.partial(roi_pool_cost, size)
        )
    return found


def _label(size: Sequence[int]) -> str:
    batch, channels, height, width, groups = size
    return f"{batch}x{channels}x{height}x{width}{' depthwise' if groups > 1 else ''}"


# Tables


def seconds(steps: Iterable[Step], gpu: Gpu, dtype: str, table: dict[tuple[str, str], list[Kernel]]) -> float:
    """Sum over the steps of their largest bound: bytes asked from the second-level cache, arithmetic, instructions."""
    total = 0.0
    for step in steps:
        bounds = [step.bytes / gpu.cache, step.flops / gpu.products[dtype] if step.product else 0.0]
        if step.kernel:
            bounds.append(_instructions(step, table[gpu.name, dtype]) / gpu.issue)
        total += max(bounds)
    return total


def _instructions(step: Step, found: Sequence[Kernel]) -> float:
    """Of all warps: those of an item once, those of its two innermost loops as often as they are run through."""
    named = [kernel for kernel in found if kernel.name.startswith(step.kernel) and "long" not in kernel.name]
    if not named:
        raise RuntimeError(f"no kernel is called {step.kernel}")
    kernel = max(named, key=lambda kernel: _widest(kernel.loads))  # the instance that wide channels get
    outer = step.outer if kernel.around else 1
    once = kernel.item + (outer - 1) * max(kernel.around - kernel.loop, 0) - kernel.loop
    return step.items * (once + kernel.loop * step.trips)


def _widest(counts: str) -> int:
    return max((int(part.split("x")[1]) for part in counts.split(", ") if part), default=0)


def kernel_table(found: Sequence[Kernel]) -> str:
    """One row for every kernel and data type, figures of all architectures in a cell."""
    by_row: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in found:
        by_row.setdefault((kernel.source, kernel.name, kernel.dtype), []).append(kernel)
    columns = {
        "registers": "registers", "spills": "spill_bytes", "local": "stack_bytes", "shared": "shared_bytes",
        "instructions": "instructions", "an item": "item", "its loop": "loop", "64-bit divisions": "divisions",
        "in loops": "loop_divisions", "loads": "loads", "stores": "stores", "atomics": "atomics",
    }  # fmt: skip
    lines = []
    for source in dict.fromkeys(kernel.source for kernel in found):
        lines += [
            "",
            f"### {source}",
            "",
            f"| kernel | type | {' | '.join(columns)} |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for (of, name, dtype), kernels_ in by_row.items():
            if of == source:
                cells = [[str(getattr(kernel, field) or "-") for kernel in kernels_] for field in columns.values()]
                cells = [" / ".join(dict.fromkeys(cell)) for cell in cells]
                lines.append(f"| `{name}` | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def predictions(dtypes: Sequence[str], found: Sequence[Kernel]) -> list[dict[str, Any]]:
    """One row for every case and data type."""
    architecture = {"A100": "sm_80", "H100": "sm_90"}
    table = {
        (gpu.name, dtype): [k for k in found if k.architecture == architecture[gpu.name] and k.dtype == dtype]
        for gpu in GPUS
        for dtype in dtypes
    }
    rows = []
    for label, cost_of in cases().items():
        for dtype in dtypes:
            cost = cost_of({"float64": 8, "float32": 4, "bfloat16": 2}[dtype])
            both = cost.forward + cost.backward
            row: dict[str, Any] = {
                "case": label, "dtype": dtype,
                "forward_bytes": sum(step.bytes for step in cost.forward),
                "forward_backward_bytes": sum(step.bytes for step in both),
                "least_forward_bytes": cost.least_forward,
                "least_forward_backward_bytes": cost.least_forward + cost.least_backward,
                "forward_flops": sum(step.flops for step in cost.forward),
                "forward_backward_flops": sum(step.flops for step in both),
                "full_columns": cost.columns,
                "forward_workspace": cost.forward_workspace,
                "backward_workspace": cost.backward_workspace,
            }  # fmt: skip
            for gpu in GPUS:
                row[f"forward_us_{gpu.name}"] = 1e6 * seconds(cost.forward, gpu, dtype, table)
                row[f"forward_backward_us_{gpu.name}"] = 1e6 * seconds(both, gpu, dtype, table)
            rows.append(row)
    return rows


def prediction_table(rows: Sequence[dict[str, Any]]) -> str:
    """Forward, and forward+backward."""
    head = ["case", "type", "MB", "least MB", "GFLOP", "workspace MB", "full columns MB"]
    head += [f"us on {gpu.name}" for gpu in GPUS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["case"], row["dtype"]]
        for key in ("bytes", "least", "flops", "workspace"):
            if key == "workspace":
                pair = [row["forward_workspace"], row["backward_workspace"]]
            elif key == "least":
                pair = [row["least_forward_bytes"], row["least_forward_backward_bytes"]]
            else:
                pair = [row[f"forward_{key}"], row[f"forward_backward_{key}"]]
            cells.append(" / ".join(f"{value / (1e9 if key == 'flops' else 1e6):.1f}" for value in pair))
        cells.append(f"{row['full_columns'] / 1e6:.1f}")
        for gpu in GPUS:
            cells.append(f"{row[f'forward_us_{gpu.name}']:.0f} / {row[f'forward_backward_us_{gpu.name}']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> str:
    """Forward and backward together, before / after."""
    head = ["case", "type", "MB", "ratio", "workspace MB"]
    for gpu in GPUS:
        head += [f"us on {gpu.name}", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    old = {(row["case"], row["dtype"]): row for row in before}
    for row in rows:
        was = old.get((row["case"], row["dtype"]))
        if was is None:
            continue
        cells = [row["case"], row["dtype"]]
        for key, scale, digits in (
            ("forward_backward_bytes", 1e6, 0),
            ("backward_workspace", 1e6, 1),
            *((f"forward_backward_us_{gpu.name}", 1, 0) for gpu in GPUS),
        ):
            cells.append(f"{was[key] / scale:.{digits}f} / {row[key] / scale:.{digits}f}")
            if key != "backward_workspace":
                cells.append(f"{row[key] / was[key]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


NOTES = f"""\
Made by `benchmarks/device_cost.py` without a GPU. The tables say what a compiler made of the kernels and what follows
from sizes: **nothing here was measured**.

- Two figures in a cell: in the table of cases forward / forward and backward, in that of kernels sm_80 / sm_90 where
  they differ.
- MB: every access of every kernel and product counted, as if each went to the second-level cache; least MB: every
  argument read and every result written once. Tensors are channels-last.
- us: the sum over the kernels of the largest of three bounds. Bytes over the bandwidth of the second-level cache
  ({", ".join(f"{gpu.name} {gpu.cache / 1e12:.1f} TB/s" for gpu in GPUS)}); arithmetic of products over the peak of the
  type, float32 without TF32; instructions over what the schedulers issue. Launches and waiting come on top.
- An item is what a warp does for one unit of work, each instruction counted once; its loop is the innermost one that
  touches memory. Loads, stores and atomics of global memory: number x bits.
- Where a kernel on sm_80 shows no loop, none was recognised: its instructions count once, the time on A100 is too low.
- Workspace: columns and partial sums, not the wide sums of the input's gradient.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="operators to compile")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), help="such as sm_90")
    parser.add_argument("--dtypes", nargs="+", choices=list(TYPES.values()), help="to list; all if left out")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier --json to compare the cases with")
    args = parser.parse_args()
    found: list[Kernel] = []
    try:
        for source in args.sources:
            for architecture in args.architectures:
                print(f"{source} for {architecture}", file=sys.stderr, flush=True)
                cubin = compile_kernels(ROOT / "csrc" / "cuda" / f"{source}_kernel.cu", architecture)
                found += kernels(cubin, source, architecture)
    except RuntimeError as error:
        sys.exit(f"device_cost: {error}")
    listed = [kernel for kernel in found if not args.dtypes or kernel.dtype in args.dtypes]
    text = f"# What the device kernels cost\n\n{NOTES}\n"
    rows: list[dict[str, Any]] = []
    if set(args.sources) == set(SOURCES) and set(args.architectures) == set(ARCHITECTURES):
        rows = predictions(("float32", "bfloat16"), found)
        if args.before:
            before = json.loads(args.before.read_text())["cases"]
            text += f"## Before and after\n\n{comparison_table(rows, before)}\n\n"
        text += f"## Cases\n\n{prediction_table(rows)}\n\n"
    text += f"## Kernels\n\n{kernel_table(listed)}\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        parts = {"kernels": [kernel._asdict() for kernel in listed], "cases": rows}
        lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]" for name, part in parts.items()]
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
