"""What every framework on MMEngine needs to see of dk_detection: MMDetection, MMPretrain, MMSegmentation, ...

Importing this module registers every layer of `dk_detection.layers.table`, the backbones of the papers and
`DkDeformable`, and makes MMEngine count the FLOPs of our operators. A config of any of them says::

    custom_imports = dict(imports=['dk_detection.mmengine'])

and then takes the layers by name, `dcn=dict(type='DkModulatedDeformConv2d')` for example, or exchanges convolutions in
any registered network::

    backbone=dict(
        type='DkDeformable', network='ResNet', depth=50, exchange=[dict(layer='mdconv', select='layer[34].*.conv2')])

`dk_detection.mmdet` has what is about detectors, and imports this.
"""

try:
    import mmengine.registry
except ImportError as error:
    raise ImportError(
        f"dk_detection.mmengine needs MMEngine ({error}). In the project's folder run `make setup` or `pip install "
        "--no-build-isolation -e '.[mmdet]'`, or '.[classification]', or '.[segmentation]'."
    ) from error

from dk_detection.mmengine import flops, models
from dk_detection.mmengine.backbone_hook import DkBackboneHook
from dk_detection.mmengine.backbones import DkAlignedInceptionResNet, DkMobileNetV2, DkResNetDW, DkShallow9
from dk_detection.mmengine.data_checks import check_data
from dk_detection.mmengine.deformed_shapes import DkAccuracyByDeformation, DkColourDistance
from dk_detection.mmengine.models import DkDeformable
from dk_detection.mmengine.sampling_hook import DkSamplingHook

__all__ = [
    "DkAccuracyByDeformation",
    "DkAlignedInceptionResNet",
    "DkBackboneHook",
    "DkColourDistance",
    "DkDeformable",
    "DkMobileNetV2",
    "DkResNetDW",
    "DkSamplingHook",
    "DkShallow9",
    "check_data",
]

models.register(mmengine.registry.MODELS)
flops.register()
