"""Kernel evolution at detector sizes beside `conv2d`, `deform_conv2d` and the larger rigid filter that it amounts to.

Aim on CPU in float32: forward without attention at most 1.5x conv2d.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Call, Settings, add_arguments, measure, report
from torch import Tensor

# batch, channels (in and out), height, width, groups: the stages of a ResNet at short side 800, and a depthwise one
SIZES = ((1, 128, 100, 152, 1), (1, 256, 50, 76, 1), (2, 512, 25, 38, 1), (1, 256, 50, 76, 256))
KERNEL, PADDING, SEED, RADIUS, ALPHA = 3, 1, 0, 2.0, 2.0
REACH = 4  # of the larger filter, in pixels: locations farther than 2 from the middle are drawn again
DESCRIPTION = (
    f"{KERNEL * KERNEL} locations a channel, standard normal within {REACH - int(RADIUS)} pixels, radius {RADIUS:g}, "
    f"alpha {ALPHA:g}; stride 1, output size of a {KERNEL}x{KERNEL} kernel with padding {PADDING}, no bias; the last "
    f"size is depthwise. `larger filter` computes its filter of {2 * REACH + 1}x{2 * REACH + 1} cells from the "
    "locations and calls conv2d. `deform_conv2d` (v1) moves its taps by constant offsets, as ActiveConv does."
)


class Case(NamedTuple):
    """One size: input [N, C, H, W], location [C, 9, 2], attention [N, 9, H, W], offset [N, 18, H, W].

    The weight is [C, C / groups, 9].
    """

    input: Tensor
    location: Tensor
    attention: Tensor
    offset: Tensor
    weight: Tensor


def make_case(size: tuple[int, int, int, int, int], settings: Settings) -> Case:
    batch, channels, height, width, groups = size
    taps = KERNEL * KERNEL
    generator = torch.Generator().manual_seed(SEED)
    location = torch.empty(channels, taps, 2)
    bound = REACH - RADIUS
    torch.nn.init.trunc_normal_(location, a=-bound, b=bound, generator=generator)
    offset = torch.randn(2 * taps, 1, 1, generator=generator).expand(batch, -1, height, width)
    tensors = (
        torch.randn(batch, channels, height, width, generator=generator),
        location,
        torch.rand(batch, taps, height, width, generator=generator),
        offset.contiguous(),
        torch.randn(channels, channels // groups, taps, generator=generator) / (channels // groups * taps) ** 0.5,
    )
    return Case(*(t.to(settings.device, settings.dtype).requires_grad_() for t in tensors))


def groups_of(case: Case) -> int:
    return case.input.shape[1] // case.weight.shape[1]


def conv2d(case: Case, settings: Settings) -> Call:
    weight = case.weight.unflatten(2, (KERNEL, KERNEL)).detach().contiguous().requires_grad_()
    return Call(lambda: F.conv2d(case.input, weight, padding=PADDING, groups=groups_of(case)), (case.input, weight))


def ours(case: Case, settings: Settings, attention: Tensor | None = None) -> Call:
    from dk_detection.ops import kernel_evolution_conv2d

    leaves = (case.input, case.location, case.weight)
    return Call(
        lambda: kernel_evolution_conv2d(
            case.input,
            case.location,
            case.weight,
            padding=PADDING,
            kernel_size=KERNEL,
            attention=attention,
            radius=RADIUS,
            alpha=ALPHA,
        ),
        leaves if attention is None else (*leaves, attention),
        answer="constant" if attention is None else None,
    )


def ours_with_attention(case: Case, settings: Settings) -> Call:
    return ours(case, settings, case.attention)


def larger_filter(case: Case, settings: Settings) -> Call:
    side = torch.arange(-REACH, REACH + 1, dtype=case.location.dtype, device=case.location.device)
    pixels = torch.cartesian_prod(side, side)

    def forward() -> Tensor:
        squared = (case.location.unsqueeze(2) - pixels).square().sum(-1)  # [C, K, pixels]
        weights = torch.where(squared <= RADIUS**2, torch.exp(-ALPHA * squared), 0)
        weights = weights / weights.detach().sum(-1, keepdim=True)
        grouped = weights.view(groups_of(case), -1, *weights.shape[1:])  # [groups, C / groups, K, pixels]
        kernels = torch.einsum("gock,gckp->gocp", case.weight.unflatten(0, (len(grouped), -1)), grouped)
        filter = kernels.flatten(0, 1).unflatten(2, (len(side), len(side)))
        return F.conv2d(case.input, filter, padding=REACH, groups=len(grouped))

    return Call(forward, (case.input, case.location, case.weight), answer="constant")


def deform_conv2d(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_conv2d

    weight = case.weight.unflatten(2, (KERNEL, KERNEL)).detach().contiguous().requires_grad_()
    return Call(
        lambda: deform_conv2d(case.input, case.offset, weight, padding=PADDING), (case.input, case.offset, weight)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    settings = Settings.from_arguments(args)

    cases = {
        f"{batch}x{channels}x{height}x{width}" + (", depthwise" if groups > 1 else ""): lambda settings, size=size: (
            make_case(size, settings)
        )
        for size in SIZES[: 1 if args.quick else None]
        for batch, channels, height, width, groups in (size,)
    }
    contenders = {
        "conv2d": conv2d,
        "ours": ours,
        "ours, attention": ours_with_attention,
        "larger filter": larger_filter,
        "deform_conv2d": deform_conv2d,
    }
    results = measure(cases, contenders, settings)
    report("kernel_evolution_conv2d", DESCRIPTION, results, "conv2d", settings, args)


if __name__ == "__main__":
    main()
