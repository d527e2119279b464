"""Convolution with a kernel of its own for every image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Kernels that exist at a time. A batch whose kernels are larger goes in parts.
_KERNEL_BYTES = 64 << 20


def conv2d_per_image(layer: nn.Conv2d, input: Tensor, steering: Tensor, kernels: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolves every image with its own kernel, in the geometry of `layer` and with its bias.

    The kernels of a batch are as large as the layer's weight times the batch, so no more of them are made at a time
    than `_KERNEL_BYTES` hold, and none is kept for the backward: it makes them again, which is cheap.

    Args:
        layer: What knows the geometry and the bias.
        input: [N, in_channels, H, W].
        steering: [N, ...], what the kernels are made from.
        kernels: From [n, ...], a part of `steering`, to [n, out_channels, in_channels / groups, kH, kW].

    Returns:
        [N, out_channels, outH, outW], in the memory format of the input.
    """

    def convolve(maps: Tensor, steering: Tensor) -> Tensor:
        count = maps.shape[0]
        if pointwise:  # a matrix product for each image
            maps = maps[..., :: layer.stride[0], :: layer.stride[1]]
            output = (kernels(steering).flatten(2) @ maps.flatten(2)).view(count, -1, *maps.shape[2:])
            return output if layer.bias is None else output + layer.bias.view(-1, 1, 1).to(output.dtype)
        # A batch with a kernel each is one image with as many groups of channels.
        output = F.conv2d(
            maps.reshape(1, -1, *maps.shape[2:]),
            kernels(steering).flatten(0, 1),
            None if layer.bias is None else layer.bias.repeat(count),
            layer.stride,
            layer.padding,
            layer.dilation,
            count * layer.groups,
        )
        return output.view(count, -1, *output.shape[2:])

    batch = input.shape[0]
    pointwise = layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    if batch == 0:
        # There are no convolutions with no groups. The sum of nothing keeps the steering branch in the graph.
        kernel = kernels(steering.new_zeros(1, *steering.shape[1:]) + steering.sum()).squeeze(0)
        return F.conv2d(input, kernel, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    kernel_bytes = layer.out_channels * layer.in_channels // layer.groups * taps * layer.weight.element_size()
    part = max(1, _KERNEL_BYTES // kernel_bytes)
    outputs = []
    for maps, steer in zip(input.split(part), steering.split(part), strict=True):
        if torch.is_grad_enabled() and not torch.jit.is_tracing():
            output = checkpoint(convolve, maps, steer, use_reentrant=False, preserve_rng_state=False)
        else:
            output = convolve(maps, steer)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return output.contiguous(memory_format=torch.channels_last) if channels_last else output
