"""The keys that we add to Detectron2's YAML, and the configs of this project by name."""

from collections.abc import Callable, Iterator
from functools import reduce
from inspect import signature

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from dk_detection import config_files
from dk_detection.layers.table import ROI_LAYERS, TABLE
from dk_detection.mimicking import FeatureMimicking

# Arguments of RoI layers that a pooler knows from elsewhere.
_KNOWN = {"output_size", "in_channels", "output_channels", "spatial_scale", "sampling_ratio", "device", "dtype"}

# Who reads keys of MODEL.DK: the setting of MODEL that names it, and its names.
_READERS = {
    ("NETWORK", "EXCHANGE"): ("META_ARCHITECTURE", ["DkDeformable"]),
    ("REDUCED_CHANNELS",): ("BACKBONE.NAME", ["build_dk_reduced_resnet_backbone"]),
    ("BACKBONE", "NORM_EVAL"): ("BACKBONE.NAME", ["build_dk_fpn_backbone"]),
    ("BOX_POOLER",): ("ROI_BOX_HEAD.POOLER_TYPE", list(ROI_LAYERS)),
    ("MASK_POOLER",): ("ROI_MASK_HEAD.POOLER_TYPE", list(ROI_LAYERS)),
    ("MIMIC",): ("META_ARCHITECTURE", ["DkMimicRCNN"]),
}


def add_dk_config(cfg: CfgNode) -> None:
    """Adds the keys of dk_detection with their defaults, which change nothing. Call it before `cfg.merge_from_file`.

    Args:
        cfg: The config, as `detectron2.config.get_cfg` gives it.
    """
    cfg.MODEL.DK = CfgNode()
    # META_ARCHITECTURE DkDeformable: the meta-architecture in which convolutions are exchanged,
    cfg.MODEL.DK.NETWORK = "GeneralizedRCNN"
    # and what is exchanged: [{layer: mdconv, select: "...", offset_groups: 4}].
    cfg.MODEL.DK.EXCHANGE = []
    # ROI_HEADS.NAME DkROIHeads: further arguments of the RoI layers that POOLER_TYPE names, None for the layer's own
    # default: BRANCH_SIZE, DEFORM_FC_CHANNELS, GAMMA and so on.
    layers = {}
    for row in TABLE:
        if row.kind == "roi":
            layers |= dict.fromkeys(_defaults(row.layer))
    for head in ("BOX", "MASK"):
        cfg.MODEL.DK[f"{head}_POOLER"] = CfgNode({"SHARE_LEVELS": True, **layers})
    # BACKBONE.NAME build_dk_reduced_resnet_backbone: channels of the last feature map.
    cfg.MODEL.DK.REDUCED_CHANNELS = 256
    # BACKBONE.NAME build_dk_fpn_backbone: the network, "resnet50-dw", "mobilenet-v2" or "aligned-inception-resnet".
    # BACKBONE.FREEZE_AT counts as in a ResNet.
    cfg.MODEL.DK.BACKBONE = "resnet50-dw"
    cfg.MODEL.DK.NORM_EVAL = True
    # DkMimicRCNN: the arguments of dk_detection.mimicking.FeatureMimicking: REGIONS, MAX_ROIS, CHUNK_SIZE and so on.
    cfg.MODEL.DK.MIMIC = CfgNode(_defaults(FeatureMimicking))
    # Factors on the learning rate by parts of parameters' names: [[conv_offset, 0.1]]. They act in this project's
    # tools/train_net.py only: Detectron2's builds the optimiser of a YAML config without asking for any.
    cfg.SOLVER.DK_LR_FACTORS = []
    # Pictures of what the network looks at and the norms of its offsets, every so many iterations, 0: never. Arguments
    # of DkVisualizeHook, for this project's tools/train_net.py.
    cfg.DK_VISUALIZE = CfgNode({"PERIOD": 0, "LAYER": None, "LEVELS": 3, "SCORE": 0.3})
    # Test-time augmentation: options of dk_detection.evaluation.box_averaging.average_boxes; 0 iterations do nothing.
    cfg.TEST.AUG.BOX_AVERAGING = CfgNode({"ITERATIONS": 0, "IOU_THRESHOLD": 0.5})


def network_of(cfg: CfgNode) -> str:
    """The meta-architecture of the network itself, also where convolutions of it are exchanged."""
    model = cfg.MODEL
    return model.DK.NETWORK if model.META_ARCHITECTURE == "DkDeformable" else model.META_ARCHITECTURE


def unread_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Keys of MODEL.DK that do not have their defaults and that nothing reads, each with the reason."""
    default = CfgNode({"MODEL": {}, "SOLVER": {}, "TEST": {"AUG": {}}})
    add_dk_config(default)
    for keys, (reader, names) in _READERS.items():
        value = reduce(getattr, reader.split("."), cfg.MODEL)
        if value not in names and not (keys == ("MIMIC",) and network_of(cfg) in names):
            wrong = f"MODEL.{reader} is {value!r}, expected {' or '.join(names)}"
            yield from ((f"MODEL.DK.{key}", wrong) for key in keys if cfg.MODEL.DK[key] != default.MODEL.DK[key])


def read_config(path: str) -> CfgNode | DictConfig:
    """A config file of Detectron2, a LazyConfig or YAML; that may have our keys."""
    if config_files.is_lazy_config(path):
        return LazyConfig.load(path)
    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def get_config(name: str) -> CfgNode | DictConfig:
    """A config of this project, as `detectron2.model_zoo.get_config` gives Detectron2's.

    Args:
        name: Folder and file: "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py", a LazyConfig, or YAML.

    Raises:
        UserError: There is none of this name.
    """
    return read_config(config_files.shipped(config_files.DETECTRON2, name))


def _defaults(function: Callable) -> dict:
    """The options of a function with their defaults, as keys of YAML."""
    parameters = signature(function).parameters.values()
    return {p.name.upper(): p.default for p in parameters if p.default is not p.empty and p.name not in _KNOWN}


def arguments(node: CfgNode) -> dict:
    """The keys of a node as arguments of a function, without those that are None."""
    return {name.lower(): value for name, value in node.items() if value is not None}
