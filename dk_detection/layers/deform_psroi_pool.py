"""Deformable position-sensitive RoI pooling with its score and offset branches."""

from torch import Tensor, nn

from dk_detection.layers._base import ZeroConv2d
from dk_detection.ops import deform_psroi_pool
from dk_detection.ops._common import pair


class DeformPSRoIPool(nn.Module):
    """Deformable position-sensitive RoI pooling: Figure 4 of Deformable Convolutional Networks (2017).

    Shapes:
        input: [N, in_channels, H, W].
        rois: [n, 5] = (batch index, x1, y1, x2, y2) in pixels of the image; n may be 0.
        output: [n, output_channels, outH, outW].
        conv_score: a 1x1 convolution of the input to the score maps, [N, output_channels * group_size ** 2, H, W].
        conv_offset: a 1x1 convolution of the input to the offset fields, [N, 2 * num_classes * group_size ** 2, H, W].
            Pooled position-sensitively they are the offsets of a RoI, [n, 2 * num_classes, partH, partW]: of each class
            x, then y, in units of `gamma` * RoI size.

    `conv_offset` starts at zero, and then the layer is position-sensitive RoI pooling of the score maps.

    Args:
        output_size: Bins of a RoI, an int or (vertical, horizontal).
        in_channels: Channels of the input.
        output_channels: Channels of the output.
        spatial_scale: Pixels of the map per pixel of the image.
        group_size: Cells along each axis of a RoI that have score maps and offset fields of their own; None: one for
            each bin of a square `output_size`.
        part_size: Parts of a RoI that move on their own, an int or (vertical, horizontal); None: its bins.
        samples_per_part: Samples along each axis of a bin.
        gamma: Factor on the offsets.
        num_classes: Number of runs of consecutive output channels that have offsets of their own; divides
            `output_channels`.
        deform: Whether there is a `conv_offset`. Without it this is position-sensitive RoI pooling with its score
            branch, that of R-FCN (2016).
        device, dtype: Of the parameters.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        output_size,
        in_channels,
        output_channels,
        spatial_scale=1.0,
        group_size=None,
        part_size=None,
        samples_per_part=4,
        gamma=0.1,
        *,
        num_classes=1,
        deform=True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.output_size = pair(name, "output_size", output_size, 1)
        if group_size is None:
            if self.output_size[0] != self.output_size[1]:
                raise ValueError(f"{name}: group_size must be given if output_size is not square, got {output_size!r}")
            group_size = self.output_size[0]
        if group_size < 1:
            raise ValueError(f"{name}: group_size must be at least 1, got {group_size}")
        if num_classes < 1 or output_channels % num_classes:
            raise ValueError(
                f"{name}: num_classes must be positive and divide output_channels, got num_classes={num_classes}, "
                f"output_channels={output_channels}"
            )
        self.part_size = self.output_size if part_size is None else pair(name, "part_size", part_size, 1)
        self.output_channels = output_channels
        self.spatial_scale = float(spatial_scale)
        self.group_size = group_size
        self.samples_per_part = samples_per_part
        self.gamma = float(gamma)
        self.num_classes = num_classes
        factory = {"device": device, "dtype": dtype}
        self.conv_score = nn.Conv2d(in_channels, output_channels * group_size**2, 1, **factory)
        self.conv_offset = ZeroConv2d(in_channels, 2 * num_classes * group_size**2, 1, **factory) if deform else None

    def forward(self, input: Tensor, rois: Tensor, spatial_scale: float | None = None) -> Tensor:
        """Pools `rois` [n, 5] = (batch index, x1, y1, x2, y2) from `input` [N, C, H, W] to [n, C, outH, outW].

        `spatial_scale` takes the place of the layer's own, for a layer that pools from several levels of a pyramid.
        """
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        scores = self.conv_score(input)
        values = self.sampling(input, rois, scale)
        return self._pool(scores, rois, scale, self.output_size, self.output_channels, **values)

    def sampling(self, input: Tensor, rois: Tensor, spatial_scale: float | None = None) -> dict[str, Tensor]:
        """What the layer's branch makes of `input`: the argument of its operator that says where it looks.

        Args:
            input, rois, spatial_scale: As `forward`'s.

        Returns:
            {"offset": [n, 2 * num_classes, partH, partW]}, of each class x, then y, in units of `gamma` * RoI size; {}
            without `deform`.
        """
        if self.conv_offset is None:
            return {}
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        fields = self.conv_offset(input)  # [N, 2 * num_classes * group_size ** 2, H, W]
        return {"offset": self._pool(fields, rois, scale, self.part_size, 2 * self.num_classes)}

    def _pool(self, maps, rois, spatial_scale, output_size, output_channels, offset=None):
        return deform_psroi_pool(
            maps,
            rois,
            output_size,
            offset=offset,
            spatial_scale=spatial_scale,
            output_channels=output_channels,
            group_size=self.group_size,
            part_size=self.part_size,
            samples_per_part=self.samples_per_part,
            gamma=self.gamma,
        )

    def extra_repr(self) -> str:
        names = (
            *("output_size", "output_channels", "spatial_scale", "group_size"),
            *("part_size", "samples_per_part", "gamma", "num_classes"),
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
