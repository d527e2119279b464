"""What R-FCN pools: class scores and box deltas of RoIs, bin by bin."""

import torch
from torch import Tensor, nn

from dk_detection.layers.deform_psroi_pool import DeformPSRoIPool

BOX = 4  # class-agnostic deltas of a box


class RFCNPool(nn.Module):
    """Position-sensitive score and box maps, both pooled by RoI: the head of R-FCN before its bins vote.

    Dai et al., R-FCN (2016); with (deformable) position-sensitive RoI pooling, Figure 4 of Deformable Convolutional
    Networks (2017). The mean over the bins is the prediction (`vote`).

    Shapes:
        input: [N, in_channels, H, W].
        rois: [n, 5] = (batch index, x1, y1, x2, y2) in pixels of the image; n may be 0.
        output: [n, output_channels, outH, outW]: scores of the classes, the background among them, and 4 box deltas.
        score: a `DeformPSRoIPool`; each class has offset fields of its own.
        box: a `DeformPSRoIPool` with offset fields of its own.

    Args:
        output_size: Bins along each axis of a RoI, which have maps of their own.
        in_channels: Channels of the input.
        output_channels: Classes with the background, and 4.
        spatial_scale: Pixels of the map per pixel of the image.
        samples_per_part: Samples along each axis of a bin.
        gamma: Factor on the offsets.
        deform: Whether bins move. Without it the pooling is rigid.
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
        samples_per_part=4,
        gamma=0.1,
        *,
        deform=True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if output_channels <= BOX:
            raise ValueError(
                f"{type(self).__name__}: output_channels must be the number of classes and {BOX}, got {output_channels}"
            )
        classes = output_channels - BOX
        self.output_channels, self.spatial_scale = output_channels, float(spatial_scale)
        options = dict(
            spatial_scale=spatial_scale,
            samples_per_part=samples_per_part,
            gamma=gamma,
            deform=deform,
            device=device,
            dtype=dtype,
        )
        self.score = DeformPSRoIPool(output_size, in_channels, classes, num_classes=classes, **options)
        self.box = DeformPSRoIPool(output_size, in_channels, BOX, **options)
        self.output_size = self.score.output_size
        for pool in (self.score, self.box):  # as R-FCN's code
            nn.init.normal_(pool.conv_score.weight, std=0.01)
            nn.init.zeros_(pool.conv_score.bias)

    def forward(self, input: Tensor, rois: Tensor, spatial_scale: float | None = None) -> Tensor:
        """Pools `rois` [n, 5] = (batch index, x1, y1, x2, y2) from `input` [N, C, H, W].

        `spatial_scale` takes the place of the layer's own, for a layer that pools from several levels of a pyramid.
        """
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        return torch.cat([self.score(input, rois, scale), self.box(input, rois, scale)], 1)


def vote(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Average voting: what all bins of a RoI say together.

    Args:
        pooled: [n, classes + 4, outH, outW] of `RFCNPool`.

    Returns:
        Scores [n, classes] and box deltas [n, 4].
    """
    votes = pooled.mean((2, 3))
    return votes[:, :-BOX], votes[:, -BOX:]
