"""Convolution with a kernel of its own for every image."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import checkpoint

# Kernels that exist at a time. A batch whose kernels are larger goes in parts.
_KERNEL_BYTES = 64 << 20


def conv2d_per_image(
    input: Tensor,
    steering: Tensor,
    kernels: Callable[[Tensor], Tensor],
    kernel_shape: tuple[int, int, int, int],
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolves every image with its own kernel.

    The kernels of a batch are as large as a weight times the batch, so no more of them are made at a time than
    `_KERNEL_BYTES` hold, and none is kept for the backward: it makes them again, which is cheap.

    Args:
        input: [N, C, H, W], or an image without a batch, [C, H, W].
        steering: [N, ...], what the kernels are made from; without the first dimension for an image without a batch.
        kernels: From [n, ...], a part of `steering`, to [n, out_channels, C / groups, kH, kW].
        kernel_shape: (out_channels, C / groups, kH, kW).
        bias: [out_channels].
        stride, padding, dilation, groups: As those of nn.Conv2d.

    Returns:
        [N, out_channels, outH, outW] or [out_channels, outH, outW], in the memory format of the input.
    """
    if input.dim() == 3:
        settings = (kernels, kernel_shape, bias, stride, padding, dilation, groups)
        return conv2d_per_image(input.unsqueeze(0), steering.unsqueeze(0), *settings).squeeze(0)

    def convolve(maps: Tensor, steering: Tensor) -> Tensor:
        count, kernel = maps.shape[0], kernels(steering)
        if kernel_shape[2:] == (1, 1) and padding == (0, 0) and groups == 1:  # a matrix product for each image
            maps = maps[..., :: stride[0], :: stride[1]]
            output = (kernel.flatten(2) @ maps.flatten(2)).view(count, -1, *maps.shape[2:])
            return output if bias is None else output + bias.view(-1, 1, 1).to(output.dtype)
        # A batch with a kernel each is one image with as many groups of channels.
        output = F.conv2d(
            maps.reshape(1, -1, *maps.shape[2:]),
            kernel.flatten(0, 1),
            None if bias is None else bias.repeat(count),
            stride,
            padding,
            dilation,
            count * groups,
        )
        return output.view(count, -1, *output.shape[2:])

    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return _unfolded(input, kernels(steering), bias, stride, padding, dilation, groups)
    if input.shape[0] == 0:
        # There are no convolutions with no groups. The sum of nothing keeps the steering branch in the graph.
        kernel = kernels(steering.new_zeros(1, *steering.shape[1:]) + steering.sum()).squeeze(0)
        return F.conv2d(input, kernel, bias, stride, padding, dilation, groups)
    part = max(1, _KERNEL_BYTES // (math.prod(kernel_shape) * input.element_size()))
    outputs = []
    for maps, steer in zip(input.split(part), steering.split(part), strict=True):
        if torch.is_grad_enabled() and not _is_transformed(input, steering):
            output = checkpoint(convolve, maps, steer, use_reentrant=False, preserve_rng_state=False)
        else:
            output = convolve(maps, steer)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return output.contiguous(memory_format=torch.channels_last) if channels_last else output


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward mode is at work, which do not go with checkpoints."""
    if torch._C._are_functorch_transforms_active():  # torch has no public question of this kind
        return True
    return any(unpack_dual(t).tangent is not None for t in tensors)


def _unfolded(input, kernel, bias, stride, padding, dilation, groups) -> Tensor:
    """The same by a product with the columns of each image, in which no number depends on the size of the batch."""
    # That of a convolution, in the form that torch's symbolic sizes have for `unfold`.
    out_h, out_w = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel.shape[3 + i] - 1) + stride[i] - 1) // stride[i]
        for i in (0, 1)
    )
    columns = F.unfold(input, kernel.shape[3:], dilation, padding, stride)  # [N, C * kH * kW, outH * outW]
    output = kernel.flatten(2).unflatten(1, (groups, -1)) @ columns.unflatten(1, (groups, -1))
    output = output.flatten(1, 2).unflatten(2, (out_h, out_w))
    return output if bias is None else output + bias.view(-1, 1, 1).to(output.dtype)
