"""Deformable RoI pooling at detector sizes: ours and the peers in one run, beside torchvision's rigid RoI pooling.

In the cases named "aligned" torchvision is `roi_align` and ours is `deform_roi_pool`, in those named
"position-sensitive" they are `ps_roi_align` and `deform_psroi_pool`. Neither of torchvision's moves its bins.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from common import Call, Settings, Unsupported, add_arguments, measure, report
from torch import Tensor

# (RoIs, output channels, group size, height, width, bins, stride): a box head on a middle and on a fine level, a mask
# head, R-FCN
SIZES = (
    (512, 256, 1, 50, 76, 7, 16),
    (512, 256, 1, 200, 304, 7, 4),
    (128, 256, 1, 50, 76, 14, 16),
    (300, 21, 7, 50, 76, 7, 16),
)
SAMPLES, GAMMA, SEED, OFFSET_STD = 2, 0.1, 0, 0.5
DESCRIPTION = (
    f"One image, {SAMPLES}x{SAMPLES} samples a bin; RoIs of 2 to 16 pixels of the map in each direction, none over its "
    f"border; offsets normal with standard deviation {OFFSET_STD} of {GAMMA} RoI sizes, masks uniform in [0, 1], "
    f"seed {SEED}. Rigid has neither offsets nor masks, v1 has offsets, v2 has both."
)


class Case(NamedTuple):
    """One size: input [1, C * group ** 2, H, W], rois [n, 5], offset [n, 2, bins, bins], mask [n, 1, bins, bins]."""

    input: Tensor
    rois: Tensor
    offset: Tensor
    mask: Tensor
    channels: int
    group: int
    scale: float

    @property
    def bins(self) -> int:
        return self.mask.shape[-1]


def make_case(size: tuple[int, ...], settings: Settings) -> Case:
    count, channels, group, height, width, bins, stride = size
    generator = torch.Generator().manual_seed(SEED)
    limits = torch.tensor([width, height])
    sides = 2 + 14 * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (limits - sides)
    rois = torch.cat([torch.zeros(count, 1), corner * stride, (corner + sides) * stride], 1)
    input = torch.randn(1, channels * group**2, height, width, generator=generator)
    offset = torch.randn(count, 2, bins, bins, generator=generator) * OFFSET_STD
    mask = torch.rand(count, 1, bins, bins, generator=generator)
    leaves = (t.to(settings.device, settings.dtype).requires_grad_() for t in (input, offset, mask))
    input, offset, mask = leaves
    return Case(input, rois.to(settings.device, settings.dtype), offset, mask, channels, group, 1 / stride)


def torchvision(case: Case, settings: Settings) -> Call:
    from torchvision.ops import ps_roi_align, roi_align

    if case.group > 1:
        return Call(lambda: ps_roi_align(case.input, case.rois, case.bins, case.scale, SAMPLES), (case.input,))
    return Call(
        lambda: roi_align(case.input, case.rois, case.bins, case.scale, SAMPLES, aligned=True),
        (case.input,),
        answer="rigid",
    )


def ours(case: Case, **parts: Tensor) -> Call:
    from dk_detection.ops import deform_psroi_pool, deform_roi_pool

    shared = {"spatial_scale": case.scale, "gamma": GAMMA, **parts}
    if case.group > 1:
        shared |= {"output_channels": case.channels, "group_size": case.group, "samples_per_part": SAMPLES}
        return Call(
            lambda: deform_psroi_pool(case.input, case.rois, case.bins, **shared), (case.input, *parts.values())
        )
    return Call(
        lambda: deform_roi_pool(case.input, case.rois, case.bins, sampling_ratio=SAMPLES, **shared),
        (case.input, *parts.values()),
        answer="v2" if "mask" in parts else "v1" if parts else "rigid",
    )


def ours_rigid(case: Case, settings: Settings) -> Call:
    return ours(case)


def ours_v1(case: Case, settings: Settings) -> Call:
    return ours(case, offset=case.offset)


def ours_v2(case: Case, settings: Settings) -> Call:
    return ours(case, offset=case.offset, mask=case.mask)


def ours_v2_deterministic(case: Case, settings: Settings) -> Call:
    @contextlib.contextmanager
    def deterministic() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    call = ours_v2(case, settings)
    return Call(call.forward, call.leaves, call.answer, deterministic)


def mmcv_v1(case: Case, settings: Settings) -> Call:
    from mmcv.ops import deform_roi_pool

    if case.group > 1:
        raise Unsupported("mmcv: no position-sensitive form")
    return Call(
        lambda: deform_roi_pool(case.input, case.rois, case.offset, (case.bins, case.bins), case.scale, SAMPLES, GAMMA),
        (case.input, case.offset),
        answer="v1",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    settings = Settings.from_arguments(args)

    cases = {}
    for size in SIZES[: 1 if args.quick else None]:
        count, channels, group, height, width, bins, _ = size
        form = "position-sensitive" if group > 1 else "aligned"
        label = f"{form}: {count} RoIs, {channels * group**2}x{height}x{width} to {channels}x{bins}x{bins}"
        cases[label] = lambda settings, size=size: make_case(size, settings)
    contenders = {"torchvision": torchvision, "ours rigid": ours_rigid, "ours v1": ours_v1, "ours v2": ours_v2}
    if settings.device.type == "cuda":
        contenders["ours v2, deterministic"] = ours_v2_deterministic
    contenders["mmcv v1"] = mmcv_v1
    results = measure(cases, contenders, settings)
    report("deform_roi_pool", DESCRIPTION, results, "torchvision", settings, args)


if __name__ == "__main__":
    main()
