"""R-CNN feature mimicking: Section 3.3 of Deformable ConvNets v2 (2018).

A two-stage detector learns to see a region as an R-CNN does, as if nothing but the region were in the image. The R-CNN
is the detector itself, run on image patches; only a classifier is its own. `FeatureMimicking` is the whole branch; a
framework's adapter tells it how the detector makes the feature of a RoI. The functions above it are its steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

REGIONS = ("foreground", "background", "both")


def choose_rois(
    image_index: Tensor,
    foreground: Tensor,
    *,
    regions: str = "foreground",
    max_rois: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the set Omega of Eq. 3, at random and without replacement.

    Args:
        image_index: [n], the image that each RoI is in.
        foreground: [n], bool, whether a RoI overlaps an object enough to be a positive one.
        regions: Which RoIs may be drawn: "foreground", "background" or "both" (Table 2).
        max_rois: At most so many are drawn from an image; all of them, if it has fewer.
        generator: Source of randomness on the device of the RoIs. None: torch's own.

    Returns:
        Indices [m] of the chosen RoIs, image by image.

    Raises:
        ValueError: `regions` is something else.
    """
    if regions not in REGIONS:
        raise ValueError(f"choose_rois: regions must be one of {', '.join(map(repr, REGIONS))}, got {regions!r}")
    allowed = torch.ones_like(foreground) if regions == "both" else foreground == (regions == "foreground")
    chosen = [allowed.new_zeros(0, dtype=torch.long)]
    for image in image_index.unique():
        candidates = (allowed & (image_index == image)).nonzero().squeeze(1)
        order = torch.randperm(len(candidates), generator=generator, device=candidates.device)
        chosen.append(candidates[order[:max_rois]])
    return torch.cat(chosen)


@torch.no_grad()
def crop_patches(images: Tensor, rois: Tensor, size: int = 224) -> Tensor:
    """Cuts regions out of images and resizes each to a square.

    This is RoIAlign (Mask R-CNN, 2017) of the image: a pixel of the patch is the mean of bilinear samples, about one
    per pixel, over the part of the image that it stands for, so that large regions do not alias when they shrink.

    Args:
        images: [N, C, H, W], normalised for the backbone.
        rois: [m, 5] = (image index, x1, y1, x2, y2) in pixels.
        size: Side of the patches in pixels.

    Returns:
        [m, C, size, size]. No gradient reaches the images.
    """
    from torchvision.ops import roi_align  # here: all else in this module, and detectors without mimicking, need it not

    return roi_align(images, rois.to(images.dtype), size, sampling_ratio=-1, aligned=True)


def cosine_similarity(rcnn_features: Tensor, features: Tensor) -> Tensor:
    """Cosine similarity of two sets of features [m, D], row by row: [m], in float32 or wider.

    Raises:
        ValueError: Their shapes differ or are not [m, D].
    """
    if rcnn_features.shape != features.shape or features.dim() != 2:
        raise ValueError(
            "cosine_similarity: the features must both be [m, D], got shapes "
            f"{list(rcnn_features.shape)} and {list(features.shape)}"
        )
    # The sum of squares of 1024 numbers soon leaves the range of float16.
    a, b = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (rcnn_features, features))
    return F.cosine_similarity(a, b, dim=1)


def mimic_loss(
    rcnn_features: Tensor,
    features: Tensor,
    *,
    normalizer: Tensor | float | None = None,
    rcnn_gradient: bool = True,
) -> Tensor:
    """One minus the cosine similarity of each RoI's two features, summed: Eq. 3, Deformable ConvNets v2.

    Args:
        rcnn_features: f_RCNN, [m, D], of the patches. m may be 0: the loss is 0 then and has gradients.
        features: f_FRCNN, [m, D], of the RoIs in the detector.
        normalizer: What the sum is divided by; None: m. 1 gives the sum as the paper writes it.
        rcnn_gradient: Whether the R-CNN branch learns from this loss, too, and not only the detector's side.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: The shapes of the features differ or are not [m, D].
    """
    if not rcnn_gradient:
        rcnn_features = rcnn_features.detach()
    distances = 1 - cosine_similarity(rcnn_features, features)  # [m]
    return distances.sum() / (max(len(distances), 1) if normalizer is None else normalizer)


