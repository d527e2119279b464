"""R-CNN feature mimicking in Detectron2's detectors."""

import copy

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dk_detection.detectron2 import DkMimicRCNN
from tests.detectron2.small import batch, detector

NETWORKS = {
    "fpn": (),
    "fpn, mdpool": (
        *("MODEL.ROI_HEADS.NAME", "DkROIHeads"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "DkModulatedDeformRoIPool"),
    ),
}
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
SMALL = ("MODEL.DK.MIMIC.PATCH_SIZE", 64)


def mimicking(*options, **kwargs):
    return detector("MODEL.DK.NETWORK", "DkMimicRCNN", *SMALL, *options, exchange=[], **kwargs)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS.keys())
def test_training(options):
    net = mimicking(*options)
    assert isinstance(net, DkMimicRCNN)
    with EventStorage() as storage:
        losses = net(batch())
        assert {"loss_mimic", "loss_mimic_cls"} <= losses.keys()
        assert "mimic_cosine" not in losses
        assert -1 <= storage.latest()["mimic_cosine"][0] <= 1
    sum(losses.values()).backward()
    assert losses["loss_mimic"].isfinite()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_dilated_conv5():
    net = mimicking(
        *("MODEL.BACKBONE.NAME", "build_dk_reduced_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        *("MODEL.RPN.IN_FEATURES", ["res4"]),
        base="COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    )
    with EventStorage():
        losses = net(batch())
    sum(losses.values()).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_images_without_objects():
    """Every parameter still gets a gradient, as distributed training needs."""
    net = mimicking("MODEL.DK.MIMIC.REGIONS", "foreground")
    inputs = batch()
    for one in inputs:
        one["instances"] = one["instances"][torch.zeros(0, dtype=torch.long)]
    with EventStorage() as storage:
        losses = net(inputs)
        assert "mimic_cosine" not in storage.latest()
    sum(losses.values()).backward()
    assert losses["loss_mimic"] == losses["loss_mimic_cls"] == 0
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_patch_is_seen_as_the_detector_sees_an_image():
    net = mimicking().eval()
    patches = torch.randn(2, 3, 64, 64)
    whole = Boxes(torch.tensor([[0.0, 0.0, 64.0, 64.0]]))
    rois = convert_boxes_to_pooler_format([whole, whole])
    heads = net.roi_heads
    with torch.no_grad():
        ours = net._patch_features(patches, rois)
        features = net.backbone(patches)
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], [whole, whole])
        torch.testing.assert_close(ours, heads.box_head(pooled))
    assert ours.shape == (2, 32)
    assert not ours[0].allclose(ours[1])


def test_without_the_branch_it_is_the_same_detector():
    net = mimicking()
    plain = detector()
    own = {name for name in net.state_dict() if name.startswith("mimic.")}
    assert own == {"mimic.classifier.weight", "mimic.classifier.bias"}
    assert net.state_dict().keys() - own == plain.state_dict().keys()
    missing, unexpected = plain.load_state_dict(net.state_dict(), strict=False)
    assert (missing, set(unexpected)) == ([], own)
    inputs = batch()
    with torch.no_grad():
        for a, b in zip(net.eval()(inputs), plain.eval()(inputs), strict=True):
            assert a["instances"].pred_boxes.tensor.equal(b["instances"].pred_boxes.tensor)
            assert a["instances"].pred_masks.equal(b["instances"].pred_masks)


def test_normalisations_do_not_learn_from_patches():
    options = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)
    net = mimicking(*options)
    plain = detector(*options)
    plain.load_state_dict(net.state_dict(), strict=False)
    inputs = batch()
    for model in (net, plain):
        with EventStorage():
            model.train()(inputs)
    expected = plain.state_dict()
    for name, value in net.state_dict().items():
        if "running" in name:
            assert value.equal(expected[name]), name
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True), "must not have train_on_pred_boxes=True"),
        (CASCADE, "roi_heads must have .* a linear cls_score, .* got CascadeROIHeads"),
        (("MODEL.DK.MIMIC.PATCH_SIZE", 60), "patch_size must be a multiple of 32, .* got 60"),
        (("MODEL.DK.MIMIC.REGIONS", "all"), "regions must be one of"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        mimicking(*options)


# Two processes.


class FixedProposals(torch.nn.Module):
    """Gives each image the same proposals, so that two runs train on the same RoIs."""

    def forward(self, images, features, targets=None):
        proposals = []
        for size in images.image_sizes:
            instances = Instances(size)
            instances.proposal_boxes = Boxes(torch.tensor([[4.0, 6, 50, 52], [28, 18, 88, 58], [60, 2, 90, 30]]))
            instances.objectness_logits = torch.zeros(3)
            proposals.append(instances)
        return proposals, {}


def _gradients(net, inputs, mimic_only) -> dict:
    with EventStorage():
        losses = net(inputs)
    total = sum(losses.values())
    if mimic_only:  # the other losses are means over what a process happens to have
        total = losses["loss_mimic"] + losses["loss_mimic_cls"] + 0 * total
    total.backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.requires_grad}


def _work(rank, net, inputs, mimic_only, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    torch.save(_gradients(parallel, inputs[rank : rank + 1], mimic_only), f"{path}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mimic_only", [True, False])
def test_two_processes_give_the_gradients_of_one(tmp_path, mimic_only):
    """The mimic losses although one has no object, and so no RoI to mimic; all losses if both have as many objects."""
    net = detector(
        *("MODEL.DK.NETWORK", "DkMimicRCNN", *SMALL, *NETWORKS["fpn, mdpool"]),
        exchange=[dict(layer="mdconv", select="backbone.bottom_up.res[345].*.conv2")],
    )
    net.double()  # in float32 a rounded sum now and then changes sides at a ReLU
    net.proposal_generator = FixedProposals()
    inputs = batch()
    none = torch.zeros(0, dtype=torch.long)
    inputs[1]["instances"] = inputs[1]["instances"][none] if mimic_only else inputs[0]["instances"]
    path = tmp_path / "meeting"
    arguments = copy.deepcopy(net), inputs, mimic_only, path
    torch.multiprocessing.start_processes(_work, arguments, nprocs=2, start_method="fork")
    expected = _gradients(net, inputs, mimic_only)
    for rank in (0, 1):
        gradients = torch.load(f"{path}.{rank}")
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max()
            assert (gradients[name] - value).abs().max() <= 1e-9 * scale + 1e-12, name
    for part in ("conv_offset", "box_pooler", "mimic.classifier"):
        assert any(part in name and value.abs().max() > 0 for name, value in expected.items())
