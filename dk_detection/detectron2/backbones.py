"""Backbones that Detectron2 does not have."""

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.nn.weight_init import c2_msra_fill
from omegaconf import OmegaConf
from torch.nn.functional import relu

from dk_detection.backbones import AlignedInceptionResNet, MobileNetV2, ResNetDW


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
        c2_msra_fill(self.reduce)

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


class _Features:
    """Gives a network of `dk_detection.backbones` Detectron2's face. The bases are this, the network, and Backbone.

    Its maps are called res2 (stride 4) to res5 (stride 32), its parameters as torchvision's.
    """

    def __init__(self, **options) -> None:
        super().__init__(
            **{
                name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
                for name, value in options.items()
            }
        )

    def forward(self, x):
        """From images [N, 3, H, W] to {name: feature map}."""
        return dict(zip(self.output_shape(), self.forward_features(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map."""
        return {
            f"res{index + 2}": ShapeSpec(channels=channels, stride=stride)
            for index, channels, stride in zip(self.out_indices, self.out_channels, self.out_strides, strict=True)
        }


class DkResNetDW(_Features, ResNetDW, Backbone):
    """`dk_detection.backbones.ResNetDW`."""


class DkAlignedInceptionResNet(_Features, AlignedInceptionResNet, Backbone):
    """`dk_detection.backbones.AlignedInceptionResNet`; res5 has stride 16 with `dilated_c5`."""


class DkMobileNetV2(_Features, MobileNetV2, Backbone):
    """`dk_detection.backbones.MobileNetV2`. torchvision's checkpoint fits."""


_NETWORKS = {
    "resnet50-dw": DkResNetDW,
    "mobilenet-v2": DkMobileNetV2,
    "aligned-inception-resnet": DkAlignedInceptionResNet,
}


@BACKBONE_REGISTRY.register()
def build_dk_fpn_backbone(cfg, input_shape):
    """The backbone that MODEL.DK.BACKBONE names, and FPN."""
    settings = cfg.MODEL.DK
    if settings.BACKBONE not in _NETWORKS:
        raise ValueError(f"MODEL.DK.BACKBONE must be one of {', '.join(_NETWORKS)}, got {settings.BACKBONE!r}")
    bottom_up = _NETWORKS[settings.BACKBONE](
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT - 1,
        norm_eval=settings.NORM_EVAL,
    )
    return FPN(
        bottom_up,
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
