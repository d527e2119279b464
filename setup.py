"""Builds the extension `dk_detection._C`: always the CPU kernels, the CUDA kernels too where a toolkit is found.

Environment variables:
    DK_DETECTION_CUDA     1: the CUDA kernels are wanted, fail where they cannot be built; 0: leave them out. Unset:
                          build them if torch is a CUDA build and a toolkit of the same major version is found.
    CUDA_HOME             where to look for the toolkit first.
    TORCH_CUDA_ARCH_LIST  architectures to build for. Unset: those of the visible GPUs; without a GPU
                          "7.5+PTX", which every later GPU can run.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).resolve().parent  # compilers run in another folder


def find_cuda_toolkit() -> "Path | None":
    """The toolkit's folder, known by its header: `nvcc` may be a wrapper script that lies elsewhere."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        for path in (Path(nvcc), Path(nvcc).resolve()):
            candidates += [path.parent.parent, path.parent.parent / "cuda"]
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda_runtime.h").is_file():
            return Path(candidate)
    return None


def cuda_wanted(toolkit: "Path | None") -> bool:
    """Decides whether to build the CUDA kernels; says why not, and fails if they were demanded and cannot be built."""
    demand = os.environ.get("DK_DETECTION_CUDA", "")
    if demand not in ("", "0", "1"):
        sys.exit(f"DK_DETECTION_CUDA must be 0, 1 or unset, got {demand!r}")
    if demand == "0":
        return False
    reason = None
    if torch.version.cuda is None:
        reason = "torch is a CPU-only build"
    elif toolkit is None:
        reason = "no CUDA toolkit was found (no include/cuda_runtime.h; set CUDA_HOME)"
    else:
        header = (toolkit / "include" / "cuda.h").read_text(errors="replace")
        version = re.search(r"#define CUDA_VERSION (\d+)", header)
        major = int(version.group(1)) // 1000 if version else None
        if major != int(torch.version.cuda.split(".")[0]):
            reason = f"torch was built with CUDA {torch.version.cuda}, the toolkit found is of version {major}"
    if reason and demand == "1":
        sys.exit(f"DK_DETECTION_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if reason:
        print(f"dk_detection: building the CPU kernels only: {reason}")
    return reason is None


def extension(with_cuda: bool):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    folders = ["", "ops", "cpu"] + (["cuda"] if with_cuda else [])
    sources = [
        source.relative_to(ROOT).as_posix()
        for folder in folders
        for pattern in ("*.cpp", "*.cu")
        for source in sorted((ROOT / "csrc" / folder).glob(pattern))
    ]
    cxx = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"]
    link = []
    if sys.platform == "linux":  # at::parallel_for is serial in an extension compiled without OpenMP
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    kind = CUDAExtension if with_cuda else CppExtension
    return kind(
        "dk_detection._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[path.as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"]},
        extra_link_args=link,
    )


toolkit = find_cuda_toolkit()
with_cuda = cuda_wanted(toolkit)
if with_cuda:
    os.environ["CUDA_HOME"] = str(toolkit)  # read by torch.utils.cpp_extension when it is imported
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "7.5+PTX"

from torch.utils.cpp_extension import BuildExtension  # noqa: E402  (needs CUDA_HOME)

setup(ext_modules=[extension(with_cuda)], cmdclass={"build_ext": BuildExtension})
