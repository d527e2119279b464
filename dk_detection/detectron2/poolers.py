"""Deformable RoI pooling in Detectron2's RoI heads."""

import inspect
from functools import partial

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from dk_detection.detectron2.config import arguments
from dk_detection.layers.table import ROI_LAYERS


class DkROIPooler(ROIPooler):
    """`ROIPooler` whose pooling is a layer of `dk_detection.layers.table`.

    A LazyConfig changes a pooler into this one by::

        model.roi_heads.box_pooler.update(
            _target_=DkROIPooler, pooler_type="DkModulatedDeformRoIPool", channels=256)

    Args:
        output_size, scales, sampling_ratio, canonical_box_size, canonical_level: As `ROIPooler`'s.
        pooler_type: Name of the layer in the table, such as "DkDeformRoIPool".
        channels: Of the feature maps and of what is pooled.
        share_levels: Whether one layer serves all levels, or each has its own. One is what the parameters in Table 1 of
            Deformable ConvNets v2 say.
        layer_options: Further arguments of the layer, such as `branch_size=7`.

    Raises:
        ValueError: No RoI layer of the table has this name.
    """

    def __init__(
        self,
        output_size,
        scales,
        sampling_ratio,
        pooler_type,
        canonical_box_size=224,
        canonical_level=4,
        *,
        channels,
        share_levels=True,
        **layer_options,
    ) -> None:
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2", canonical_box_size, canonical_level)
        if pooler_type not in ROI_LAYERS:
            raise ValueError(f"DkROIPooler: pooler_type must be one of {', '.join(ROI_LAYERS)}, got {pooler_type!r}")
        layer = ROI_LAYERS[pooler_type]
        options = dict.fromkeys(("in_channels", "output_channels"), channels) | {"sampling_ratio": sampling_ratio}
        takes = inspect.signature(layer).parameters
        options = {name: value for name, value in options.items() if name in takes} | layer_options
        self.roi_layers = nn.ModuleList(
            layer(self.output_size, **options) for _ in range(1 if share_levels else len(scales))
        )
        # What ROIPooler calls for each level. A list of modules would name a shared layer's parameters once a level.
        del self.level_poolers
        self.level_poolers = [
            partial(_pool, layer=self.roi_layers[0 if share_levels else level], spatial_scale=scale)
            for level, scale in enumerate(scales)
        ]


def _pool(feature: Tensor, rois: Tensor, *, layer: nn.Module, spatial_scale: float) -> Tensor:
    """What a layer pools, in the type of the map under autocast too: ROIPooler puts it into a tensor of that type."""
    return layer(feature, rois, spatial_scale=spatial_scale).to(feature.dtype)


@ROI_HEADS_REGISTRY.register()
class DkROIHeads(StandardROIHeads):
    """`StandardROIHeads` in whose YAML POOLER_TYPE may be the name of a RoI layer of `dk_detection.layers.table`.

    MODEL.DK.BOX_POOLER and MODEL.DK.MASK_POOLER hold further arguments of `DkROIPooler`. A LazyConfig needs no RoI
    heads of ours: it takes `DkROIPooler` as `box_pooler` and `mask_pooler`.
    """

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        rigid, pooler = _split(cfg, "BOX", input_shape)
        head = super()._init_box_head(rigid, input_shape)
        return head | ({"box_pooler": pooler} if pooler else {})

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        rigid, pooler = _split(cfg, "MASK", input_shape)
        head = super()._init_mask_head(rigid, input_shape)
        return head | ({"mask_pooler": pooler} if pooler and head else {})


def _split(cfg: CfgNode, head: str, input_shape) -> tuple[CfgNode, DkROIPooler | None]:
    """The config with a stock pooler where it has one of ours, and ours."""
    settings = cfg.MODEL[f"ROI_{head}_HEAD"]
    if settings.POOLER_TYPE not in ROI_LAYERS:
        return cfg, None
    levels = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    pooler = DkROIPooler(
        output_size=settings.POOLER_RESOLUTION,
        scales=tuple(1.0 / level.stride for level in levels),
        sampling_ratio=settings.POOLER_SAMPLING_RATIO,
        pooler_type=settings.POOLER_TYPE,
        channels=levels[0].channels,
        **arguments(cfg.MODEL.DK[f"{head}_POOLER"]),
    )
    rigid = cfg.clone()
    rigid.defrost()
    rigid.MODEL[f"ROI_{head}_HEAD"].POOLER_TYPE = "ROIAlignV2"
    return rigid, pooler
