"""Deformable RoI pooling (DCNv1) and modulated deformable RoI pooling (DCNv2) with their offset branches."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from dk_detection.layers._base import ZeroLinear
from dk_detection.ops import deform_roi_pool
from dk_detection.ops._common import overridable, pair


def _branch(*features: int, **factory) -> list[nn.Module]:
    """Fully connected layers with ReLU between them, the last one zero."""
    *hidden, last = pairwise(features)
    layers = [layer for sizes in hidden for layer in (nn.Linear(*sizes, **factory), nn.ReLU(inplace=True))]
    return [*layers, ZeroLinear(*last, **factory)]


@overridable
def _channels_last(input: Tensor, channels: int, layer: str) -> Tensor:
    """Maps on which both poolings work: reordered once, it need not be done in each of them."""
    if input.dim() == 4 and input.shape[1] != channels:
        raise ValueError(f"{layer}: input has {input.shape[1]} channels, expected output_channels={channels}")
    return input.contiguous(memory_format=torch.channels_last)


@overridable
def _in_the_format_of(output: Tensor, input: Tensor) -> Tensor:
    return output.contiguous() if input.is_contiguous() else output


class _RoIPool(nn.Module):
    """A first, rigid pooling of each RoI, from which a branch computes how to pool it a second time."""

    def __init__(
        self,
        output_size,
        output_channels,
        deform_fc_channels=1024,
        spatial_scale=1.0,
        sampling_ratio=0,
        gamma=0.1,
        *,
        branch="paper",
        branch_size=None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.output_size = pair(name, "output_size", output_size, 1)
        self.branch_size = self.output_size if branch_size is None else pair(name, "branch_size", branch_size, 1)
        for argument, value in (("output_channels", output_channels), ("deform_fc_channels", deform_fc_channels)):
            if value < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
        if branch not in ("paper", "mmcv"):
            raise ValueError(f"{name}: branch must be 'paper' or 'mmcv', got {branch!r}")
        self.output_channels = output_channels
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = sampling_ratio
        self.gamma = float(gamma)
        self.branch = branch
        inputs = output_channels * self.branch_size[0] * self.branch_size[1]
        bins = self.output_size[0] * self.output_size[1]
        self._make_branch(inputs, deform_fc_channels, bins, {"device": device, "dtype": dtype})

    def _make_branch(self, inputs, hidden, bins, factory) -> None:
        raise NotImplementedError

    def _offset_and_mask(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """From pooled features [n, C * branchH * branchW] to offsets [n, 2 * K] and modulation [n, K]."""
        raise NotImplementedError

    def forward(self, input: Tensor, rois: Tensor, spatial_scale: float | None = None) -> Tensor:
        """Pools `rois` [n, 5] = (batch index, x1, y1, x2, y2) from `input` [N, C, H, W] to [n, C, outH, outW].

        `spatial_scale` takes the place of the layer's own, for a layer that pools from several levels of a pyramid.
        """
        maps = _channels_last(input, self.output_channels, type(self).__name__)
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        output = self._pool(maps, rois, self.output_size, scale, **self.sampling(maps, rois, scale))
        return _in_the_format_of(output, input)

    def sampling(self, input: Tensor, rois: Tensor, spatial_scale: float | None = None) -> dict[str, Tensor]:
        """What the branch makes of a rigid pooling of the RoIs: the arguments of the operator that say where it looks.

        Args:
            input, rois, spatial_scale: As `forward`'s.

        Returns:
            {"offset": [n, 2, outH, outW]}, x, then y, in units of `gamma` * RoI size; and, where the layer modulates,
            {"mask": [n, 1, outH, outW]}.
        """
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        pooled = self._pool(input, rois, self.branch_size, scale)
        offset, mask = self._offset_and_mask(pooled.flatten(1))
        values = {"offset": offset.view(-1, 2, *self.output_size)}
        return values if mask is None else {**values, "mask": mask.view(-1, 1, *self.output_size)}

    def _pool(self, maps, rois, output_size, spatial_scale, offset=None, mask=None):
        return deform_roi_pool(
            maps,
            rois,
            output_size,
            offset=offset,
            mask=mask,
            spatial_scale=spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
        )

    def extra_repr(self) -> str:
        names = ("output_size", "output_channels", "spatial_scale", "sampling_ratio", "gamma", "branch", "branch_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class DeformRoIPool(_RoIPool):
    """RoI pooling that learns where its bins lie: DCNv1, Section 2.2 of Deformable Convolutional Networks (2017).

    Shapes:
        input: [N, output_channels, H, W].
        rois: [n, 5] = (batch index, x1, y1, x2, y2) in pixels of the image; n may be 0.
        output: [n, output_channels, outH, outW].
        offset_fc: fully connected, from the pooled features of the RoI to [n, 2 * outH * outW]: x of all bins, then y
            of all bins, in units of `gamma` * RoI size.

    The last layer of `offset_fc` starts at zero, and then the layer is aligned RoI pooling.

    Args:
        output_size: Bins of a RoI, an int or (vertical, horizontal).
        output_channels: Channels of the input and of the output.
        deform_fc_channels: Features between the fully connected layers; the paper's branch has only one layer.
        spatial_scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples along each axis of a bin; 0: as many as the bin has pixels.
        gamma: Factor on the offsets.
        branch: 'paper', one fully connected layer, or 'mmcv', three: then checkpoints of MMCV's `DeformRoIPoolPack`
            load key for key.
        branch_size: Bins of the rigid pooling that the branch reads, an int or (vertical, horizontal); None: those of
            the output. The branch grows with it: at 14 x 14 it has four times the weights of 7 x 7.
        device, dtype: Of the parameters.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def _make_branch(self, inputs, hidden, bins, factory) -> None:
        between = (hidden, hidden) if self.branch == "mmcv" else ()
        self.offset_fc = nn.Sequential(*_branch(inputs, *between, 2 * bins, **factory))

    def _offset_and_mask(self, features):
        return self.offset_fc(features), None


