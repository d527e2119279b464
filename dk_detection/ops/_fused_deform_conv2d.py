"""deform_conv2d in Triton: samples are multiplied by the filter as they are taken, without a buffer of columns.

A program owns a tile of output positions. It sets up the samples of one tap once, reads a block of channels of their
four corners, and hands what it interpolated to the tensor cores. The backward forms a tile of the columns' gradient in
the same way and spends it at once; for the gradient of the filter the samples are taken again. Sums are float32.

Triton's interpreter runs these functions on CPU tensors. Which calls they serve is said in `fused.py`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Geometry(NamedTuple):
    """Sizes that the kernels share. Of the tensors [N, C, H, W] and [N, O, outH, outW], `rows` is N * outH * outW."""

    channels: int
    outputs: int
    group_in: int
    group_out: int
    offset_groups: int
    offset_channels: int  # of an offset group
    segment: int  # consecutive channels that are of one weight group and one offset group
    height: int
    width: int
    out_w: int
    positions: int
    rows: int
    taps: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


class Tile(NamedTuple):
    """Sizes of the blocks of a program, powers of two from 16 on, and what Triton's compiler is told."""

    rows: int
    outputs: int
    channels: int
    warps: int
    stages: int


@triton.jit
def _place(offset, mask, row, tap, group, g, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """Where tap `tap` of offset group `group` looks from rows of the output.

    Returns:
        The number of the pixel at the top left among those of all images; for each corner whether it is on the map; the
        distances to the top row and the left column; the modulation. What sees nothing has no corner on the map.
    """
    is_row = row < g.rows
    n = row // g.positions
    position = row - n * g.positions
    if WIDE:
        n = n.to(tl.int64)
    plane = (n * g.offset_groups + group) * g.taps + tap
    shift = offset + plane * (2 * g.positions) + position
    y = tl.load(shift, is_row, float("nan")).to(tl.float32)
    x = tl.load(shift + g.positions, is_row, float("nan")).to(tl.float32)
    y += (position // g.out_w * g.stride_h - g.padding_h + tap // g.kernel_w * g.dilation_h).to(tl.float32)
    x += (position % g.out_w * g.stride_w - g.padding_w + tap % g.kernel_w * g.dilation_w).to(tl.float32)
    sees = (y > -1) & (y < g.height) & (x > -1) & (x < g.width)  # false for NaN
    y = tl.where(sees, y, 0.0)
    x = tl.where(sees, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    y0 = top.to(tl.int32)
    x0 = left.to(tl.int32)
    has_top = sees & (y0 >= 0)
    has_bottom = sees & (y0 + 1 < g.height)
    has_left = x0 >= 0
    has_right = x0 + 1 < g.width
    if MASKED:
        modulation = tl.load(mask + plane * g.positions + position, is_row, 0.0).to(tl.float32)
    else:
        modulation = tl.full(row.shape, 1.0, tl.float32)
    pixel = (n * g.height + y0) * g.width + x0
    on_map = (has_top & has_left, has_top & has_right, has_bottom & has_left, has_bottom & has_right)
    return pixel, on_map, y - top, x - left, modulation


@triton.jit
def _corner_weights(on_map, fy, fx, modulation):
    top = (1 - fy) * modulation
    bottom = fy * modulation
    return (
        tl.where(on_map[0], top * (1 - fx), 0.0),
        tl.where(on_map[1], top * fx, 0.0),
        tl.where(on_map[2], bottom * (1 - fx), 0.0),
        tl.where(on_map[3], bottom * fx, 0.0),
    )


@triton.jit
def _pixels(input, pixel, on_map, channel, is_channel, g):
    """[rows, channels] of the map, float32, 0 off it."""
    at = input + pixel[:, None] * g.channels + channel[None, :]
    return tl.load(at, on_map[:, None] & is_channel[None, :], 0.0).to(tl.float32)


@triton.jit
def _columns(input, pixel, on_map, weight, channel, is_channel, g):
    """[rows, channels]: what the rows sample, modulated, in the type of the input."""
    value = weight[0][:, None] * _pixels(input, pixel, on_map[0], channel, is_channel, g)
    value += weight[1][:, None] * _pixels(input, pixel + 1, on_map[1], channel, is_channel, g)
    value += weight[2][:, None] * _pixels(input, pixel + g.width, on_map[2], channel, is_channel, g)
    value += weight[3][:, None] * _pixels(input, pixel + g.width + 1, on_map[3], channel, is_channel, g)
    return value.to(input.dtype.element_ty)


@triton.jit
def _line(row, g, WIDE: tl.constexpr):
    """Where a row of the output begins."""
    return row.to(tl.int64) * g.outputs if WIDE else row * g.outputs


@triton.jit
def forward_kernel(
    input,  # [N, H, W, C]
    offset,  # [N, D, K, 2, P]
    mask,  # [N, D, K, P] or, if it is not MASKED, anything
    weight,  # [O, K, C / G]
    bias,  # [O] or, if it is not BIASED, anything
    output,  # [rows, O]
    g,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs (tiles of rows and outputs, weight groups)."""
    blocks = tl.cdiv(g.group_out, OUTPUTS)  # programs side by side take the same samples
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    of_group = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    is_out = of_group < g.group_out
    group = tl.program_id(1)
    out = group * g.group_out + of_group
    filters = weight + out * (g.taps * g.group_in)
    sums = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for first in range(0, g.group_in, g.segment):
        start = group * g.group_in + first
        for tap in range(g.taps):
            pixel, on_map, fy, fx, modulation = _place(
                offset, mask, row, tap, start // g.offset_channels, g, MASKED, WIDE
            )
            corner_weights = _corner_weights(on_map, fy, fx, modulation)
            for block in range(0, g.segment, CHANNELS):
                channel = block + tl.arange(0, CHANNELS)
                is_channel = channel < g.segment
                columns = _columns(input, pixel, on_map, corner_weights, start + channel, is_channel, g)
                values = tl.load(
                    filters[None, :] + (tap * g.group_in + first + channel)[:, None],
                    is_channel[:, None] & is_out[None, :],
                    0.0,
                )
                sums = tl.dot(columns, values, sums, input_precision="tf32")
    if BIASED:
        sums += tl.load(bias + out, is_out, 0.0).to(tl.float32)[None, :]
    at = output + _line(row, g, WIDE)[:, None] + out[None, :]
    tl.store(at, sums.to(output.dtype.element_ty), (row < g.rows)[:, None] & is_out[None, :])


@triton.jit
def backward_kernel(
    grad,  # [rows, O]
    input,  # [N, H, W, C]
    offset,  # [N, D, K, 2, P]
    mask,  # [N, D, K, P] or, if it is not MASKED, anything
    weight,  # [O, K, C / G]
    grad_input,  # float32 zeros like input, for INPUT
    grad_offset,  # float32 like offset, for SAMPLES
    grad_mask,  # float32 like mask, for SAMPLES if it is MASKED
    g,
    MASKED: tl.constexpr,
    INPUT: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of input, offset and mask. Programs (taps and offset groups, tiles of rows)."""
    tap = tl.program_id(0) % g.taps
    group = tl.program_id(0) // g.taps
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < g.rows
    line = _line(row, g, WIDE)
    pixel, on_map, fy, fx, modulation = _place(offset, mask, row, tap, group, g, MASKED, WIDE)
    corner_weights = _corner_weights(on_map, fy, fx, modulation)
    dot0 = tl.full((ROWS,), 0.0, tl.float32)
    dot1 = tl.full((ROWS,), 0.0, tl.float32)
    dot2 = tl.full((ROWS,), 0.0, tl.float32)
    dot3 = tl.full((ROWS,), 0.0, tl.float32)
    for first in range(0, g.offset_channels, g.segment):
        start = group * g.offset_channels + first
        weight_group = start // g.group_in
        within = start - weight_group * g.group_in
        for block in range(0, g.segment, CHANNELS):
            channel = block + tl.arange(0, CHANNELS)
            is_channel = channel < g.segment
            sums = tl.full((ROWS, CHANNELS), 0.0, tl.float32)  # gradient of columns
            for first_out in range(0, g.group_out, OUTPUTS):
                of_group = first_out + tl.arange(0, OUTPUTS)
                is_out = of_group < g.group_out
                out = weight_group * g.group_out + of_group
                upper = tl.load(grad + line[:, None] + out[None, :], is_row[:, None] & is_out[None, :], 0.0)
                values = tl.load(
                    weight + ((out * g.taps + tap) * g.group_in + within)[:, None] + channel[None, :],
                    is_out[:, None] & is_channel[None, :],
                    0.0,
                )
                sums = tl.dot(upper, values, sums, input_precision="tf32")
            of_map = start + channel
            if SAMPLES:
                dot0 += tl.sum(sums * _pixels(input, pixel, on_map[0], of_map, is_channel, g), 1)
                dot1 += tl.sum(sums * _pixels(input, pixel + 1, on_map[1], of_map, is_channel, g), 1)
                dot2 += tl.sum(sums * _pixels(input, pixel + g.width, on_map[2], of_map, is_channel, g), 1)
                dot3 += tl.sum(sums * _pixels(input, pixel + g.width + 1, on_map[3], of_map, is_channel, g), 1)
            if INPUT:
                _scatter(grad_input, pixel, on_map[0], corner_weights[0], sums, of_map, is_channel, g)
                _scatter(grad_input, pixel + 1, on_map[1], corner_weights[1], sums, of_map, is_channel, g)
                _scatter(grad_input, pixel + g.width, on_map[2], corner_weights[2], sums, of_map, is_channel, g)
                _scatter(grad_input, pixel + g.width + 1, on_map[3], corner_weights[3], sums, of_map, is_channel, g)
    if SAMPLES:
        dot0 = tl.where(on_map[0], dot0, 0.0)  # also where the gradient is not finite
        dot1 = tl.where(on_map[1], dot1, 0.0)
        dot2 = tl.where(on_map[2], dot2, 0.0)
        dot3 = tl.where(on_map[3], dot3, 0.0)
        n = row // g.positions
        position = row - n * g.positions
        if WIDE:
            n = n.to(tl.int64)
        plane = (n * g.offset_groups + group) * g.taps + tap
        shift = grad_offset + plane * (2 * g.positions) + position
        tl.store(shift, modulation * ((1 - fx) * (dot2 - dot0) + fx * (dot3 - dot1)), is_row)
        tl.store(shift + g.positions, modulation * ((1 - fy) * (dot1 - dot0) + fy * (dot3 - dot2)), is_row)
        if MASKED:
            sampled = (1 - fy) * ((1 - fx) * dot0 + fx * dot1) + fy * ((1 - fx) * dot2 + fx * dot3)
            tl.store(grad_mask + plane * g.positions + position, sampled, is_row)


@triton.jit
def _scatter(grad_input, pixel, on_map, weight, sums, channel, is_channel, g):
    at = grad_input + pixel[:, None] * g.channels + channel[None, :]
    tl.atomic_add(at, weight[:, None] * sums, on_map[:, None] & is_channel[None, :], sem="relaxed")


@triton.jit
def filter_gradient_kernel(
    grad,  # [rows, O]
    input,  # [N, H, W, C]
    offset,  # [N, D, K, 2, P]
    mask,  # [N, D, K, P] or, if it is not MASKED, anything
    grad_weight,  # float32 zeros [O, K, C / G]
    g,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs (tiles of outputs, taps and channels; parts of the rows, which add up)."""
    out_blocks = tl.cdiv(g.group_out, OUTPUTS)
    blocks = tl.cdiv(g.segment, CHANNELS)
    index = tl.program_id(0)
    of_group = index % out_blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    is_out = of_group < g.group_out
    tap = index // out_blocks % g.taps
    index = index // out_blocks // g.taps
    start = index // blocks * g.segment
    weight_group = start // g.group_in
    out = weight_group * g.group_out + of_group
    channel = index % blocks * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < g.segment
    sums = tl.full((OUTPUTS, CHANNELS), 0.0, tl.float32)
    for first in range(tl.program_id(1) * ROWS, g.rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        pixel, on_map, fy, fx, modulation = _place(offset, mask, row, tap, start // g.offset_channels, g, MASKED, WIDE)
        corner_weights = _corner_weights(on_map, fy, fx, modulation)
        columns = _columns(input, pixel, on_map, corner_weights, start + channel, is_channel, g)
        upper = tl.load(
            grad + _line(row, g, WIDE)[None, :] + out[:, None], is_out[:, None] & (row < g.rows)[None, :], 0.0
        )
        sums = tl.dot(upper, columns, sums, input_precision="tf32")
    at = (out * g.taps + tap) * g.group_in + start - weight_group * g.group_in
    tl.atomic_add(
        grad_weight + at[:, None] + channel[None, :], sums, is_out[:, None] & is_channel[None, :], sem="relaxed"
    )


def tiles(g: Geometry, dtype: torch.dtype) -> tuple[Tile, Tile, Tile]:
    """Of the three kernels. Without spills on sm_80 and sm_90, by `benchmarks/fused_cost.py`; no GPU timed them."""

    def block(size, most):
        return max(16, min(most, triton.next_power_of_2(size)))

    if dtype.itemsize == 2:
        return (
            Tile(64, block(g.group_out, 256), block(g.segment, 32), 8, 3),
            Tile(64, block(g.group_out, 64), block(g.segment, 32), 8, 2),
            Tile(32, block(g.group_out, 128), block(g.segment, 64), 4, 3),
        )
    return (
        Tile(64, block(g.group_out, 128), block(g.segment, 32), 8, 2),
        Tile(64, block(g.group_out, 32), block(g.segment, 32), 8, 3),
        Tile(32, block(g.group_out, 128), block(g.segment, 32), 4, 3),
    )


class Call:
    """The tensors of a call as the kernels want them, and what of them is known to the compiler.

    Args:
        input, offset, mask, weight, stride, padding, dilation: As in `deform_conv2d`, checked.
        out_size: (outH, outW).
        tiles: Instead of those that fit the sizes.
        wide: Whether indices are of 64 bits; None: where a tensor needs it.
    """

    def __init__(self, input, offset, mask, weight, stride, padding, dilation, out_size, tiles=tiles, wide=None):
        batch, channels, height, width = input.shape
        outputs, group_in, *kernel = weight.shape
        taps = math.prod(kernel)
        offset_groups = offset.shape[1] // (2 * taps)
        offset_channels = channels // offset_groups
        positions = math.prod(out_size)
        self.geometry = Geometry(
            channels, outputs, group_in, outputs // (channels // group_in), offset_groups, offset_channels,
            math.gcd(group_in, offset_channels), height, width, out_size[1], positions, batch * positions, taps,
            kernel[1], *stride, *padding, *dilation,
        )  # fmt: skip
        self.input = input.permute(0, 2, 3, 1).contiguous()
        self.offset = offset.contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.weight = weight.permute(0, 2, 3, 1).contiguous()
        self.out_shape = batch, *out_size, outputs
        self.tiles = tiles(self.geometry, input.dtype)
        largest = max(input.numel(), offset.numel(), math.prod(self.out_shape))
        self.wide = largest >= 2**31 if wide is None else wide

    def _run(self, kernel, grid, tile, *tensors, **constants):
        # A tensor stands in for one that there is not: it is not read.
        tensors = (self.input if tensor is None else tensor for tensor in tensors)
        kernel[grid](
            *tensors, self.geometry, **constants, MASKED=self.mask is not None, WIDE=self.wide, ROWS=tile.rows,
            OUTPUTS=tile.outputs, CHANNELS=tile.channels, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def forward(self, bias):
        """`[N, outH, outW, O]`."""
        g, tile = self.geometry, self.tiles[0]
        output = self.input.new_empty(self.out_shape)
        grid = triton.cdiv(g.rows, tile.rows) * triton.cdiv(g.group_out, tile.outputs), g.outputs // g.group_out
        self._run(
            forward_kernel, grid, tile, self.input, self.offset, self.mask, self.weight, bias, output,
            BIASED=bias is not None,
        )  # fmt: skip
        return output

    def backward(self, grad, wanted):
        """Gradients of input, `[N, H, W, C]`, offset, mask, weight, `[O, kH, kW, C / G]`, and bias, float32.

        Args:
            grad: `[N, outH, outW, O]`, contiguous.
            wanted: For each of the five whether it is wanted. The others are None; all of them if there are no rows.
        """
        g = self.geometry
        to_input, to_samples, to_filter = wanted[0], wanted[1] or wanted[2], wanted[3]
        grad_input = torch.zeros_like(self.input, dtype=torch.float32) if to_input else None
        grad_offset = torch.empty_like(self.offset, dtype=torch.float32) if to_samples else None
        grad_mask = torch.empty_like(self.mask, dtype=torch.float32) if to_samples and self.mask is not None else None
        grad_weight = torch.zeros_like(self.weight, dtype=torch.float32) if to_filter else None
        if to_input or to_samples:
            tile = self.tiles[1]
            self._run(
                backward_kernel, (g.taps * g.offset_groups, triton.cdiv(g.rows, tile.rows)), tile, grad, self.input,
                self.offset, self.mask, self.weight, grad_input, grad_offset, grad_mask,
                INPUT=to_input, SAMPLES=to_samples,
            )  # fmt: skip
        if to_filter:
            tile = self.tiles[2]
            programs = (
                triton.cdiv(g.group_out, tile.outputs) * g.taps * g.channels // g.segment
                * triton.cdiv(g.segment, tile.channels)
            )  # fmt: skip
            # Enough for a large GPU, each with a few tiles of rows at least.
            parts = min(triton.cdiv(512, programs), triton.cdiv(g.rows, 4 * tile.rows))
            self._run(
                filter_gradient_kernel, (programs, parts), tile, grad, self.input, self.offset, self.mask, grad_weight
            )
        grad_bias = grad.sum((0, 1, 2), dtype=torch.float32) if wanted[4] else None
        return grad_input, grad_offset, grad_mask if wanted[2] else None, grad_weight, grad_bias
