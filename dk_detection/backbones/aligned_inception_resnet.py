"""Aligned-Inception-ResNet, the second network of Deformable ConvNets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import conv1x1, conv3x3

from dk_detection.backbones._stages import StagedResNet


class InceptionResidualBlock(nn.Module):
    """Two branches of convolutions, concatenated and expanded, beside a shortcut (Deformable ConvNets, Fig. 8).

    With `planes` p the one branch is 1x1 and 3x3 of p channels, the other 1x1, 3x3 and 3x3 of p/2; a 1x1 convolution
    makes 4p of the 3p/2. Each convolution is followed by a normalisation and a ReLU, the last of both branches by one
    normalisation of the concatenation, the expansion by a normalisation alone; after the sum there is a ReLU. The
    stride sits in the first 3x3 convolution of each branch.

    The arguments are those that torchvision's ResNet gives a block.
    """

    expansion = 4

    def __init__(
        self, inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1, norm_layer=None
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"{type(self).__name__}: groups must be 1 and base_width 64, got {groups}, {base_width}")
        norm = norm_layer or nn.BatchNorm2d
        half = planes // 2
        self.reduce1, self.bn_reduce1 = conv1x1(inplanes, planes), norm(planes)
        self.conv1 = conv3x3(planes, planes, stride, dilation=dilation)
        self.reduce2, self.bn_reduce2 = conv1x1(inplanes, half), norm(half)
        self.conv2, self.bn2 = conv3x3(half, half, stride, dilation=dilation), norm(half)
        self.conv3 = conv3x3(half, half, dilation=dilation)
        self.bn_concat = norm(planes + half)
        self.expand, self.bn_expand = conv1x1(planes + half, planes * self.expansion), norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, H / stride, W / stride], sizes rounded up."""
        first = self.conv1(self.relu(self.bn_reduce1(self.reduce1(x))))
        second = self.relu(self.bn_reduce2(self.reduce2(x)))
        second = self.conv3(self.relu(self.bn2(self.conv2(second))))
        branches = self.relu(self.bn_concat(torch.cat((first, second), 1)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn_expand(self.expand(branches)) + shortcut)


class AlignedInceptionResNet(StagedResNet):
    """Aligned-Inception-ResNet (Deformable ConvNets, 2017, Appendix B): stages as those of ResNet-101, with IRBs.

    The paper has the stages (Table 6), "a 1x1 convolution layer with stride 2" where the dimension changes, here in the
    shortcut of a stage's first block, and, in a picture, the block. Its widths here are those of a public
    re-implementation; they give the paper's number of parameters: docs/aligned_inception_resnet.md. No weights trained
    on ImageNet are published.

    Args:
        num_classes: Of the classifier. None: there is none, and the network returns its features.
        blocks: How many there are in each stage.
        dilated_c5: Whether conv5 stays at stride 16, with dilation 2 in all of its 3x3 convolutions, as in the paper's
            detectors (Section 2.3). The parameters are the same.
        out_indices: Which maps are the features, 0 (conv2, stride 4) to 3 (conv5), in ascending order. Without a
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
        blocks: Sequence[int] = (3, 4, 23, 3),
        dilated_c5: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__(InceptionResidualBlock, blocks, num_classes)
        if dilated_c5:
            _dilate(self.layer4)
        self.dilated_c5 = dilated_c5
        self._set_up(
            num_classes=num_classes,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
        )
        if dilated_c5:
            self.out_strides = tuple(min(stride, 16) for stride in self.out_strides)


def _dilate(stage: nn.Module) -> None:
    """Stride 1 and dilation 2. torchvision's `replace_stride_with_dilation` leaves the first block without it."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
