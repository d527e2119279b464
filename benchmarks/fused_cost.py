"""What the fused kernels cost a multiprocessor, read from their machine code. Needs Triton, no GPU.

Each kernel is compiled for A100 (sm_80) and H100 (sm_90), with the tiles of a convolution of 256 to 256 channels and of
one of 48 to 48.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dk_detection.ops import _fused_deform_conv2d as fused

KERNELS = {
    "forward": (fused.forward_kernel, 0, {"BIASED": True}),
    "backward": (fused.backward_kernel, 1, {"INPUT": True, "SAMPLES": True}),
    "filter_gradient": (fused.filter_gradient_kernel, 2, {}),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# In the data type; offsets, masks and gradients that are summed up are float32.
DATA = {"input", "weight", "bias", "output", "grad"}
FLOATS = {"offset", "mask", "grad_input", "grad_offset", "grad_mask", "grad_weight"}


@dataclass(frozen=True)
class Cost:
    """Of one compiled kernel."""

    tile: fused.Tile
    registers: int  # of a thread
    spill_bytes: int
    shared_bytes: int
    instructions: int
    tensor_core_instructions: int
    wide_gathers: int  # loads of 16 bytes
    reductions: int  # instructions that add to memory

    @property
    def blocks(self) -> int:
        """That fit a multiprocessor, as far as its 65536 registers and 163 KiB of shared memory go."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.tile.warps)
        return min(by_registers, 163 * 1024 // max(self.shared_bytes, 1))


def compile_kernel(name: str, dtype: torch.dtype, arch: int, channels: int = 256, wide: bool = False) -> Cost:
    """Compiles a kernel for `channels` to as many channels, a multiple of 16."""
    kernel, index, constants = KERNELS[name]
    geometry = fused.Geometry(channels, channels, channels, channels, 1, channels, channels, *[1] * 13)
    tile = fused.tiles(geometry, dtype)[index]
    constants = constants | {
        "MASKED": True, "WIDE": wide, "ROWS": tile.rows, "OUTPUTS": tile.outputs, "CHANNELS": tile.channels
    }  # fmt: skip
    names = kernel.arg_names
    types = dict.fromkeys(DATA, f"*{TYPES[dtype]}") | dict.fromkeys(FLOATS, "*fp32")
    types |= {"g": fused.Geometry(*["i32"] * len(geometry))} | dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, argument in enumerate(names) if argument in DATA | FLOATS}
    attributes |= {(names.index("g"), i): divisible for i, value in enumerate(geometry) if value == channels}
    source = ASTSource(
        kernel,
        signature={argument: types[argument] for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _dump(compiled.asm["cubin"], "-res-usage"), _dump(compiled.asm["cubin"], "-sass")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]+)", code, re.MULTILINE)

    def count(pattern):
        return sum(bool(re.match(pattern, instruction)) for instruction in instructions)

    return Cost(
        tile, registers, stack + local, compiled.metadata.shared, len(instructions), count(r"HMMA|HGMMA"),
        count(r"LDG(STS)?\..*128"), count(r"RED|ATOM"),
    )  # fmt: skip


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def table() -> str:
    """As Markdown."""
    rows = [
        ["kernel", "type", "channels", "GPU", "rows x outputs x channels, warps", "registers", "spills, bytes",
         "shared, KiB", "blocks", "instructions", "tensor cores", "16-byte loads", "reductions"]
    ]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    for name in KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            for channels in (256, 48):
                for arch in (80, 90):
                    cost = compile_kernel(name, dtype, arch, channels)
                    kind = "TF32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
                    tile = f"{cost.tile.rows} x {cost.tile.outputs} x {cost.tile.channels}, {cost.tile.warps}"
                    rows.append(
                        [name, kind, channels, f"sm_{arch}", tile, cost.registers, cost.spill_bytes,
                         f"{cost.shared_bytes / 1024:.0f}", cost.blocks, cost.instructions,
                         cost.tensor_core_instructions, cost.wide_gathers, cost.reductions]
                    )  # fmt: skip
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table to a file, too")
    args = parser.parse_args()
    text = "\n\n".join((
        "Fused kernels, by their machine code",
        f"Compiled by Triton {triton.__version__}, not run. `blocks`: that fit a multiprocessor at a time by registers "
        "and 163 KiB of shared memory. Loads and reductions are counted once where they are in a loop.",
        table(),
    ))  # fmt: skip
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
