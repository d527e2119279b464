"""Our operators in ONNX's: what `torch.onnx.export` writes in the place of a compiled operator.

While a network is exported the operators do not run. Each says itself in standard operators of ONNX, through the seam
that torch documents for this: `torch.onnx.is_in_onnx_export` and `torch.onnx.ops.symbolic`.
"""

import math
from collections.abc import Sequence

import torch

# Before torch 2.7 what is exported was only said to be compiled.
_is_exported = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exporting() -> bool:
    """Whether `torch.onnx.export` traces the caller."""
    # The first two are cheap, and known to torch.compile, which would look into the third.
    return (_is_exported() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def is_traced_by_torchscript() -> bool:
    """Whether this is the old exporter, `torch.onnx.export(..., dynamo=False)`."""
    return torch.jit.is_tracing()


def deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shape: Sequence[int],
) -> torch.Tensor:
    """Deformable convolution as ONNX's DeformConv, whose tensors have one data type, float32 or wider.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation: as those of `deform_conv2d`.
        shape: of the output.

    Returns:
        `shape`, of input's data type.
    """
    wide = torch.promote_types(torch.promote_types(input.dtype, offset.dtype), torch.float32)
    if bias is None and mask is not None:
        bias = weight.new_zeros(weight.shape[0])  # comes before the mask
    tensors = [t.to(wide) for t in (input, weight, offset, bias, mask) if t is not None]
    kernel_size = tuple(weight.shape[2:])
    attributes = {
        "kernel_shape": kernel_size,
        "strides": stride,
        "pads": (*padding, *padding),
        "dilations": dilation,
        "group": input.shape[1] // weight.shape[1],
        "offset_group": offset.shape[1] // (2 * math.prod(kernel_size)),
    }
    if is_traced_by_torchscript():

        def run(input, weight, offset, bias=None, mask=None):
            return torch.ops.dk_detection.deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation)

        return _TorchScriptDeformConv.apply(attributes, run, *tensors).to(input.dtype)
    return _node("DeformConv", 19, tensors, attributes, shape).to(input.dtype)


class _TorchScriptDeformConv(torch.autograd.Function):
    """A node that the exporter of TorchScript asks for its translation."""

    @staticmethod
    def forward(ctx, attributes, run, *tensors):
        return run(*tensors)

    @staticmethod
    def symbolic(graph, attributes, run, *values):
        return graph.op("DeformConv", *values, **{f"{name}_i": value for name, value in attributes.items()})


def roi_align(
    operator: str,
    input: torch.Tensor,
    image: torch.Tensor,
    low: torch.Tensor,
    size: torch.Tensor,
    output_size: tuple[int, int],
    sampling_ratio: int,
) -> torch.Tensor:
    """The mean over regular grids of samples as ONNX's RoiAlign.

    Args:
        operator: who asks, for messages.
        input: `[N, C, H, W]`, float32 or wider.
        image: `[n]`, which image each RoI is of.
        low, size: `[n, 2]` in pixels of the map, (x, y), of input's data type. Sample q of n in a bin as wide as s that
            begins at a is at a + (q + 0.5) * s / n; the centre of the first pixel is at 0.
        output_size: the bins of a RoI.
        sampling_ratio: samples along each axis of a bin, 0: as many as the bin has pixels, rounded up.

    Returns:
        `[n, C, *output_size]`
    """
    if is_traced_by_torchscript():
        raise RuntimeError(
            f"{operator}: the exporter of TorchScript cannot translate it; use torch.onnx.export(..., dynamo=True)"
        )
    low, high = low + 0.5, low + size + 0.5  # RoiAlign takes it off again
    if sampling_ratio == 0:
        # The difference of the rounded corners may be a little more, or less, than the whole number of pixels that a
        # bin has; the grid would be another one.
        bins = size.new_tensor(output_size[::-1])
        grid, rounded = (size / bins).ceil(), (((high - 0.5) - (low - 0.5)) / bins).ceil()
        high = high + (grid - rounded).sign() * high.abs() * torch.finfo(high.dtype).eps
    attributes = {
        "mode": "avg",
        "coordinate_transformation_mode": "half_pixel",
        "output_height": output_size[0],
        "output_width": output_size[1],
        "sampling_ratio": sampling_ratio,
        "spatial_scale": 1.0,
    }
    inputs = input, torch.cat([low, high], 1), image.long()
    return _node("RoiAlign", 16, inputs, attributes, (low.shape[0], input.shape[1], *output_size))


def _node(op_type, version, inputs, attributes, shape):
    """One node of ONNX: it was in the standard, as it is used here, from `version` on."""
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(f"exporting to ONNX needs torch 2.8 or later, this is {torch.__version__}")
    return torch.onnx.ops.symbolic(op_type, inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=version)
