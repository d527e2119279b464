"""The steps of feature mimicking on numbers that can be checked by hand, and the whole branch on a small network."""

import copy

import pytest
import torch
from torch import nn

from dk_detection.mimicking import (
    FeatureMimicking,
    choose_rois,
    cosine_similarity,
    crop_patches,
    frozen_statistics,
    mimic_classification_loss,
    mimic_loss,
)

# Eq. 3


def test_identical_features_cost_nothing_and_opposite_ones_two():
    features = torch.randn(5, 7)
    assert mimic_loss(features, features).abs() <= 1e-6
    assert mimic_loss(3 * features, features).abs() <= 1e-6
    assert (mimic_loss(-features, features) - 2).abs() <= 1e-6
    across = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert mimic_loss(*across) == 0.5  # 1 and 0, their mean
    assert mimic_loss(*across, normalizer=1) == 1


def test_half_precision_is_widened():
    features = torch.full((2, 1024), 300.0, dtype=torch.float16)  # the sum of squares is no float16
    loss = mimic_loss(features, features)
    assert loss.dtype == torch.float32
    assert loss.abs() <= 1e-6
    scores = torch.randn(2, 4, dtype=torch.bfloat16)
    assert mimic_classification_loss(scores, torch.tensor([0, 3])).dtype == torch.float32


def test_gradcheck():
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(mimic_loss, (a, b))
    labels = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda scores: mimic_classification_loss(scores, labels, normalizer=2), (a,))


def test_gradient_of_the_rcnn_branch_can_be_stopped():
    a, b = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    mimic_loss(a, b, rcnn_gradient=False).backward()
    assert a.grad is None
    stopped = b.grad.clone()
    b.grad = None
    mimic_loss(a, b).backward()
    assert a.grad.abs().max() > 0
    assert torch.equal(b.grad, stopped)


def test_no_rois():
    a, b = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5, requires_grad=True)
    classifier = nn.Linear(5, 3)
    loss = mimic_loss(a, b) + mimic_classification_loss(classifier(a), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert b.grad.shape == (0, 5)
    assert all(p.grad.eq(0).all() for p in classifier.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dead_feature(dtype):
    """A feature that ReLU has made zero has no direction; it must not spoil the gradient of the others."""
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    mimic_loss(x.relu(), torch.ones(2, 2, dtype=dtype)).backward()
    assert x.grad[0].eq(0).all()
    assert x.grad[1].isfinite().all()


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (1, 4)), ((3, 4, 1), (3, 4, 1))])
def test_features_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"cosine_similarity: the features must both be \[m, D\], got shapes \[3, 4"):
        mimic_loss(*(torch.ones(shape) for shape in shapes))


# Omega

IMAGE = torch.tensor([0] * 50 + [1] * 3 + [3] * 40)
FOREGROUND = torch.arange(93) % 5 < 2  # of image 1: numbers 50 and 51


@pytest.mark.parametrize(
    ("regions", "limit", "counts"),
    [
        ("foreground", 32, [20, 2, 0, 16]),
        ("foreground", 7, [7, 2, 0, 7]),
        ("background", 32, [30, 1, 0, 24]),
        ("background", 25, [25, 1, 0, 24]),
        ("both", 32, [32, 3, 0, 32]),
    ],
)
def test_choice(regions, limit, counts):
    chosen = choose_rois(IMAGE, FOREGROUND, regions=regions, max_rois=limit)
    assert len(set(chosen.tolist())) == len(chosen)
    assert IMAGE[chosen].bincount(minlength=4).tolist() == counts
    if regions != "both":
        assert (FOREGROUND[chosen] == (regions == "foreground")).all()


def test_choice_is_random():
    def draw(seed):
        return choose_rois(IMAGE, FOREGROUND, max_rois=9, generator=torch.Generator().manual_seed(seed)).tolist()

    assert draw(0) == draw(0)
    seen = {roi for seed in range(40) for roi in draw(seed)}
    assert seen == set(FOREGROUND.nonzero().flatten().tolist())  # each has its chance


def test_choice_from_nothing():
    chosen = choose_rois(IMAGE[:0], FOREGROUND[:0])
    assert chosen.shape == (0,)
    assert chosen.dtype == torch.long
    assert choose_rois(IMAGE, torch.zeros_like(FOREGROUND)).shape == (0,)


