"""Deformable kernels at detector sizes: ours beside `conv2d` and `deform_conv2d` in one run.

No peer has a local deformable kernel for the CPU, for dense filters, or with a backward that runs.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Call, Settings, add_arguments, measure, report
from torch import Tensor

# batch, channels (in and out), height, width, groups: depthwise as in ResNet-50-DW, and dense as in ResNet-50, at short
# side 800
SIZES = (
    (1, 256, 100, 152, 256),
    (1, 512, 50, 76, 512),
    (2, 1024, 25, 38, 1024),
    (1, 128, 100, 152, 1),
    (1, 256, 50, 76, 1),
)
KERNEL, SCOPE, PADDING, SEED, KERNEL_OFFSET_STD, OFFSET_STD = 3, 4, 1, 0, 0.5, 1.5
DESCRIPTION = (
    f"{KERNEL}x{KERNEL} kernel, scope {SCOPE}x{SCOPE}, stride 1, padding {PADDING}, no bias, clipped, one group of "
    f"offsets; kernel offsets normal with standard deviation {KERNEL_OFFSET_STD} cells, data offsets {OFFSET_STD} "
    f"pixels, seed {SEED}."
)


class Case(NamedTuple):
    """One size: input [N, C, H, W], offsets [N, 2 * 9, H, W], weight [C, C / groups, 4, 4], kernel alike but 3x3."""

    input: Tensor
    kernel_offset: Tensor
    offset: Tensor
    weight: Tensor
    kernel: Tensor

    @property
    def groups(self) -> int:
        return self.input.shape[1] // self.weight.shape[1]


def make_case(size: tuple[int, int, int, int, int], settings: Settings) -> Case:
    batch, channels, height, width, groups = size
    taps, group_in = KERNEL * KERNEL, channels // groups
    generator = torch.Generator().manual_seed(SEED)
    tensors = (
        torch.randn(batch, channels, height, width, generator=generator),
        torch.randn(batch, 2 * taps, height, width, generator=generator) * KERNEL_OFFSET_STD,
        torch.randn(batch, 2 * taps, height, width, generator=generator) * OFFSET_STD,
        torch.randn(channels, group_in, SCOPE, SCOPE, generator=generator) / (group_in * taps) ** 0.5,
        torch.randn(channels, group_in, KERNEL, KERNEL, generator=generator) / (group_in * taps) ** 0.5,
    )
    return Case(*(t.to(settings.device, settings.dtype).requires_grad_() for t in tensors))


def conv2d(case: Case, settings: Settings) -> Call:
    return Call(
        lambda: F.conv2d(case.input, case.kernel, padding=PADDING, groups=case.groups), (case.input, case.kernel)
    )


def dcn(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_conv2d

    return Call(
        lambda: deform_conv2d(case.input, case.offset, case.kernel, padding=PADDING),
        (case.input, case.offset, case.kernel),
    )


def dk(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_kernel_conv2d

    return Call(
        lambda: deform_kernel_conv2d(case.input, case.kernel_offset, case.weight, padding=PADDING, kernel_size=KERNEL),
        (case.input, case.kernel_offset, case.weight),
    )


def dk_dcn(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_kernel_conv2d

    return Call(
        lambda: deform_kernel_conv2d(
            case.input, case.kernel_offset, case.weight, padding=PADDING, kernel_size=KERNEL, offset=case.offset
        ),
        (case.input, case.kernel_offset, case.offset, case.weight),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    settings = Settings.from_arguments(args)

    cases = {
        f"{batch}x{channels}x{height}x{width} {'dense' if groups == 1 else 'depthwise'}": (
            lambda settings, size=size: make_case(size, settings)
        )
        for size in SIZES[: 1 if args.quick else None]
        for batch, channels, height, width, groups in (size,)
    }
    contenders = {"conv2d": conv2d, "deform_conv2d": dcn, "local DK": dk, "local DK + DCN": dk_dcn}
    results = measure(cases, contenders, settings)
    report("deform_kernel_conv2d", DESCRIPTION, results, "conv2d", settings, args)


if __name__ == "__main__":
    main()
