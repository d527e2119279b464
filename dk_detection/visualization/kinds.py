"""The kinds of pictures that `tools/visualize.py` makes: each runs detectors and gives a figure and its numbers."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from dk_detection.errors import UserError
from dk_detection.visualization import pictures
from dk_detection.visualization.detectors import Detector, Objects, Sample, read_coco
from dk_detection.visualization.dilation import CLASSES, COCO_AREAS, DilationTable, thirds
from dk_detection.visualization.dynamics import (
    dynamics_of,
    embed,
    nearest_neighbour_figures,
    object_dynamics,
    size_deciles,
)
from dk_detection.visualization.locations import bin_locations, kernel_locations, learned_taps, sampling_locations
from dk_detection.visualization.paths import (
    Call,
    check_point,
    default_layer,
    evaluation_mode,
    find_layer,
    listening,
    observe,
    offset_norms,
)
from dk_detection.visualization.support import effective_receptive_field, node_response, saliency_region

_MOST_SHAPES = 6  # layers beside one another in a picture of kernel shapes
_SMALLEST_CROP = 32  # pixels; less, and deep networks have nothing left of it
_MOST_STEPS = 2000  # of the search for a saliency region


@dataclass(frozen=True)
class Options:
    """What a picture is of.

    Attributes:
        image: The image file.
        points: (x, y) of places in it.
        boxes: (x1, y1, x2, y2) of places in it. Where there is neither, it is what the first detector finds: up to
            three objects from the smallest to the largest.
        layer: Dotted name of the module whose nodes are looked at. None: the last convolution of more than one tap in
            the backbone; for kernels, offsets and dynamics the last that has them.
        levels: Number of layers whose taps fan out.
        strength: Whether sampling and bin locations weigh what their gradient says, and not their modulation.
        bound: Largest relative change of a response by what is left out of its saliency region.
        cell: Side of the cells of a saliency region, in pixels of the network's input. None: a 32nd of the longer side.
        seconds: About how long the search for all saliency regions of a picture may take.
        score: Least score of a detection.
        annotations, images: A COCO file and the folder of its images.
        limit: Number of images that are looked at.
        areas: Areas that part small from medium and medium from large objects; None: such that there are a third each.
        say: Tells the user what is being done.
    """

    image: str | None = None
    points: Sequence[tuple[float, float]] = ()
    boxes: Sequence[tuple[float, float, float, float]] = ()
    layer: str | None = None
    levels: int = 3
    strength: bool = False
    bound: float = 0.1
    cell: int | None = None
    seconds: float = 10
    score: float = 0.3
    annotations: str | None = None
    images: str | None = None
    limit: int = 100
    areas: tuple[float, float] | None = COCO_AREAS
    say: Callable[[str], None] = field(default=lambda text: None)


def predictions(detectors: dict[str, Detector], options: Options):
    """What each detector finds in an image."""
    figure, numbers = None, {}
    for column, (title, detector) in enumerate(detectors.items()):
        options.say(f"{title}: predicting")
        sample = detector.read(_image(options))
        found = detector.predict(sample).above(options.score)
        if figure is None:
            figure, axes = pictures.new_figure(1, len(detectors), sample.image.shape[:2], list(detectors))
        pictures.draw_image(axes[0, column], sample.image)
        pictures.draw_objects(axes[0, column], found)
        numbers[title] = [
            {"label": label, "score": round(float(score), 4), "box": _rounded(box)}
            for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
        ]
    return figure, numbers


def sampling(detectors: dict[str, Detector], options: Options):
    """Where nodes look through the stack of layers below them."""

    def draw(title, detector, sample, places, axes):
        seen = observe(detector.network, sample.input, _layer(detector, options), detector.features)
        for place, axis in zip(places, axes, strict=True):
            options.say(f"{title}: sampling locations at {_text(place.point)}")
            found, points, center = _locations(seen, sample, place.point, options)
            pictures.draw_image(axis, sample.image, fade=0.4)
            pictures.draw_locations(axis, found, points, center)
            pictures.caption(axis, f"{len(points)} locations, spread {found.spread / np.mean(sample.scale):.0f} pixels")
            yield {
                "layer": seen.layer,
                "node": list(found.node),
                "center": _rounded(center),
                "layers": found.layers,
                "spread": round(found.spread / float(np.mean(sample.scale)), 2),
                "locations": [[*_rounded(p), round(float(w), 6)] for p, w in zip(points, found.weights, strict=True)],
            }

    return _grid(detectors, options, draw)


def receptive_field(detectors: dict[str, Detector], options: Options):
    """How much each pixel sways a node; of a box, its class scores."""

    def draw(title, detector, sample, places, axes):
        for place, axis in zip(places, axes, strict=True):
            options.say(f"{title}: effective receptive field at {_text(place.point)}")
            response, about = _response(detector, sample, place, options)
            values = effective_receptive_field(response, sample.input)
            pictures.draw_field(axis, sample.image, _on_image(values, sample))
            _mark(axis, place, about)
            radius = _radius(values) / float(np.mean(sample.scale))
            yield {**about, "radius": round(radius, 2)}

    return _grid(detectors, options, draw)


def saliency(detectors: dict[str, Detector], options: Options):
    """The smallest region that gives a node, or the class scores of a box, the same response within a bound."""

    def draw(title, detector, sample, places, axes):
        for place, axis in zip(places, axes, strict=True):
            response, about = _response(detector, sample, place, options)
            options.say(f"{title}: saliency region at {_text(place.point)}")
            shown = [time.monotonic()]

            def progress(done, most, title=title, place=place, shown=shown):
                if time.monotonic() - shown[0] > 5:
                    shown[0] = time.monotonic()
                    options.say(f"{title}: saliency region at {_text(place.point)}, step {done}")

            cell = options.cell or max(1, round(max(sample.size) / 32))
            region = saliency_region(
                response,
                sample.input,
                bound=options.bound,
                cell=cell,
                max_evaluations=_MOST_STEPS,
                seconds=options.seconds / (len(places) * len(detectors)),
                progress=progress,
            )
            mask = _on_image(region.mask, sample)
            pictures.draw_region(axis, sample.image, mask)
            _mark(axis, place, about)
            share = float(mask.double().mean())
            text = f"{share:.0%} kept, change {region.error:.3f}"
            pictures.caption(axis, text + ("" if region.is_minimal else ", cut short"))
            yield {
                **about,
                "share": round(share, 4),
                "error": round(region.error, 4),
                "cell": cell,
                "evaluations": region.evaluations,
                "ended_early": not region.is_minimal,
            }

    return _grid(detectors, options, draw)


def bins(detectors: dict[str, Detector], options: Options):
    """Where deformable RoI pooling of a box puts its bins."""

    def draw(title, detector, sample, places, axes):
        options.say(f"{title}: bins")
        boxes = sample.to_input([place.box for place in places]).to(sample.input)
        calls = _pool(detector, sample.input, boxes)
        for box, place, axis in zip(boxes, places, axes, strict=True):
            call, row = min(
                ((call, row) for call in calls for row in range(len(call.args[1]))),
                key=lambda each: float((each[0].args[1][each[1], 1:] - box).abs().sum()),
            )
            values = {name: value[row : row + 1].detach() for name, value in call.sampling.items()}
            module = call.module
            is_sensitive = hasattr(module, "group_size")
            middles, size = bin_locations(
                call.args[1][row : row + 1].detach(),
                _size(module.output_size),
                values.get("offset"),
                gamma=getattr(module, "gamma", 0.1),
                position_sensitive=is_sensitive,
                spatial_scale=call.args[2] if is_sensitive and len(call.args) > 2 else 1.0,
            )
            weights = values.get("strength") if options.strength else values.get("mask")
            if weights is not None:
                weights = weights.reshape(1, -1, *_size(module.output_size))[:, :1]
            middles, size = sample.to_image(middles[:, :1]), sample.to_image(size)
            pictures.draw_image(axis, sample.image, fade=0.4)
            pictures.draw_bins(axis, middles[0, 0], size[0], None if weights is None else weights[0, 0].double())
            pictures.draw_box(axis, place.box)
            rest = bin_locations(torch.tensor([place.box]), _size(module.output_size))[0]
            moved = float((middles - rest).norm(dim=-1).mean())
            pictures.caption(axis, f"bins moved by {moved:.1f} pixels" if "offset" in values else "bins do not move")
            yield {
                "box": _rounded(place.box),
                "layer": call.name,
                "bins": [_rounded(p) for p in middles[0, 0].reshape(-1, 2)],
                "weights": None if weights is None else [round(float(w), 6) for w in weights.flatten()],
                "moved": round(moved, 3),
            }

    return _grid(detectors, options, draw, with_boxes=True)


def kernel(detectors: dict[str, Detector], options: Options):
    """Where the taps of a deformable kernel sample in its scope, over all positions of an image."""
    positions, scopes, numbers = {}, {}, {}
    for title, detector in detectors.items():
        options.say(f"{title}: kernel sampling")
        call = _heard(detector, detector.read(_image(options)).input, options, ("kernel_offset",))
        places = kernel_locations(call.module, call.sampling["kernel_offset"])[0].flatten(2).numpy()
        positions[title], scopes[title] = places, call.module.scope_size
        numbers[title] = {
            "layer": call.name,
            "scope": list(call.module.scope_size),
            "mean": places.mean(2).round(4).tolist(),
            "std": places.std(2).round(4).tolist(),
        }
    return pictures.kernel_figure(positions, scopes), numbers


def shapes(detectors: dict[str, Detector], options: Options):
    """The kernel shapes that layers have learned once for all positions: Figures 5 and 6 of Kernel Evolution (2019)."""
    taps, numbers = {}, {}
    for title, detector in detectors.items():
        if options.layer is not None:
            layers = {options.layer: find_layer(detector.network, options.layer)}
        else:
            layers = dict(detector.network.named_modules())
        learned = {name: learned_taps(layer) for name, layer in layers.items() if hasattr(layer, "tap_offset")}
        if not learned:
            raise UserError(f"{options.layer or title} has no layer that learns where its taps lie (dke, acu)")
        chosen = np.linspace(0, len(learned) - 1, min(_MOST_SHAPES, len(learned))).round().astype(int)
        taps[title] = {name: learned[name].numpy() for name in np.array(list(learned))[chosen]}
        numbers[title] = {
            name: {
                "moved": round(float(layers[name].tap_offset.detach().square().sum(-1).mean().sqrt()), 4),
                "reach": round(float(places.square().sum(-1).mean().sqrt()), 4),
                "mean": places.mean(0).numpy().round(4).tolist(),
                "std": places.std(0, correction=0).numpy().round(4).tolist(),
            }
            for name, places in learned.items()
        }
    return pictures.shapes_figure(taps), numbers


def offsets(detectors: dict[str, Detector], options: Options):
    """The data offsets of a layer as fields over an image."""
    if len(detectors) > 1:
        raise UserError("a picture of offsets is of one checkpoint, as each tap has a field of its own")
    ((title, detector),) = detectors.items()
    options.say(f"{title}: offsets")
    sample = detector.read(_image(options))
    call = _heard(detector, sample.input, options, ("offset",))
    kernel_size = call.module.kernel_size
    fields = call.sampling["offset"][0].unflatten(0, (-1, kernel_size[0] * kernel_size[1], 2))[0]
    # Padding at the bottom and on the right is left out.
    height, width = (
        max(1, round(length * part / whole))
        for length, part, whole in zip(fields.shape[2:], sample.size, sample.input.shape[2:], strict=True)
    )
    fields = fields[..., :height, :width].cpu().numpy()
    figure = pictures.offsets_figure(sample.image, fields, kernel_size, call.name)
    rms = np.sqrt((fields**2).sum(1).mean((1, 2)))
    return figure, {title: {"layer": call.name, "rms": rms.round(4).tolist()}}


def dilation(detectors: dict[str, Detector], options: Options):
    """Effective dilation over small, medium and large objects and over the background."""
    images = _coco(options)
    areas = options.areas or thirds([float(area) for _, objects in images for area in objects.areas])
    tables = {}
    for title, detector in detectors.items():
        table = DilationTable(areas)
        for sample, objects in _read(images, title, detector, options):
            seen = observe(detector.network, sample.input, _layer(detector, options), detector.features)
            table.add(seen, objects.boxes, sample.size, sample.scale)
        tables[title] = table.rows()
    if not all(tables.values()):
        empty = next(title for title, table in tables.items() if not table)
        raise UserError(f"{empty}: no layer between the node and the image deforms its sampling")
    return pictures.dilation_figure(tables, CLASSES), {"areas": list(areas), "images": len(images), "tables": tables}


def dynamics(detectors: dict[str, Detector], options: Options):
    """Learned dynamics of the objects of a data set, by t-SNE; and what their nearest neighbours tell."""
    images = _coco(options)
    labels = [label for _, objects in images for label in objects.labels]
    areas = torch.cat([objects.areas for _, objects in images])
    points, notes, numbers = {}, {}, {}
    classes = sorted(set(labels))
    for title, detector in detectors.items():
        rows = []
        for sample, objects in _read(images, title, detector, options):
            rows.append(_dynamics(detector, sample, objects, options))
        vectors = torch.cat(rows).cpu()
        figures = nearest_neighbour_figures(vectors, torch.tensor([classes.index(label) for label in labels]), areas)
        options.say(f"{title}: t-SNE of {len(vectors)} objects")
        points[title] = embed(vectors).numpy()
        notes[title] = [
            f"neighbour of the same class {figures.class_accuracy:.0%} (chance {figures.class_chance:.0%})",
            f"of the same decile {figures.decile_accuracy:.0%} (chance {figures.decile_chance:.0%})",
        ]
        numbers[title] = {"objects": len(vectors), "dimensions": vectors.shape[1], **asdict(figures)}
    figure = pictures.dynamics_figure(points, labels, size_deciles(areas).numpy(), notes)
    return figure, numbers


def sheet(detectors: dict[str, Detector], options: Options):
    """A contact sheet of one detector: objects of three sizes, what is predicted, and where it looks."""
    if len(detectors) > 1:
        raise UserError("a contact sheet is of one checkpoint")
    ((title, detector),) = detectors.items()
    images = _coco(options)
    entries = []
    for index, number in objects_of_three_sizes([objects for _, objects in images]):
        options.say(f"{title}: {images[index][0]}")
        sample = detector.read(images[index][0])
        entries.append((sample, images[index][1], number, detector.predict(sample).above(options.score)))
    return contact_sheet(detector, entries, options)


def objects_of_three_sizes(images: Sequence[Objects]) -> list[tuple[int, int]]:
    """A small, a medium and a large object: (index of the image, index of the object in it) of each.

    They are at a tenth, at a half and at nine tenths of all areas, so that what is nearly hidden is not among them.
    """
    every = [(float(area), i, j) for i, objects in enumerate(images) for j, area in enumerate(objects.areas)]
    every.sort()
    places = sorted({round(share * (len(every) - 1)) for share in (0.1, 0.5, 0.9)})
    return [every[place][1:] for place in places] if every else []


def contact_sheet(
    detector: Detector, entries: Sequence[tuple[Sample, Objects, int, Objects]], options: Options | None = None
):
    """Draws objects, each beside what is predicted in its image and where the detector looks at its centre.

    Args:
        detector: The detector.
        entries: Of each row the image, its objects, the index of the one that is looked at, and the predictions.
        options: `layer`, `levels` and `strength` count.

    Returns:
        The figure and its numbers.
    """
    options = options or Options()
    layer = _layer(detector, options)
    titles = ("objects", "predictions", "sampling locations", "effective receptive field")
    shape = max((sample.image.shape[:2] for sample, *_ in entries), key=lambda each: each[0] / each[1])
    figure, axes = pictures.new_figure(len(entries), len(titles), shape, titles)
    numbers = []
    for row, (sample, objects, number, found) in zip(axes, entries, strict=True):
        box = objects.boxes[number].tolist()
        place = _Place(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box)
        seen = observe(detector.network, sample.input, layer, detector.features)
        locations, points, center = _locations(seen, sample, place.point, options)
        values = effective_receptive_field(
            node_response(detector.network, layer, locations.node, detector.features), sample.input
        )
        pictures.draw_image(row[0], sample.image)
        pictures.draw_objects(row[0], objects)
        pictures.draw_image(row[1], sample.image)
        pictures.draw_objects(row[1], found)
        pictures.draw_image(row[2], sample.image, fade=0.4)
        pictures.draw_box(row[2], box)
        pictures.draw_locations(row[2], locations, points, center)
        pictures.draw_field(row[3], sample.image, _on_image(values, sample))
        pictures.draw_box(row[3], box)
        pictures.draw_node(row[3], center)
        scale = float(np.mean(sample.scale))
        numbers.append(
            {
                "box": _rounded(box),
                "label": objects.labels[number],
                "layer": layer,
                "spread": round(locations.spread / scale, 2),
                "radius": round(_radius(values) / scale, 2),
            }
        )
    return figure, numbers


def training_picture(detector: Detector, image: Tensor, boxes: Tensor | None, labels: Tensor | None, options: Options):
    """What a network in training looks at, and the norms of its offsets. It is left as it was.

    Args:
        detector: Whose network is in training.
        image: [3, h, w], values 0 to 255, as the network sees it.
        boxes: [n, 4] = (x1, y1, x2, y2) of its objects in it; None: those that are detected.
        labels: [n], numbers of their classes.
        options: As `contact_sheet`'s.

    Returns:
        A contact sheet of up to three objects, None if there are none or the way from the layer to the image cannot be
        followed; and norms by layer.
    """
    with evaluation_mode(detector.network):
        sample = detector.of_input(image)
        with torch.no_grad(), listening(detector.network) as calls:
            found = detector.predict(sample).above(options.score)
        objects = found
        if boxes is not None:
            names = [str(label if detector.classes is None else detector.classes[label]) for label in labels.tolist()]
            objects = Objects(boxes.cpu(), names)
        figure = None
        entries = [(sample, objects, int(number), found) for number in objects.of_sizes(3)]
        if entries:
            try:
                figure, _ = contact_sheet(detector, entries, options)
            except UserError as error:
                options.say(f"no picture of what the network looks at: {error}")
    return figure, offset_norms(calls)


KINDS = {
    "predictions": predictions,
    "sampling": sampling,
    "receptive-field": receptive_field,
    "saliency": saliency,
    "bins": bins,
    "kernel": kernel,
    "shapes": shapes,
    "offsets": offsets,
    "dilation": dilation,
    "dynamics": dynamics,
    "sheet": sheet,
}


@dataclass(frozen=True)
class _Place:
    point: tuple[float, float]
    box: Sequence[float] | None = None


def _grid(detectors: dict[str, Detector], options: Options, draw, with_boxes: bool = False):
    """A figure with a row for each place and a column for each detector; of one detector, places are side by side."""
    samples = {}
    for title, detector in detectors.items():
        options.say(f"{title}: reading the image")
        samples[title] = detector.read(_image(options))
    first = next(iter(detectors))
    places = _places(detectors[first], samples[first], options, with_boxes)
    shape = samples[first].image.shape[:2]
    if len(detectors) == 1:
        figure, axes = pictures.new_figure(1, len(places), shape)
        axes = axes.T
    else:
        figure, axes = pictures.new_figure(len(places), len(detectors), shape, list(detectors))
    numbers = {}
    for column, (title, detector) in enumerate(detectors.items()):
        numbers[title] = list(draw(title, detector, samples[title], places, axes[:, column]))
    return figure, numbers


def _places(detector: Detector, sample: Sample, options: Options, with_boxes: bool) -> list[_Place]:
    boxes = [list(map(float, box)) for box in options.boxes]
    for box in boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"the box {_text(box)} has no area; write X1 Y1 X2 Y2, left and top first")
        check_point(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), sample.image.shape[:2])
    for point in options.points:
        check_point(point, sample.image.shape[:2])
    if with_boxes and options.points:
        raise UserError("bins are those of boxes: write --box X1 Y1 X2 Y2")
    places = [_Place(tuple(point)) for point in options.points]
    places += [_Place(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box) for box in boxes]
    if places:
        return places
    found = detector.predict(sample).above(options.score)
    if not found.labels:
        raise UserError(
            f"{options.image}: nothing is found with a score of at least {options.score:g}; name a place with "
            f"{'--box X1 Y1 X2 Y2' if with_boxes else '--point X Y'}, or lower --score"
        )
    boxes = found.boxes[found.of_sizes(3)].tolist()
    return [
        _Place(((x1 + x2) / 2, (y1 + y2) / 2), [x1, y1, x2, y2] if with_boxes else None) for x1, y1, x2, y2 in boxes
    ]


def _locations(seen, sample: Sample, point, options: Options):
    """The locations of the node at a point of the image, and their and its places in the image."""
    node = seen.node_at(sample.to_input(point).tolist())
    found = sampling_locations(seen, node, levels=options.levels, strength=options.strength)
    return found, sample.to_image(found.points), sample.to_image(torch.tensor(found.center)).tolist()


def _response(detector: Detector, sample: Sample, place: _Place, options: Options):
    """What is asked about a place, and how it is called in the numbers."""
    if place.box is not None:
        box = sample.to_input([place.box]).to(sample.input)
        return (lambda data: detector.scores(data, box)[0]), {"box": _rounded(place.box)}
    layer = _layer(detector, options)
    seen = observe(detector.network, sample.input, layer, detector.features)
    node = seen.node_at(sample.to_input(place.point).tolist())
    center = sample.to_image(torch.tensor(seen.rest_position(node))).tolist()
    about = {"layer": layer, "node": list(node), "center": _rounded(center)}
    return node_response(detector.network, layer, node, detector.features), about


def _mark(axis, place: _Place, about: dict) -> None:
    if place.box is not None:
        pictures.draw_box(axis, place.box)
    else:
        pictures.draw_node(axis, about["center"])


def _on_image(values: Tensor, sample: Sample) -> Tensor:
    """Values [h, w] of the input without its padding; they cover the image."""
    return values[: sample.size[0], : sample.size[1]]


def _radius(values: Tensor) -> float:
    """Root of the mean squared distance of a field from its centre of mass; 0 for one that is zero."""
    weights = values.detach().double().cpu()
    total = weights.sum()
    if not total > 0:
        return 0.0
    moments = 0.0
    for dim, length in enumerate(weights.shape):
        share = weights.sum(1 - dim) / total
        places = torch.arange(length, dtype=torch.float64)
        moments += float((share * (places - (share * places).sum()).square()).sum())
    return moments**0.5


def _pool(detector: Detector, input: Tensor, boxes: Tensor) -> list[Call]:
    """The calls of RoI poolings, deformable or not, when boxes are classified.

    Their sampling has "strength" [n, classes, partH, partW], the norm of the gradient of a box's highest score by the
    places of its bins, where bins move.
    """
    rigid: list[Call] = []

    def remember(name):
        def hook(module, args, output):
            is_pooling = len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 2 and args[1].shape[1] == 5
            if is_pooling and len(args[1]):
                rigid.append(Call(name, module, args))

        return hook

    modules = [(name, module) for name, module in detector.network.named_modules() if hasattr(module, "output_size")]
    handles = [module.register_forward_hook(remember(name)) for name, module in modules]
    try:
        with torch.enable_grad(), listening(detector.network) as calls:
            scores = detector.scores(input.detach().clone().requires_grad_(), boxes)
    finally:
        for handle in handles:
            handle.remove()
    moving = [call for call in calls if hasattr(call.module, "output_size") and len(call.args[1])]
    if not moving and not rigid:
        raise UserError("the detector pools no RoIs by a layer with an output size")
    response = scores.max(1).values.sum()
    for call in moving:
        (gradient,) = torch.autograd.grad(response, call.sampling["offset"], retain_graph=True)
        strength = gradient.unflatten(1, (-1, 2)).norm(dim=2)
        call.sampling = {**call.sampling, "strength": strength}
    return moving or rigid


def _heard(detector: Detector, input: Tensor, options: Options, wanted: tuple[str, ...]) -> Call:
    """The call of the layer that is asked for, or of the last in the backbone that passes on what is wanted."""
    with torch.no_grad(), listening(detector.network) as calls:
        detector.features(input)
    if options.layer is not None:
        find_layer(detector.network, options.layer)
        calls = [call for call in calls if call.name == options.layer]
    calls = [call for call in calls if any(name in call.sampling for name in wanted)]
    if not calls:
        where = options.layer or "the network"
        raise UserError(f"{where} has no layer that makes {' or '.join(wanted)} out of the image")
    return calls[-1]


def _dynamics(detector: Detector, sample: Sample, objects: Objects, options: Options) -> Tensor:
    """[n, D] of the objects of an image. A layer with one vector for an image sees each object alone, cropped."""
    wanted = ("kernel_offset", "offset", "shares")
    values = dynamics_of(_heard(detector, sample.input, options, wanted))
    boxes = sample.to_input(objects.boxes)
    if values.dim() == 3:
        return object_dynamics(values, boxes, sample.input.shape[2:])
    rows = []
    height, width = sample.input.shape[2:]
    for x1, y1, x2, y2 in boxes.tolist():
        left, top = min(max(int(x1), 0), width - 1), min(max(int(y1), 0), height - 1)
        right, bottom = max(round(x2), left + _SMALLEST_CROP), max(round(y2), top + _SMALLEST_CROP)
        crop = sample.input[:, :, top:bottom, left:right]
        rows.append(dynamics_of(_heard(detector, crop, options, wanted)))
    return torch.stack(rows)


def _layer(detector: Detector, options: Options) -> str:
    return options.layer or default_layer(detector.network, detector.backbone)


def _image(options: Options) -> str:
    if options.image is None:
        raise UserError("which image? Write --image FILE")
    return options.image


def _coco(options: Options) -> list[tuple[str, Objects]]:
    if options.annotations is None or options.images is None:
        raise UserError("which data set? Write --annotations FILE, a COCO file, and --images FOLDER")
    return read_coco(options.annotations, options.images)[: options.limit]


def _read(images, title: str, detector: Detector, options: Options) -> Iterator[tuple[Sample, Objects]]:
    shown = time.monotonic()
    for number, (path, objects) in enumerate(images):
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            options.say(f"{title}: image {number + 1} of {len(images)}")
        yield detector.read(path), objects


def _size(output_size) -> tuple[int, int]:
    return (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)


def _rounded(values) -> list[float]:
    return [round(float(value), 2) for value in values]


def _text(values) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
