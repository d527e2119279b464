"""Networks of the papers that the frameworks do not have, in plain PyTorch on torchvision's models."""

try:
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"dk_detection.backbones builds on torchvision's models ({error}): install the torchvision that fits your "
        "torch, or `pip install --no-build-isolation -e '.[backbones]'` in the project's folder"
    ) from error

from dk_detection.backbones.aligned_inception_resnet import AlignedInceptionResNet
from dk_detection.backbones.mobilenet_v2 import MobileNetV2
from dk_detection.backbones.resnet_dw import ResNetDW
from dk_detection.backbones.shallow9 import Shallow9

__all__ = ["AlignedInceptionResNet", "MobileNetV2", "ResNetDW", "Shallow9"]