def test_choice_of_unknown_regions():
    with pytest.raises(ValueError, match="must be one of 'foreground', 'background', 'both', got 'fg'"):
        choose_rois(IMAGE, FOREGROUND, regions="fg")


# Patches


def ramp(height, width):
    """A [1, 2, height, width] image of its own coordinates: x and y of the centre of each pixel."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y])[None]


@pytest.mark.parametrize("roi", [[10, 5, 18, 13], [10.5, 5.25, 17, 21], [3, 3, 35, 27]], ids=["1:1", "up", "down"])
def test_patch_is_the_resized_region(roi):
    images = torch.cat([torch.zeros(1, 2, 32, 48), ramp(32, 48)])
    patch = crop_patches(images, torch.tensor([[1, *roi]]), size=8)
    x1, y1, x2, y2 = roi
    centre = (torch.arange(8) + 0.5) / 8
    assert patch.shape == (1, 2, 8, 8)
    assert torch.allclose(patch[0, 0], (x1 + centre * (x2 - x1)).expand(8, 8), atol=1e-4)
    assert torch.allclose(patch[0, 1], (y1 + centre * (y2 - y1))[:, None].expand(8, 8), atol=1e-4)


def test_patch_of_pixels_is_a_copy():
    images = torch.rand(2, 3, 20, 30)
    assert torch.allclose(crop_patches(images, torch.tensor([[1.0, 7, 2, 23, 18]]), 16)[0], images[1, :, 2:18, 7:23])


def test_patch_of_fine_texture_does_not_alias():
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 1, 64, 64)
    patch = crop_patches(stripes, torch.tensor([[0.0, 0, 0, 64, 64]]), 16)
    assert torch.allclose(patch, torch.full_like(patch, 0.5), atol=0.1)


# The branch

NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "frozen batch norm": lambda: nn.BatchNorm2d(4).eval(),
    "instance norm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_running_statistics_stay(norm):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm())
    net(torch.rand(2, 3, 9, 8))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    training = net[1].training
    x = 5 + torch.rand(2, 3, 9, 8)
    with pytest.raises(ZeroDivisionError), frozen_statistics(net):
        inside = net(x)
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[1].training == training
    if net[1].running_mean is not None:
        assert torch.equal(inside, net.eval()(x))


class Detector(nn.Module):
    """As much of a detector as the branch needs: features of RoIs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4 * 4, 6)

    def forward(self, images, rois):
        maps = self.net(images)
        pooled = torch.cat([maps.new_zeros(0, 16), *(crop(maps, roi) for roi in rois)]) + 0 * maps.sum()
        return self.fc(pooled).relu()


def crop(maps, roi):
    x1, y1, x2, y2 = (roi[1:] / 2).round().int().tolist()
    return nn.functional.adaptive_avg_pool2d(maps[int(roi[0]), None, :, y1:y2, x1:x2], 2).flatten(1)


ROIS = torch.tensor([[0, 0, 0, 16, 16], [0, 4, 2, 20, 14], [1, 8, 0, 24, 8], [1, 2, 2, 10, 30]]).float()
LABELS = torch.tensor([2, 0, 3, 1])  # 3 is the background


def run(detector, images, rois=ROIS, labels=LABELS, **options):
    torch.manual_seed(1)
    branch = FeatureMimicking(6, 3, patch_size=12, **options)

    def extract(patches, patch_rois):
        with frozen_statistics(detector):
            return detector(patches, patch_rois)

    losses = branch(images, rois, labels, detector(images, rois), extract)
    (losses["loss_mimic"] + losses["loss_mimic_cls"]).backward()
    gradients = {name: p.grad.clone() for name, p in [*detector.named_parameters(), *branch.named_parameters()]}
    detector.zero_grad()
    return losses, gradients


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32)


def test_weights_and_reductions(images):
    detector = Detector().eval()
    mean, _ = run(detector, images)
    total, _ = run(detector, images, reduction="sum", mimic_weight=0.2, cls_weight=0.05)
    assert torch.isclose(total["loss_mimic"], mean["loss_mimic"] * 2 * 3 / 2)  # three RoIs on two images
    assert torch.isclose(total["loss_mimic_cls"], mean["loss_mimic_cls"] / 2 * 3 / 2)
    assert torch.isclose(mean["loss_mimic"], 0.1 * (1 - mean["mimic_cosine"]))
    assert not mean["mimic_cosine"].requires_grad


