"""The only list of layers in the project. Adapters and `to_deformable` read it; a new layer adds its row here."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from dk_detection.layers.active_conv2d import ActiveConv2d
from dk_detection.layers.cond_conv2d import CondConv2d
from dk_detection.layers.deform_conv2d import DeformConv2d, ModulatedDeformConv2d
from dk_detection.layers.deform_kernel_conv2d import (
    DeformKernelConv2d,
    LocalDeformKernel2d,
    ModulatedDeformKernelConv2d,
)
from dk_detection.layers.deform_psroi_pool import DeformPSRoIPool
from dk_detection.layers.deform_roi_pool import DeformRoIPool, ModulatedDeformRoIPool
from dk_detection.layers.global_deform_kernel2d import GlobalDeformKernel2d
from dk_detection.layers.kernel_evolution_conv2d import KernelEvolutionConv2d
from dk_detection.layers.rfcn_pool import RFCNPool


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: The name in a framework's registry. It carries `Dk`, as the bare names are taken there.
        token: The name inside the file name of a config: lower-case letters and digits, no other row's.
        kind: What the layer stands in for: "conv", an nn.Conv2d; "roi", the pooling of RoIs.
        layer: The class.
        paper: Where the layer is defined.
    """

    name: str
    token: str
    kind: Literal["conv", "roi"]
    layer: type[nn.Module]
    paper: str


TABLE = (
    Row(
        name="DkDeformConv2d",
        token="dconv",
        kind="conv",
        layer=DeformConv2d,
        paper="Dai et al., Deformable Convolutional Networks, ICCV 2017",
    ),
    Row(
        name="DkModulatedDeformConv2d",
        token="mdconv",
        kind="conv",
        layer=ModulatedDeformConv2d,
        paper="Zhu et al., Deformable ConvNets v2: More Deformable, Better Results, CVPR 2019",
    ),
    Row(
        name="DkLocalDeformKernel2d",
        token="dk",
        kind="conv",
        layer=LocalDeformKernel2d,
        paper="Gao et al., Deformable Kernels, ICLR 2020, Eq. 7",
    ),
    Row(
        name="DkGlobalDeformKernel2d",
        token="gdk",
        kind="conv",
        layer=GlobalDeformKernel2d,
        paper="Gao et al., Deformable Kernels, ICLR 2020, Sec. 3.3",
    ),
    Row(
        name="DkDeformKernelConv2d",
        token="dkdconv",
        kind="conv",
        layer=DeformKernelConv2d,
        paper="Gao et al., Deformable Kernels, ICLR 2020, Eq. 11",
    ),
    Row(
        name="DkModulatedDeformKernelConv2d",
        token="dkmdconv",
        kind="conv",
        layer=ModulatedDeformKernelConv2d,
        paper="Gao et al., Deformable Kernels, ICLR 2020, Eq. 11, with the modulation of Zhu et al., CVPR 2019",
    ),
    Row(
        name="DkCondConv2d",
        token="scc",
        kind="conv",
        layer=CondConv2d,
        paper="Yang et al., CondConv: Conditionally Parameterized Convolutions, NeurIPS 2019",
    ),
    Row(
        name="DkKernelEvolutionConv2d",
        token="dke",
        kind="conv",
        layer=KernelEvolutionConv2d,
        paper="Liu et al., Differentiable Kernel Evolution, ICCV 2019",
    ),
    Row(
        name="DkActiveConv2d",
        token="acu",
        kind="conv",
        layer=ActiveConv2d,
        paper="Jeon and Kim, Active Convolution, CVPR 2017",
    ),
    Row(
        name="DkDeformRoIPool",
        token="dpool",
        kind="roi",
        layer=DeformRoIPool,
        paper="Dai et al., Deformable Convolutional Networks, ICCV 2017",
    ),
    Row(
        name="DkModulatedDeformRoIPool",
        token="mdpool",
        kind="roi",
        layer=ModulatedDeformRoIPool,
        paper="Zhu et al., Deformable ConvNets v2: More Deformable, Better Results, CVPR 2019",
    ),
    Row(
        name="DkDeformPSRoIPool",
        token="dpspool",
        kind="roi",
        layer=DeformPSRoIPool,
        paper="Dai et al., Deformable Convolutional Networks, ICCV 2017",
    ),
    Row(
        name="DkRFCNPool",
        token="rfcnpool",
        kind="roi",
        layer=RFCNPool,
        paper="Dai et al., Deformable Convolutional Networks, ICCV 2017",
    ),
)


ROI_LAYERS = {row.name: row.layer for row in TABLE if row.kind == "roi"}


def find(token: str) -> Row:
    """The row of a token.

    Raises:
        ValueError: No row has this token; the message lists those there are.
    """
    for row in TABLE:
        if row.token == token:
            return row
    raise ValueError(f"no layer has the token {token!r}; the tokens are {', '.join(row.token for row in TABLE)}")