class ModulatedDeformRoIPool(_RoIPool):
    """RoI pooling that learns where its bins lie and what each counts: DCNv2, Eq. 2 of Deformable ConvNets v2 (2018).

    Shapes:
        input: [N, output_channels, H, W].
        rois: [n, 5] = (batch index, x1, y1, x2, y2) in pixels of the image; n may be 0.
        output: [n, output_channels, outH, outW].
        offset_fc: fully connected, from the pooled features of the RoI to [n, 3 * outH * outW]: x of all bins, y of all
            bins, in units of `gamma` * RoI size, and one value a bin that goes through a sigmoid and is its modulation.

    The last layer of the branch starts at zero: offsets are 0, the modulation is 0.5, and the layer gives half of what
    aligned RoI pooling does. Its other layers are not zero, although the paper says so of all: their weights would
    never get a gradient.

    Args:
        output_size: Bins of a RoI, an int or (vertical, horizontal).
        output_channels: Channels of the input and of the output.
        deform_fc_channels: Features between the fully connected layers.
        spatial_scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples along each axis of a bin; 0: as many as the bin has pixels.
        gamma: Factor on the offsets.
        branch: 'paper', two fully connected layers, or 'mmcv', three for the offsets and, called `mask_fc`, two for the
            modulation: then checkpoints of MMCV's `ModulatedDeformRoIPoolPack` load key for key.
        branch_size: Bins of the rigid pooling that the branch reads, an int or (vertical, horizontal); None: those of
            the output. The branch grows with it: at 14 x 14 it has four times the weights of 7 x 7.
        device, dtype: Of the parameters.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def _make_branch(self, inputs, hidden, bins, factory) -> None:
        if self.branch == "paper":
            self.offset_fc = nn.Sequential(*_branch(inputs, hidden, 3 * bins, **factory))
        else:
            self.offset_fc = nn.Sequential(*_branch(inputs, hidden, hidden, 2 * bins, **factory))
            self.mask_fc = nn.Sequential(*_branch(inputs, hidden, bins, **factory), nn.Sigmoid())

    def _offset_and_mask(self, features):
        if self.branch == "mmcv":
            return self.offset_fc(features), self.mask_fc(features)
        values = self.offset_fc(features)  # [n, 3K]
        bins = values.shape[1] // 3
        offset, mask = values.split([2 * bins, bins], dim=1)
        return offset, mask.sigmoid()
