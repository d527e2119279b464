"""RoI extractors whose pooling is a layer of ours."""

import inspect

import torch
from mmcv import ops
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from torch import Tensor, nn

from dk_detection.layers.table import ROI_LAYERS


@MODELS.register_module(force=True)
class DkRoIExtractor(SingleRoIExtractor):
    """`SingleRoIExtractor` that also takes RoI layers of `dk_detection.layers.table` and of the registry.

    A config that inherits a rigid model adds, for the box head and for the mask head::

        bbox_roi_extractor=dict(type='DkRoIExtractor', roi_layer=dict(type='DkModulatedDeformRoIPool'))

    Layers of the table pool in the coordinates that the RoIs come in, also under mixed precision, and each of their
    parameters gets a gradient from every batch, whether it has RoIs or not.

    Args:
        roi_layer: `type` and arguments of the layer. `type` is a name of the layer table, such as "DkDeformRoIPool", a
            name in `mmcv.ops`, such as "RoIAlign", one in MMDetection's registry, or a class. `output_channels`, and
            `in_channels` where the layer has it, need not be said: they are `out_channels`.
        out_channels: Channels of the feature maps and of what is pooled.
        featmap_strides: Strides of the feature maps that are pooled from.
        share_levels: Whether a layer of the table is one for all levels, or each level has its own. One is what the
            parameters in Table 1 of Deformable ConvNets v2 say (+1.2M with four levels); checkpoints of MMCV's layers
            have one a level.
        first_level: Index of the first of these maps among those that the neck gives; the ones before are not pooled
            from.
        options: Further arguments of `SingleRoIExtractor`.

    Raises:
        TypeError: `roi_layer` has no `type`, or one that is no layer.
        ValueError: The layer's `output_channels` differ from `out_channels`; or, in the forward pass, the number of
            feature maps differs from that of strides.
    """

    def __init__(
        self,
        roi_layer: dict,
        out_channels: int,
        featmap_strides: list[int],
        *,
        share_levels: bool = True,
        first_level: int = 0,
        **options,
    ) -> None:
        roi_layer = dict(roi_layer, type=_find(roi_layer.get("type")))
        self._is_ours = roi_layer["type"] in ROI_LAYERS.values()
        self._share_levels = share_levels and self._is_ours
        if self._is_ours:
            for name in inspect.signature(roi_layer["type"]).parameters.keys() & {"in_channels", "output_channels"}:
                roi_layer.setdefault(name, out_channels)
            if roi_layer["output_channels"] != out_channels:
                raise ValueError(
                    f"DkRoIExtractor: output_channels of roi_layer must be out_channels={out_channels}, got "
                    f"{roi_layer['output_channels']}"
                )
        super().__init__(roi_layer, out_channels, featmap_strides, **options)
        self.first_level = first_level

    def build_roi_layers(self, layer_cfg: dict, featmap_strides: list[int]) -> nn.ModuleList:
        """One layer for each stride, or one for all that is told the scale when it is called."""
        return super().build_roi_layers(layer_cfg, featmap_strides[:1] if self._share_levels else featmap_strides)

    @property
    def num_inputs(self) -> int:
        """How many of the neck's feature maps are needed, counted from the first."""
        return self.first_level + super().num_inputs

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools each RoI from the level that its size belongs to.

        Args:
            feats: [N, out_channels, H, W] of each level, from level 0 of the neck on.
            rois: [n, 5] = (batch index, x1, y1, x2, y2) in pixels of the image; n may be 0.
            roi_scale_factor: Factor on width and height of the RoIs.

        Returns:
            [n, out_channels, outH, outW].
        """
        feats = feats[self.first_level :]
        if len(feats) != len(self.featmap_strides):
            raise ValueError(
                f"DkRoIExtractor: feats must have first_level + {len(self.featmap_strides)} maps, one for each of "
                f"featmap_strides={self.featmap_strides}, got {self.first_level} + {len(feats)}"
            )
        if not self._is_ours:
            return super().forward(feats, rois, roi_scale_factor)

        # The level of a RoI with a negative side is undefined up to here.
        levels = self.map_roi_levels(rois, len(feats)).clamp(0, len(feats) - 1)
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        # A level without RoIs is pooled as well: the result is empty, but it has gradients, and DistributedDataParallel
        # waits for that of every parameter.
        indices = [levels.eq(level).nonzero().squeeze(1) for level in range(len(feats))]
        pooled = []
        for level, (feat, stride) in enumerate(zip(feats, self.featmap_strides, strict=True)):
            layer = self.roi_layers[0 if self._share_levels else level]
            pooled.append(layer(feat, rois[indices[level]], spatial_scale=1 / stride))
        return torch.cat(pooled)[torch.cat(indices).argsort()]


def _find(kind) -> type[nn.Module]:
    """The class, or another constructor, that `type` of a RoI layer stands for."""
    found = kind
    if isinstance(kind, str):
        found = ROI_LAYERS.get(kind) or getattr(ops, kind, None) or MODELS.get(kind)
    if not callable(found):
        raise TypeError(
            "DkRoIExtractor: type of roi_layer must be a RoI layer's class or its name in dk_detection.layers.table, "
            f"mmcv.ops or MMDetection's registry, got {kind!r}"
        )
    return getattr(found, "__wrapped__", found)  # the registry has our layers' builders, which take options of mmcv's
