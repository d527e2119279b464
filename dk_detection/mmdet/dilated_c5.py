"""What a detector needs whose proposals come from conv4 and whose regions are pooled from a dilated conv5.

That is the Faster R-CNN of Deformable ConvNets v2 (2018), Section 3.3; the third part is `first_level=1` of
`DkRoIExtractor`.
"""

from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RPNHead
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor


@MODELS.register_module(force=True)
class DkReduceLast(BaseModule):
    """A neck that passes the backbone's feature maps on, the last one through a 1x1 convolution and a ReLU.

    Args:
        in_channels: Channels of the last map.
        out_channels: Channels it is reduced to.
        init_cfg: Initialisation of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        init_cfg: dict | None = dict(type="Xavier", layer="Conv2d", distribution="uniform"),  # noqa: B006 (read only)
    ) -> None:
        super().__init__(init_cfg)
        self.reduce = ConvModule(in_channels, out_channels, 1)

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From [N, C, H, W] of each level to the same, with `out_channels` in the last."""
        return (*feats[:-1], self.reduce(feats[-1]))


@MODELS.register_module(force=True)
class DkSingleLevelRPNHead(RPNHead):
    """`RPNHead` on one of the neck's feature maps.

    Args:
        in_channels: Channels of the map.
        in_level: Index of the map.
        options: Arguments of `RPNHead`; its anchor generator has one stride.
    """

    def __init__(self, in_channels: int, *, in_level: int = 0, **options) -> None:
        super().__init__(in_channels, **options)
        self.in_level = in_level

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and box offsets of the anchors on one map, each in a list of one."""
        return super().forward((feats[self.in_level],))
