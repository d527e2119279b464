"""ResNet-50-DW, the ResNet of Deformable Kernels."""

from collections.abc import Sequence

from torchvision.models.resnet import Bottleneck

from dk_detection.backbones._stages import StagedResNet


class DepthwiseBottleneck(Bottleneck):
    """torchvision's block, its 3x3 convolution depthwise and its inner width doubled."""

    def __init__(
        self, inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1, norm_layer=None
    ) -> None:
        # torchvision's inner width is planes * base_width / 64 * groups.
        super().__init__(inplanes, planes, stride, downsample, 2 * planes, 64 / planes, dilation, norm_layer)


class ResNetDW(StagedResNet):
    """ResNet-50-DW: every 3x3 convolution depthwise, inner widths 128, 256, 512, 1024 (Deformable Kernels, Table 5).

    Its stride sits, as torchvision's, in the 3x3 convolutions. No weights trained on ImageNet are published.

    Args:
        num_classes: Of the classifier. None: there is none, and the network returns its features.
        blocks: How many there are in each stage: (3, 4, 6, 3) is ResNet-50.
        out_indices: Which maps are the features, 0 (stride 4) to 3 (stride 32), in ascending order. Without a
            classifier the stages behind the last of them are not built.
        frozen_stages: How many stages do not learn, not even the statistics of their normalisations. 0: the stem alone;
            -1: all of the network learns.
        norm_eval: Whether the statistics of all normalisations stay as they are in training.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__(DepthwiseBottleneck, blocks, num_classes)
        self._set_up(
            num_classes=num_classes,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
        )
