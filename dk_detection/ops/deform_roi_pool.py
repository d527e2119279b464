"""Deformable RoI pooling (Deformable Convolutional Networks, 2017, Eq. 6; Deformable ConvNets v2, 2018, Eq. 2)."""

from collections.abc import Sequence

import torch

from dk_detection.ops import _onnx, _rois, flops
from dk_detection.ops._common import autocast, check_tensor, overridable, pair

_NAME = "deform_roi_pool"


@overridable
def deform_roi_pool(
    input: torch.Tensor,
    rois: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | tuple[int, int],
    *,
    offset: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> torch.Tensor:
    r"""The mean of each bin of each RoI, every bin moved by its offset and scaled by its modulation.

    .. math:: y(k) = \sum_{j=1}^{n_k} x(p_{kj} + \Delta p_k) \cdot \Delta m_k / n_k

    Eq. 2 of Deformable ConvNets v2; without `mask` Eq. 6 of Deformable Convolutional Networks; without both aligned RoI
    pooling, as `torchvision.ops.roi_align(..., aligned=True)`. The numbers are those of mmcv's operator of this name;
    the gradient of the offset is the true one, also where mmcv's is not (docs/ops/deform_roi_pool.md).

    RoI corners are scaled and shifted by half a pixel, neither rounded nor given a least size. A bin is sampled
    bilinearly on a regular grid. A sample more than a pixel beyond the centres of the outermost pixels is a zero that
    counts in the mean; a nearer one takes the value of the nearest point on the map. A bin whose offset is not finite
    has no such points: it is zero.

    Args:
        input: `[N, C, H, W]`, float64, float32, float16 or bfloat16, contiguous or channels-last (the output follows).
        rois: `[n, 5]` = (batch index, x1, y1, x2, y2) in pixels of the image, or a list of `[k, 4]` = (x1, y1, x2, y2),
            one for each image. Any floating-point type; float32 is best, as float16 rounds coordinates beyond 2048.
            Positions are computed in float32 or wider. An empty or inverted RoI gives zeros if the sampling ratio is
            adaptive. No gradient flows to the RoIs.
        output_size: the bins of a RoI, an int or (vertical, horizontal).
        offset: `[n, 2, outH, outW]`, channel 0 is x in units of `gamma` * RoI width, channel 1 is y in units of `gamma`
            * RoI height: the paper's normalised offsets. Any floating-point type. None is 0 everywhere.
        mask: `[n, 1, outH, outW]` or `[n, outH, outW]`, the modulation of each bin. Any floating-point type. None is 1
            everywhere.
        spatial_scale: pixels of the map per pixel of the image, such as 1 / stride.
        sampling_ratio: samples along each axis of a bin; 0 or less: as many as the pixels of the map that the bin
            covers, rounded up. Samples of the adaptive grid that lie off the map are counted and not visited, so the
            time a RoI takes is bounded by the map, not by the RoI.
        gamma: the paper's factor on the normalised offsets.

    Returns:
        `[n, C, outH, outW]` of input's dtype. Under autocast input is cast as for `conv2d`; rois, offset and mask keep
        their dtype.

    Raises:
        ValueError: a shape, a size, a device or a RoI (its batch index, a coordinate that is not finite) does not fit.
            On CUDA the RoIs are checked without waiting for the GPU: a wrong one gives NaN, and if the error does not
            come from this call, it comes from a later one of a RoI operator and says how many calls ago it was. With
            the environment variable CUDA_LAUNCH_BLOCKING=1 it comes from this call.
        TypeError: a dtype does not fit.
        RuntimeError: the compiled library is missing or was built from other sources; or a second derivative is taken.
    """
    check_tensor(_NAME, "input", input)
    (input,) = autocast(input.device.type, input)
    rois = _rois.as_rois(_NAME, rois, input)
    output_size = pair(_NAME, "output_size", output_size, 1)
    args = (input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma)
    return _operator(*args)


def _output_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    """Checks the arguments and returns the output's shape."""
    _rois.check_maps_and_rois(_NAME, input, rois)
    _rois.check_number(_NAME, "spatial_scale", spatial_scale, positive=True)
    _rois.check_number(_NAME, "gamma", gamma, positive=False)
    _rois.check_integer(_NAME, "sampling_ratio", sampling_ratio)
    _rois.check_parts(_NAME, input, offset, mask, rois.shape[0], 1, tuple(output_size))
    return rois.shape[0], input.shape[1], *output_size


def _multiply_adds(shapes, out_shape):
    # Every sample of every output, and the modulation of each output. An adaptive grid depends on the RoIs, which
    # shapes do not tell: it counts as the 2x2 grid that Deformable ConvNets v2 names, and so does a ratio that the
    # counting tool does not pass on.
    ratio = shapes[6] if isinstance(shapes[6], int) and shapes[6] > 0 else 2
    rois, channels, out_h, out_w = out_shape
    modulation = 0 if shapes[3] is None else flops.MODULATED_VALUE
    return rois * channels * out_h * out_w * (ratio**2 * flops.SAMPLED_VALUE + modulation)


def _standard(operator, input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    """By aligned RoI pooling; where bins move, each is an RoI of its own."""
    count, channels, *bins = operator.output_shape(
        input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma
    )
    wide = torch.promote_types(input.dtype, torch.float32)
    maps, rois, sampling_ratio = input.to(wide), rois.to(wide), max(sampling_ratio, 0)
    image, low = rois[:, 0], rois[:, 1:3] * spatial_scale - 0.5  # [n, 2], (x, y)
    size = rois[:, 3:] * spatial_scale - 0.5 - low
    if offset is None:
        output = _onnx.roi_align(_NAME, maps, image, low, size, output_size, sampling_ratio)
    else:
        size = size[:, None, None]
        low = low[:, None, None] + gamma * size * offset.to(wide).permute(0, 2, 3, 1)
        size = size / size.new_tensor(output_size[::-1])
        low = low + _rois.bin_numbers(output_size, low) * size  # [n, outH, outW, 2]
        low = torch.where(low.isfinite().all(-1, keepdim=True), low, -1e6)  # far off the map
        low, size = low.flatten(0, 2), size.expand(low.shape).flatten(0, 2)
        image = image[:, None].expand(-1, bins[0] * bins[1]).flatten()
        output = _onnx.roi_align(_NAME, maps, image, low, size, (1, 1), sampling_ratio)
        output = output.reshape(count, *bins, channels).permute(0, 3, 1, 2)
    if mask is not None:
        output = output * mask.to(wide).view(count, 1, *bins)
    return output.to(input.dtype)


_operator = _rois.pooling(_NAME, _output_shape, _multiply_adds, _standard)