def mimic_classification_loss(scores: Tensor, labels: Tensor, *, normalizer: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of the R-CNN branch's own classifier.

    Args:
        scores: Logits [m, C + 1]. m may be 0: the loss is 0 then and has gradients.
        labels: Classes [m], C for the background.
        normalizer: What the sum over the RoIs is divided by; None: m.

    Returns:
        A scalar, float32 or wider.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = F.cross_entropy(scores, labels, reduction="sum")
    return total / (max(len(labels), 1) if normalizer is None else normalizer)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, every normalisation of `module` uses its running statistics and leaves them as they are."""
    norms = [m for m in module.modules() if m.training and getattr(m, "running_mean", None) is not None]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple]]:
    """Collects (first argument, result) of each call of a module, for an adapter that needs what a detector hides."""
    calls = []
    handle = module.register_forward_hook(lambda _, arguments, result: calls.append((arguments[0], result)))
    try:
        yield calls
    finally:
        handle.remove()


class FeatureMimicking(nn.Module):
    """The R-CNN branch of a detector in training, with its losses: Section 3.3 of Deformable ConvNets v2 (2018).

    Its only parameters are those of a classifier. At inference it has nothing to do.

    Args:
        in_features: Length D of a RoI's feature, the input of the detector's own classifier.
        num_classes: Number of classes C, background not among them.
        regions: The RoIs that mimic: "foreground", "background" or "both".
        max_rois: How many of an image at most.
        patch_size: Side in pixels that patches are resized to.
        chunk_size: Patches that pass the network at a time. The backward pass computes the features of each chunk anew,
            so that memory is needed for one chunk instead of all patches, and time for another forward pass of them.
            None: all at once and nothing twice. The results are the same.
        mimic_weight: Weight of Eq. 3.
        cls_weight: Weight of the classifier's cross-entropy.
        reduction: "mean" over the RoIs of the batch; or "sum" over those of an image, as Eq. 3 has it, and the mean
            over the images.
        rcnn_gradient: Whether the mimic loss reaches the weights through the R-CNN branch, too.

    Raises:
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        regions: str = "foreground",
        max_rois: int = 32,
        patch_size: int = 224,
        chunk_size: int | None = None,
        mimic_weight: float = 0.1,
        cls_weight: float = 0.1,
        reduction: str = "mean",
        rcnn_gradient: bool = True,
    ) -> None:
        super().__init__()
        for name, value, choices in (("regions", regions, REGIONS), ("reduction", reduction, ("mean", "sum"))):
            if value not in choices:
                raise ValueError(
                    f"FeatureMimicking: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
                )
        sizes = dict(max_rois=max_rois, patch_size=patch_size, chunk_size=1 if chunk_size is None else chunk_size)
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"FeatureMimicking: {name} must be a positive integer, got {value!r}")
        for name, value in (("mimic_weight", mimic_weight), ("cls_weight", cls_weight)):
            if not value >= 0:
                raise ValueError(f"FeatureMimicking: {name} must not be negative, got {value!r}")
        self.num_classes = num_classes
        self.regions = regions
        self.max_rois = max_rois
        self.patch_size = patch_size
        self.chunk_size = chunk_size
        self.mimic_weight = mimic_weight
        self.cls_weight = cls_weight
        self.reduction = reduction
        self.rcnn_gradient = rcnn_gradient
        self.classifier = nn.Linear(in_features, num_classes + 1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as the classifier of Fast R-CNN (2015)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        images: Tensor,
        rois: Tensor,
        labels: Tensor,
        features: Tensor,
        extract: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch.

        In distributed training each process has to call this in each iteration, also without a RoI.

        Args:
            images: [N, C, H, W], the batch that the detector sees.
            rois: [n, 5] = (image index, x1, y1, x2, y2), the RoIs that the detector's second stage trains on.
            labels: [n], their classes, `num_classes` for the background.
            features: [n, in_features], what the detector's classifier sees of them.
            extract: The detector as a function from patches [m, C, s, s] and RoIs [m, 5], one covering each patch, to
                features [m, in_features]. With `chunk_size` it is called again in the backward pass.

        Returns:
            `loss_mimic` and `loss_mimic_cls`, weighted scalars. Where there are RoIs to compare, also `mimic_cosine`,
            the mean similarity of the features, without gradient.
        """
        chosen = choose_rois(rois[:, 0], labels < self.num_classes, regions=self.regions, max_rois=self.max_rois)
        rois, labels, features = rois[chosen], labels[chosen], features[chosen]
        if len(chosen):
            rcnn_features = self._extract(extract, crop_patches(images, rois, self.patch_size))
        else:  # not every network takes an empty batch; the losses are connected through `features` and the classifier
            rcnn_features = torch.zeros_like(features)
        normalizer = _mean_over_processes(len(chosen), images.device) if self.reduction == "mean" else len(images)
        losses = dict(
            loss_mimic=self.mimic_weight
            * mimic_loss(rcnn_features, features, normalizer=normalizer, rcnn_gradient=self.rcnn_gradient),
            loss_mimic_cls=self.cls_weight
            * mimic_classification_loss(self.classifier(rcnn_features), labels, normalizer=normalizer),
        )
        if len(chosen):
            losses["mimic_cosine"] = cosine_similarity(rcnn_features.detach(), features.detach()).mean()
        return losses

    def _extract(self, extract: Callable[[Tensor, Tensor], Tensor], patches: Tensor) -> Tensor:
        def features_of(chunk: Tensor) -> Tensor:
            rois = chunk.new_tensor([0, 0, 0, self.patch_size, self.patch_size]).repeat(len(chunk), 1)
            rois[:, 0] = torch.arange(len(chunk), device=chunk.device)
            return extract(chunk, rois)

        if self.chunk_size is None:
            return features_of(patches)
        chunks = patches.split(self.chunk_size)
        return torch.cat([checkpoint(features_of, chunk, use_reentrant=False) for chunk in chunks])

    def extra_repr(self) -> str:
        names = ("regions", "max_rois", "patch_size", "chunk_size", "mimic_weight", "cls_weight", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "rcnn_gradient"))


def _mean_over_processes(count: int, device: torch.device) -> Tensor | int:
    """Mean of a count over the processes of a distributed training; never 0, but a share of 1.

    Gradients are averaged over the processes. With this divisor their average is the gradient of a single process that
    has all images, however unevenly the RoIs lie on them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return max(count, 1)
    total = torch.tensor(float(count), device=device)
    torch.distributed.all_reduce(total)
    return total.clamp(min=1) / torch.distributed.get_world_size()
