"""How MMDetection and Detectron2 call the parameters of the same detector, and how they order anchors.

Neither framework is needed here, nor torch: values are tensors of whatever library can index and reshape.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from dk_detection.errors import UserError

MMDET, DETECTRON2 = "mmdet", "detectron2"

# Modules with parameters, MMDetection's name first. {n} stands for a number; where Detectron2 counts from another one,
# its side says what to add. Of several that a name begins with the first counts.
_MODULES = (
    ("backbone.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.layer{0}.{1}.bn{2}", "backbone.bottom_up.res{0+1}.{1}.conv{2}.norm"),
    ("backbone.layer{0}.{1}.conv{2}.conv_offset", "backbone.bottom_up.res{0+1}.{1}.conv{2}.conv_offset"),
    ("backbone.layer{0}.{1}.conv{2}.conv_offset", "backbone.bottom_up.res{0+1}.{1}.conv{2}_offset"),
    ("backbone.layer{0}.{1}.conv{2}", "backbone.bottom_up.res{0+1}.{1}.conv{2}"),
    ("backbone.layer{0}.{1}.downsample.1", "backbone.bottom_up.res{0+1}.{1}.shortcut.norm"),
    ("backbone.layer{0}.{1}.downsample.0", "backbone.bottom_up.res{0+1}.{1}.shortcut"),
    ("neck.lateral_convs.{0}.bn", "backbone.fpn_lateral{0+2}.norm"),
    ("neck.lateral_convs.{0}.conv", "backbone.fpn_lateral{0+2}"),
    ("neck.fpn_convs.{0}.bn", "backbone.fpn_output{0+2}.norm"),
    ("neck.fpn_convs.{0}.conv", "backbone.fpn_output{0+2}"),
    ("neck.reduce.conv", "backbone.reduce"),
    ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
    ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    ("bbox_head.rpn_conv", "head.conv"),
    ("bbox_head.rpn_cls", "head.objectness_logits"),
    ("bbox_head.rpn_reg", "head.anchor_deltas"),
    ("roi_head.bbox_roi_extractor", "roi_heads.box_pooler"),
    ("roi_head.bbox_head.shared_fcs.{0}", "roi_heads.box_head.fc{0+1}"),
    ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
    ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    ("roi_head.mask_roi_extractor", "roi_heads.mask_pooler"),
    ("roi_head.mask_head.convs.{0}.conv", "roi_heads.mask_head.mask_fcn{0+1}"),
    ("roi_head.mask_head.upsample", "roi_heads.mask_head.deconv"),
    ("roi_head.mask_head.conv_logits", "roi_heads.mask_head.predictor"),
    ("mimic", "mimic"),
)
# The networks of dk_detection.backbones, which have the same names in both.
_OUR_NETWORKS = tuple(
    (f"backbone.{name}", f"backbone.bottom_up.{name}") for name in ("conv1", "bn1", "layer{0}", "features")
)
_NUMBER = re.compile(r"\{(\d)(?:\+(\d+))?\}")
# What no prediction depends on, and what the config says: buffers in older checkpoints of Detectron2.
_LEFT_OUT = re.compile(r"(.*\.)?num_batches_tracked|.*\.anchor_generator\.cell_anchors\.\d+|pixel_(mean|std)")
_PER_ANCHOR = re.compile(r"(rpn_head|bbox_head)\.rpn_(cls|reg)\.(weight|bias)")
_CLASS_AWARE = re.compile(r"(?:bbox_head\.rpn_|head\.)(cls|objectness_logits|reg|anchor_deltas)\.(?:weight|bias)")


def framework_of_names(names: Iterable[str]) -> str:
    """The framework whose detector has parameters of these names: "mmdet" or "detectron2"."""
    ours = ("backbone.bottom_up.", "proposal_generator.", "roi_heads.")
    return DETECTRON2 if any(name.startswith(ours) for name in names) else MMDET


def to_detectron2(state: Mapping, *, num_ratios: int = 3) -> dict:
    """A state dict of MMDetection's with Detectron2's names.

    Args:
        state: Of a Faster or Mask R-CNN, an R-FCN or a class-aware RPN with a ResNet or ResNeXt and FPN or a dilated
            conv5, and our layers in it.
        num_ratios: Number of aspect ratios of anchors. Of several sizes of anchors on a map MMDetection has all of one
            ratio together, Detectron2 all ratios of one size.

    Returns:
        The same tensors; those of the RPN's outputs reordered if anchors have several sizes. Left out are
        `num_batches_tracked`, on which no prediction depends, and anchors and pixel statistics, which the config has.

    Raises:
        UserError: A parameter has a name that such a detector of MMDetection has not.
    """
    renamed, scores = {}, _scores_per_anchor(state)
    modules = _OUR_NETWORKS + _MODULES if _has_our_network(state) else _MODULES
    for name, value in _kept(state):
        if _PER_ANCHOR.fullmatch(name):
            value = _reorder_anchors(value, name, num_ratios, scores, to_detectron2=True)
        renamed[_rename(name, modules, source=0)] = value
    return renamed


def to_mmdet(state: Mapping, *, num_ratios: int = 3) -> dict:
    """A state dict of Detectron2's with MMDetection's names: the inverse of `to_detectron2`.

    Args:
        state: As there; offset branches of Detectron2's own deformable blocks are known too.
        num_ratios: As there.

    Returns:
        As there.

    Raises:
        UserError: A parameter has a name that such a detector of Detectron2 has not.
    """
    renamed, scores = {}, _scores_per_anchor(state)
    for name, value in _kept(state):
        new = _rename(name, _MODULES + _OUR_NETWORKS, source=1)
        if _PER_ANCHOR.fullmatch(new):
            value = _reorder_anchors(value, name, num_ratios, scores, to_detectron2=False)
        renamed[new] = value
    return renamed


def _kept(state: Mapping) -> list[tuple]:
    return [(name, value) for name, value in state.items() if not _LEFT_OUT.fullmatch(name)]


def _has_our_network(state: Mapping) -> bool:
    """Whether a detector of MMDetection stands on a network of ours.

    That is MobileNet-V2, Aligned-Inception-ResNet, or a ResNet with depthwise conv2.
    """
    if any(name.startswith(("backbone.features.", "backbone.layer1.0.reduce1.")) for name in state):
        return True
    conv2 = "backbone.layer1.0.conv2"
    weight = state.get(f"{conv2}.weight", state.get(f"{conv2}.lifted_weight"))
    if weight is None:
        return False
    experts = state[f"{conv2}.routing.weight"].shape[0] if f"{conv2}.routing.weight" in state else 1
    return weight.shape[1] == experts


def _rename(name: str, modules: tuple[tuple[str, str], ...], source: int) -> str:
    for pair in modules:
        pattern, rename = _renamer(pair, source)
        if match := pattern.fullmatch(name):
            return rename(match)
    framework = ("MMDetection", "Detectron2")[source]
    raise UserError(f"{name}: no detector of {framework} that is known has a parameter of this name")


@cache
def _renamer(pair: tuple[str, str], source: int) -> tuple[re.Pattern, Callable[[re.Match], str]]:
    offsets = {number: int(offset or 0) for number, offset in _NUMBER.findall(pair[1])}
    sign = 1 if source == 0 else -1
    pattern, last = "", 0
    for place in _NUMBER.finditer(pair[source]):
        pattern += re.escape(pair[source][last : place.start()]) + rf"(?P<n{place[1]}>\d+)"
        last = place.end()
    pattern += re.escape(pair[source][last:]) + r"\.(?P<rest>.+)"

    def rename(match: re.Match) -> str:
        def number(place: re.Match) -> str:
            return str(int(match[f"n{place[1]}"]) + sign * offsets[place[1]])

        return f"{_NUMBER.sub(number, pair[1 - source])}.{match['rest']}"

    return re.compile(pattern), rename


def _scores_per_anchor(state: Mapping) -> int:
    """1 of an RPN; of a class-aware one as many as classes with the background."""
    found = {match[1]: value.shape[0] for name, value in state.items() if (match := _CLASS_AWARE.fullmatch(name))}
    scores, deltas = found.get("cls", found.get("objectness_logits")), found.get("reg", found.get("anchor_deltas"))
    return 4 * scores // deltas if scores and deltas else 1


def _reorder_anchors(value, name: str, num_ratios: int, scores: int, *, to_detectron2: bool):
    """The output channels [scores * A or 4 * A, ...] of an RPN in the other framework's order of its A anchors."""
    channels = value.shape[0]
    per_anchor = 4 if "rpn_reg" in name or "anchor_deltas" in name else scores
    sizes, rest = divmod(channels, per_anchor * num_ratios)
    if rest:
        raise UserError(f"{name} has {channels} channels, which {num_ratios} aspect ratios of anchors do not divide")
    first, second = (num_ratios, sizes) if to_detectron2 else (sizes, num_ratios)
    return value.reshape(first, second, per_anchor, -1).swapaxes(0, 1).reshape(value.shape)