def test_the_patch_of_a_whole_image_has_its_feature(images):
    """The similarity is 1 where the RoI is all there is: the weights are the same, the crop is the image."""
    detector = Detector().eval()
    rois = torch.tensor([[0.0, 0, 0, 12, 12], [1.0, 0, 0, 12, 12]])
    losses, _ = run(detector, images[:, :, :12, :12], rois, torch.tensor([0, 1]))
    assert losses["mimic_cosine"] > 1 - 1e-6
    assert losses["loss_mimic"].abs() < 1e-6


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_chunks_change_nothing(images, chunk_size):
    detector = Detector()
    whole, expected = run(copy.deepcopy(detector), images, regions="both")
    losses, gradients = run(detector, images, regions="both", chunk_size=chunk_size)
    for key, value in whole.items():
        assert torch.isclose(losses[key], value, atol=1e-6), key
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name
    assert detector.net[1].num_batches_tracked == 1  # the images, and no patches in the backward pass


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_mixed_precision(images, chunk_size):
    """The network computes in bfloat16, the losses in float32; the result is close to that of full precision."""
    detector = Detector().eval()
    expected, gradients = run(detector, images, chunk_size=chunk_size)
    with torch.autocast("cpu", torch.bfloat16):
        assert detector(images, ROIS).dtype == torch.bfloat16
        losses, mixed = run(detector, images, chunk_size=chunk_size)
    for key, value in expected.items():
        assert losses[key].dtype == torch.float32
        assert torch.isclose(losses[key], value, rtol=0.02, atol=1e-3), key
    for name, gradient in gradients.items():
        assert torch.allclose(mixed[name], gradient, atol=0.05 * float(gradient.abs().max()) + 1e-4), name


def test_chunks_bound_what_is_kept(images):
    def kept(**options):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            branch = FeatureMimicking(6, 3, patch_size=64, **options)
            detector = Detector()
            branch(images, ROIS, LABELS, torch.rand(4, 6), detector)
        return sum(sizes)

    patches, maps = 3 * 3 * 64 * 64, 3 * 4 * 32 * 32
    assert kept(chunk_size=1) < patches + maps / 3  # the maps of one patch are there at a time
    assert kept() > patches + 2 * maps


def test_stopped_gradient_leaves_the_classifier_its_own(images):
    _, both = run(Detector(), images, cls_weight=0.0)
    _, one = run(Detector(), images, cls_weight=0.0, rcnn_gradient=False)
    assert not torch.allclose(both["net.0.weight"], one["net.0.weight"])
    _, classified = run(Detector(), images, mimic_weight=0.0, rcnn_gradient=False)
    assert classified["net.0.weight"].abs().max() > 0


@pytest.mark.parametrize("regions", ["foreground", "background", "both"])
def test_nothing_to_mimic(images, regions):
    labels = torch.full((4,), 0 if regions == "background" else 3)
    rois, labels = (ROIS[:0], labels[:0]) if regions == "both" else (ROIS, labels)
    losses, gradients = run(Detector(), images, rois, labels, regions=regions)
    assert losses.keys() == {"loss_mimic", "loss_mimic_cls"}
    assert all(loss == 0 for loss in losses.values())
    assert all(gradient.eq(0).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(regions="fg"), "regions must be one of 'foreground', 'background', 'both', got 'fg'"),
        (dict(reduction="none"), "reduction must be one of 'mean', 'sum', got 'none'"),
        (dict(max_rois=0), "max_rois must be a positive integer, got 0"),
        (dict(patch_size=2.5), "patch_size must be a positive integer, got 2.5"),
        (dict(chunk_size=-1), "chunk_size must be a positive integer, got -1"),
        (dict(mimic_weight=-0.1), "mimic_weight must not be negative, got -0.1"),
        (dict(cls_weight=float("nan")), "cls_weight must not be negative, got nan"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"FeatureMimicking: {message}"):
        FeatureMimicking(6, 3, **options)


def test_only_the_classifier_is_new():
    assert {name: tuple(p.shape) for name, p in FeatureMimicking(6, 3).named_parameters()} == {
        "classifier.weight": (4, 6),
        "classifier.bias": (4,),
    }


def test_similarity_is_per_roi():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert torch.allclose(cosine_similarity(a, torch.tensor([[2.0, 0.0], [-1.0, 1.0]])), torch.tensor([1.0, 0.0]))
