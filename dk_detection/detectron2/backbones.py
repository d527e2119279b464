"""Backbones that Detectron2 does not have."""

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch.nn.functional import relu


class DkReduceLast(Backbone):
    """A backbone whose last feature map is reduced by a 1x1 convolution and a ReLU; the others are as they were.

    With conv5 at stride 16 this is the backbone of the Faster R-CNN in Deformable ConvNets v2 (2018), Section 3.3: the
    RPN sees conv4, the RoI heads the reduced conv5.

    Args:
        bottom_up: The backbone.
        out_channels: Channels of the reduced map.
    """

    def __init__(self, bottom_up: Backbone, out_channels: int = 256) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self._shapes = dict(bottom_up.output_shape())
        self._last, shape = list(self._shapes.items())[-1]
        self._shapes[self._last] = ShapeSpec(channels=out_channels, stride=shape.stride)
        self.reduce = Conv2d(shape.channels, out_channels, 1, activation=relu)
        c2_xavier_fill(self.reduce)

    def forward(self, x):
        """From images [N, 3, H, W] to {name: feature map}."""
        features = self.bottom_up(x)
        return features | {self._last: self.reduce(features[self._last])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """What the sides of a padded image are multiples of."""
        return self.bottom_up.size_divisibility


@BACKBONE_REGISTRY.register()
def build_dk_reduced_resnet_backbone(cfg, input_shape):
    """`build_resnet_backbone` with the last map reduced to MODEL.DK.REDUCED_CHANNELS."""
    return DkReduceLast(build_resnet_backbone(cfg, input_shape), cfg.MODEL.DK.REDUCED_CHANNELS)
