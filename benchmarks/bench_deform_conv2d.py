"""Deformable convolution at detector sizes: ours, the peers and `conv2d` in one run.

Aims on CPU in float32: forward at most 2x conv2d, forward+backward at most 4x.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Call, Settings, Unsupported, add_arguments, measure, report
from torch import Tensor

# batch, channels (in and out), height, width: the stages of a ResNet at short side 800
SIZES = ((1, 128, 100, 152), (1, 256, 50, 76), (2, 512, 25, 38))
KERNEL, PADDING, SEED, OFFSET_STD = 3, 1, 0, 1.5
DESCRIPTION = (
    f"{KERNEL}x{KERNEL} kernel, stride 1, padding {PADDING}, no bias, one group, one offset group; offsets normal with "
    f"standard deviation {OFFSET_STD} pixels, masks uniform in [0, 1], seed {SEED}. v1 has no mask, v2 has one."
)


class Case(NamedTuple):
    """One size: input [N, C, H, W], offset [N, 2 * 9, H, W], mask [N, 9, H, W], weight [C, C, 3, 3]."""

    input: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor


def make_case(size: tuple[int, int, int, int], settings: Settings) -> Case:
    batch, channels, height, width = size
    taps = KERNEL * KERNEL
    generator = torch.Generator().manual_seed(SEED)
    tensors = (
        torch.randn(batch, channels, height, width, generator=generator),
        torch.randn(batch, 2 * taps, height, width, generator=generator) * OFFSET_STD,
        torch.rand(batch, taps, height, width, generator=generator),
        torch.randn(channels, channels, KERNEL, KERNEL, generator=generator) / (channels * taps) ** 0.5,
    )
    return Case(*(t.to(settings.device, settings.dtype).requires_grad_() for t in tensors))


def conv2d(case: Case, settings: Settings) -> Call:
    return Call(lambda: F.conv2d(case.input, case.weight, padding=PADDING), (case.input, case.weight))


def ours_v2(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_conv2d

    return Call(
        lambda: deform_conv2d(case.input, case.offset, case.weight, padding=(PADDING, PADDING), mask=case.mask),
        tuple(case),
        answer="v2",
    )


def ours_v1(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import deform_conv2d

    return Call(
        lambda: deform_conv2d(case.input, case.offset, case.weight, padding=(PADDING, PADDING)),
        (case.input, case.offset, case.weight),
        answer="v1",
    )


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


def ours_v2_fused(case: Case, settings: Settings) -> Call:
    from dk_detection.ops import fused, use_fused

    if not fused.covers(case.input, case.offset, case.weight):
        raise Unsupported("fused: half types, and float32 with --tf32")
    call = ours_v2(case, settings)
    return Call(call.forward, call.leaves, call.answer, use_fused)


def torchvision_v2(case: Case, settings: Settings) -> Call:
    from torchvision.ops import deform_conv2d

    return Call(
        lambda: deform_conv2d(case.input, case.offset, case.weight, padding=(PADDING, PADDING), mask=case.mask),
        tuple(case),
        answer="v2",
    )


def mmcv_v2(case: Case, settings: Settings) -> Call:
    from mmcv.ops import modulated_deform_conv2d

    return Call(
        lambda: modulated_deform_conv2d(case.input, case.offset, case.mask, case.weight, None, 1, PADDING, 1, 1, 1),
        tuple(case),
        answer="v2",
    )


def mmcv_v1(case: Case, settings: Settings) -> Call:
    from mmcv.ops import deform_conv2d

    return Call(
        lambda: deform_conv2d(case.input, case.offset, case.weight, 1, PADDING, 1, 1, 1),
        (case.input, case.offset, case.weight),
        answer="v1",
    )


def onnxruntime_v2(case: Case, settings: Settings) -> Call:
    """ONNX Runtime's CPU kernel of the standard operator; the weight is a constant of the model, as in deployment."""
    if settings.device.type != "cpu" or settings.dtype != torch.float32:
        raise Unsupported("ONNX Runtime: measured on CPU in float32 only")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    arrays = {name: t.detach().numpy() for name, t in (("X", case.input), ("offset", case.offset), ("mask", case.mask))}
    node = helper.make_node(
        "DeformConv", ["X", "W", "offset", "", "mask"], ["Y"], kernel_shape=[KERNEL] * 2, pads=[PADDING] * 4
    )
    graph = helper.make_graph(
        [node],
        "deform_conv",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(case.weight.detach().numpy(), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    # Its threads would go on spinning after a run and slow down whichever contender comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Call(lambda: session.run(None, arrays), None, answer="v2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    settings = Settings.from_arguments(args)

    cases = {
        f"{batch}x{channels}x{height}x{width}": lambda settings, size=size: make_case(size, settings)
        for size in SIZES[: 1 if args.quick else None]
        for batch, channels, height, width in (size,)
    }
    contenders = {"conv2d": conv2d, "ours v2": ours_v2, "ours v1": ours_v1}
    if settings.device.type == "cuda":
        contenders |= {"ours v2, fused": ours_v2_fused, "ours v2, deterministic": ours_v2_deterministic}
    contenders |= {
        "torchvision v2": torchvision_v2,
        "mmcv v2": mmcv_v2,
        "mmcv v1": mmcv_v1,
        "ONNX Runtime v2": onnxruntime_v2,
    }
    results = measure(cases, contenders, settings)
    report("deform_conv2d", DESCRIPTION, results, "conv2d", settings, args)


if __name__ == "__main__":
    main()
