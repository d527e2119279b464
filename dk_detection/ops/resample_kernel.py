"""Resampling of a convolution's kernel, one kernel an image (Deformable Kernels, 2020, Eq. 12)."""

import torch

from dk_detection.ops import _scope
from dk_detection.ops._common import check_tensor, overridable, pair, without_autocast

_NAME = "resample_kernel"


@overridable
def resample_kernel(
    weight: torch.Tensor,
    kernel_offset: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int],
    clip: bool = True,
) -> torch.Tensor:
    r"""Samples a kernel out of its scope, once for each image: what a global deformable kernel convolves with.

    .. math:: W'(k) = W(k + \Delta k) = \sum_s \max(0, 1 - |k_y + \Delta k_y - s_y|) \cdot
        \max(0, 1 - |k_x + \Delta k_x - s_x|) \cdot W(s)

    Eq. 12 of Deformable Kernels. Rest positions, `clip` and offsets that are not finite are as in
    `deform_kernel_conv2d`, which does the same for each output position. The resampling is linear in `weight` and is
    computed as a matrix product in float32 or wider, under autocast too. Differentiable any number of times.

    Args:
        weight: `[out_channels, in_channels / groups, scopeH, scopeW]`, any floating-point type.
        kernel_offset: `[N, 2 * kH * kW]` in cells of the scope: taps row-major, (dy, dx) interleaved. Any
            floating-point type.
        kernel_size: (kH, kW) or an int, not larger than the scope.
        clip: whether to keep sampling positions within the scope.

    Returns:
        `[N, out_channels, in_channels / groups, kH, kW]` of weight's dtype.

    Raises:
        ValueError: a shape, a size or a device does not fit.
        TypeError: a dtype does not fit.
    """
    check_tensor(_NAME, "weight", weight)
    check_tensor(_NAME, "kernel_offset", kernel_offset)
    kernel_h, kernel_w = pair(_NAME, "kernel_size", kernel_size, 1)
    if kernel_offset.device != weight.device:
        raise ValueError(
            f"{_NAME}: kernel_offset is on {kernel_offset.device}, expected the device of weight, {weight.device}"
        )
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"{_NAME}: weight must be [out_channels, in_channels / groups, scopeH, scopeW], got shape "
            f"{list(weight.shape)}"
        )
    scope_h, scope_w = weight.shape[2:]
    if scope_h < kernel_h or scope_w < kernel_w:
        raise ValueError(
            f"{_NAME}: weight has a scope of {scope_h}x{scope_w}, expected at least kernel_size = {kernel_h}x{kernel_w}"
        )
    taps = kernel_h * kernel_w
    if kernel_offset.dim() != 2 or kernel_offset.shape[1] != 2 * taps:
        raise ValueError(
            f"{_NAME}: kernel_offset has shape {list(kernel_offset.shape)}, expected [N, 2 * kH * kW] = [N, {2 * taps}]"
        )

    wide = torch.promote_types(torch.promote_types(weight.dtype, kernel_offset.dtype), torch.float32)
    with without_autocast(weight.device.type):
        cells = _scope.cell_weights(kernel_offset.to(wide).view(-1, kernel_h, kernel_w, 2), (scope_h, scope_w), clip)
        cells = cells.flatten(0, 2)  # [N*kH*kW, cells]
        kernels = cells @ weight.to(wide).flatten(2).flatten(0, 1).t()  # [N*kH*kW, out * in]
    kernels = kernels.to(weight.dtype).view(-1, kernel_h, kernel_w, *weight.shape[:2])
    return kernels.permute(0, 3, 4, 1, 2)
