"""Draws what the other modules see, with matplotlib. Coordinates are those of the image, its first pixel [0, 1]."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dk_detection.errors import UserError
from dk_detection.visualization.detectors import Objects
from dk_detection.visualization.locations import Locations

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, hsv_to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise UserError(
        f"pictures need matplotlib ({error}): pip install --no-build-isolation -e '.[visualization]'"
    ) from error

PANEL = 2.6  # inches, the longer side of an image in a picture
_DPI = 110
_RED, _GREEN = "#ff2d2d", "#35ff4e"
_PALETTE = ("#ff595e", "#36a2ff", "#3ddc84", "#ffb400", "#c77dff", "#19d3e0", "#ff8fab", "#b5e853")


def new_figure(
    rows: int, columns: int, shape: tuple[int, int], titles: Sequence[str] = ()
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns images of one shape (height, width), titles above the columns, and its axes."""
    height, width = (PANEL * side / max(shape) for side in shape)
    top = 0.28 if any(titles) else 0.06
    size = columns * (width + 0.06) + 0.06, rows * (height + 0.3) + top
    figure = Figure(figsize=size, dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.06 / size[0],
        right=1 - 0.06 / size[0],
        bottom=0.28 / size[1],
        top=1 - top / size[1],
        wspace=0.04,
        hspace=0.12,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8 if len(title) < 36 else 5.5, pad=3)
    return figure, axes


def to_array(figure: Figure) -> np.ndarray:
    """The picture, [H, W, 3], RGB, uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def caption(axes: Axes, text: str) -> None:
    """A line below an image."""
    axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=7)


def draw_image(axes: Axes, image: np.ndarray, *, fade: float = 0.0) -> None:
    """An image, faded towards grey."""
    shown = image.astype(np.float32)
    if fade:
        grey = shown.mean(2, keepdims=True)
        shown = grey * fade + shown * (1 - fade)
    height, width = image.shape[:2]
    axes.imshow(shown.astype(np.uint8), extent=(0, width, height, 0), interpolation="bicubic")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_node(axes: Axes, center: Sequence[float]) -> None:
    """The place that is asked about."""
    axes.plot(*center, "o", color=_GREEN, markersize=5, markeredgecolor="black", markeredgewidth=0.7, zorder=5)


def draw_box(axes: Axes, box: Sequence[float], color: str = _GREEN) -> None:
    """The box that is asked about."""
    x1, y1, x2, y2 = map(float, box)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.2, zorder=4))


def draw_locations(axes: Axes, locations: Locations, points: Tensor, center: Sequence[float]) -> None:
    """Sampling locations, larger and more opaque where they weigh more, and their node.

    Args:
        axes: With the image.
        locations: Of the node.
        points: [P, 2], the locations in the image that is drawn.
        center: The node's place in it.
    """
    share = _relative(locations.weights.numpy())
    order = share.argsort()  # the weightiest on top
    share, places = share[order], points.numpy()[order]
    size = max(26 / math.sqrt(len(places) / 9), 7) if len(places) > 9 else 26
    axes.scatter(*places.T, s=size * (0.15 + 0.85 * share), color=_RED, alpha=0.3 + 0.7 * share, linewidths=0, zorder=3)
    draw_node(axes, center)


def draw_field(axes: Axes, image: np.ndarray, values: Tensor) -> None:
    """An effective receptive field over its image; the brighter, the more; drawn are square roots."""
    height, width = image.shape[:2]
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    grey = 0.75 * image.astype(np.float32).mean(2, keepdims=True).repeat(3, 2) / 255
    field = values.detach().float().cpu().numpy()
    limit = np.quantile(field, 0.999)
    if not limit > 0:
        limit = field.max()
    if not limit > 0:
        axes.imshow(grey, extent=(0, width, height, 0))
        caption(axes, "flat: nothing sways the response")
        return
    share = np.sqrt(np.clip(field / limit, 0, 1))
    axes.imshow(grey, extent=(0, width, height, 0), interpolation="bicubic")
    rgba = ScalarMappable(Normalize(0, 1), "inferno").to_rgba(0.25 + 0.75 * share)
    rgba[..., 3] = share
    axes.imshow(rgba, extent=(0, width, height, 0), interpolation="bilinear")


def draw_region(axes: Axes, image: np.ndarray, mask: Tensor) -> None:
    """The part of an image that is enough; the rest is darkened."""
    seen = mask.cpu().numpy()
    height, width = image.shape[:2]
    rows = (np.arange(height) * seen.shape[0] // height)[:, None]
    columns = np.arange(width) * seen.shape[1] // width
    shown = np.where(seen[rows, columns][..., None], image, (0.25 * image).astype(np.uint8))
    axes.imshow(shown, extent=(0, width, height, 0))
    if seen.any() and not seen.all():
        axes.contour(
            (np.arange(seen.shape[1]) + 0.5) * width / seen.shape[1],
            (np.arange(seen.shape[0]) + 0.5) * height / seen.shape[0],
            seen.astype(np.float32),
            levels=[0.5],
            colors=[_RED],
            linewidths=0.8,
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_bins(axes: Axes, middles: Tensor, size: Tensor, weights: Tensor | None = None) -> None:
    """Bins of one RoI, more opaque where they weigh more.

    Args:
        axes: With the image.
        middles: [..., 2] = (x, y).
        size: [2] = (width, height) of a bin.
        weights: [...], at least 0.
    """
    places = middles.reshape(-1, 2).numpy()
    share = np.ones(len(places)) if weights is None else _relative(weights.reshape(-1).numpy())
    width, height = size.tolist()
    for (x, y), alpha in zip(places, share, strict=True):
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(Rectangle(corner, width, height, color=_RED, alpha=0.45 * alpha, linewidth=0, zorder=2))
        axes.add_patch(
            Rectangle(corner, width, height, fill=False, color=_RED, alpha=0.15 + 0.6 * alpha, linewidth=0.6)
        )
    axes.scatter(*places.T, s=3, color="white", linewidths=0, zorder=3)


def draw_objects(axes: Axes, objects: Objects) -> None:
    """Boxes, masks, classes and scores."""
    height, width = axes.get_ylim()[0], axes.get_xlim()[1]
    colors = {label: _PALETTE[i % len(_PALETTE)] for i, label in enumerate(sorted(set(objects.labels)))}
    order = range(len(objects.labels)) if objects.scores is None else objects.scores.argsort().tolist()
    for i in order:  # the surest on top
        label = objects.labels[i]
        color = colors[label]
        if objects.masks is not None:
            mask = objects.masks[i].cpu().numpy()
            rgb = tuple(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
            axes.imshow(
                np.dstack([*(np.full(mask.shape, value) for value in rgb), 0.45 * mask]), extent=(0, width, height, 0)
            )
        x1, y1, *_ = box = objects.boxes[i].tolist()
        draw_box(axes, box, color)
        text = label if objects.scores is None else f"{label} {objects.scores[i]:.2f}"
        axes.text(
            max(x1, 0), max(y1, 0), text, fontsize=5.5, va="bottom" if y1 > 0.08 * height else "top", zorder=6,
            bbox=dict(facecolor=color, edgecolor="none", pad=0.6, alpha=0.85), clip_on=True,
        )  # fmt: skip
    if not objects.labels:
        caption(axes, "no objects")


def kernel_figure(positions: dict[str, np.ndarray], scopes: dict[str, tuple[int, int]]) -> Figure:
    """Where taps sample in the scope of their kernel.

    Args:
        positions: By title, [taps, 2, positions] = (row, column).
        scopes: By title, (vertical, horizontal) cells.
    """
    figure, axes = new_figure(1, len(positions), (1, 1), list(positions))
    for axis, (title, places) in zip(axes[0], positions.items(), strict=True):
        rows, columns = scopes[title]
        for y in range(rows):
            for x in range(columns):
                shade = "#e8edf3" if (x + y) % 2 else "#f7f9fb"
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="#9aa7b5", linewidth=0.6))
        for tap, (ys, xs) in enumerate(places):
            axis.scatter(xs, ys, s=5, color=_PALETTE[tap % len(_PALETTE)], alpha=0.5, linewidths=0, zorder=2)
            axis.plot(xs.mean(), ys.mean(), "o", color="black", markersize=3, zorder=3)
        axis.set_xlim(-0.6, columns - 0.4)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.set_aspect("equal")
        caption(axis, f"scope {rows}x{columns}; a colour a tap, black its mean")
    return figure


def shapes_figure(taps: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Learned kernel shapes: above each layer's mean over channels, below the taps of up to 64 of its channels.

    Args:
        taps: By title and layer, [sets, kH * kW, 2] = (row, column) in pixels from the middle of the kernel.
    """
    columns = max(map(len, taps.values()))
    titles = list(taps) if len(taps) > 1 else []
    figure, axes = new_figure(2 * len(taps), columns, (1, 1), [" "] if titles else [])  # with room for titles
    for title, axis in zip(titles, axes[::2, 0], strict=False):
        axis.set_title(title, fontsize=7, pad=3, loc="left")
    for (upper, lower), layers in zip(axes.reshape(-1, 2, columns), taps.values(), strict=True):
        reach = max(float(np.quantile(np.abs(places), 0.99)) for places in layers.values()) + 0.5
        for above, below, (name, places) in zip(upper, lower, layers.items(), strict=False):
            sampled = places[np.linspace(0, len(places) - 1, min(64, len(places))).round().astype(int)]
            for axis, shown in ((above, places.mean(0, keepdims=True)), (below, sampled)):
                axis.axhline(0, color="#d5dce4", linewidth=0.6)
                axis.axvline(0, color="#d5dce4", linewidth=0.6)
                size = 14 if len(shown) == 1 else 4
                for tap in range(places.shape[1]):
                    rows, xs = shown[:, tap].T
                    axis.scatter(xs, rows, s=size, color=_PALETTE[tap % len(_PALETTE)], linewidths=0)
                axis.set_xlim(-reach, reach)
                axis.set_ylim(reach, -reach)
                axis.set_aspect("equal")
            caption(above, name.rpartition("backbone.")[2])
            caption(below, f"{np.sqrt((places**2).sum(-1).mean()):.2f} pixels from the middle")
    return figure


def offsets_figure(image: np.ndarray, offsets: np.ndarray, kernel_size: tuple[int, int], title: str) -> Figure:
    """A layer's offsets as fields, one for each tap, laid out as the taps are.

    The hue is the direction, the saturation the length; arrows show the same, enlarged where they are short.

    Args:
        image: [H, W, 3], what the field lies over.
        offsets: [kH * kW, 2, outH, outW] = (dy, dx).
        kernel_size: (kH, kW).
        title: A line on top.
    """
    figure, axes = new_figure(*kernel_size, image.shape[:2], ["", title][: kernel_size[1]])
    height, width = image.shape[:2]
    lengths = np.hypot(offsets[:, 0], offsets[:, 1])
    limit = max(float(np.quantile(lengths, 0.98)), 1e-12)
    rows, columns = offsets.shape[2:]
    step = max(1, round(max(rows, columns) / 12))
    ys = (np.arange(0, rows, step) + 0.5) * height / rows
    xs = (np.arange(0, columns, step) + 0.5) * width / columns
    grey = image.astype(np.float32).mean(2) / 255
    for axis, (dy, dx), length in zip(axes.flat, offsets, lengths, strict=True):
        hue = (np.arctan2(dy, dx) / (2 * np.pi)) % 1
        color = hsv_to_rgb(np.dstack([hue, np.clip(length / limit, 0, 1), np.ones_like(hue)]))
        axis.imshow(color, extent=(0, width, height, 0), interpolation="nearest")
        axis.imshow(grey, cmap="gray", alpha=0.25, extent=(0, width, height, 0), interpolation="bicubic")
        axis.quiver(
            xs, ys, dx[::step, ::step], dy[::step, ::step], angles="xy", scale_units="xy",
            scale=limit / (step * width / columns), width=0.006, color="black",
        )  # fmt: skip
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        caption(axis, f"root mean square {np.sqrt((length**2).mean()):.2f}")
    return figure


def dilation_figure(tables: dict[str, dict], classes: Sequence[str]) -> Figure:
    """Effective dilation of each layer by size: means as bars, deviations as whiskers."""
    most = max(map(len, tables.values()))
    figure = Figure(figsize=(1.2 + max(0.75 * most, 3), 2.2 * len(tables) + 0.3), dpi=_DPI)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    colors = ("#9ad0f5", "#36a2ff", "#0b4f9e", "#b8b8b8")
    for axis, (title, table) in zip(all_axes, tables.items(), strict=True):
        for number, name in enumerate(classes):
            cells = [(at, row[name]) for at, row in enumerate(table.values()) if name in row]
            axis.bar(
                [at + (number - 1.5) * 0.2 for at, _ in cells], [cell["mean"] for _, cell in cells], 0.18,
                yerr=[cell["std"] for _, cell in cells], color=colors[number], label=name,
                error_kw=dict(lw=0.6, ecolor="#444444"),
            )  # fmt: skip
        names = [layer.rpartition("backbone.")[2] for layer in table]
        axis.set_xticks(range(len(names)), names, fontsize=6, rotation=30, ha="right")
        axis.tick_params(axis="y", labelsize=6)
        axis.set_ylabel("effective dilation", fontsize=7)
        axis.set_title(title, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    all_axes[0].legend(fontsize=6, ncols=4, frameon=False, loc="upper right")
    figure.tight_layout()
    return figure


def dynamics_figure(points: dict[str, np.ndarray], labels: list[str], deciles: np.ndarray, notes: dict[str, list[str]]):
    """t-SNE of learned dynamics: on the left coloured by class, on the right by decile of size.

    Args:
        points: By title, [n, 2].
        labels: n classes.
        deciles: [n], 0 to 9.
        notes: By title, a line below each of the two.
    """
    figure, axes = new_figure(len(points), 2, (1, 1), ["by class", "by size, large ones light"])
    names = sorted(set(labels))
    for row, (title, places) in zip(axes, points.items(), strict=True):
        for number, name in enumerate(names):
            chosen = np.array([label == name for label in labels])
            row[0].scatter(*places[chosen].T, s=5, color=_PALETTE[number % len(_PALETTE)], label=name, linewidths=0)
        row[1].scatter(*places.T, s=5, c=deciles, cmap="viridis", vmin=0, vmax=9, linewidths=0)
        if len(names) <= len(_PALETTE):
            row[0].legend(fontsize=5, loc="best", handletextpad=0, borderpad=0.3, edgecolor="none", framealpha=0.9)
        for axis, note in zip(row, notes[title], strict=True):
            caption(axis, note)
        row[0].text(-0.01, 0.5, title, transform=row[0].transAxes, rotation=90, va="center", ha="right", fontsize=5.5)
    figure.subplots_adjust(left=0.05)
    return figure


def _relative(weights: np.ndarray) -> np.ndarray:
    largest = weights.max(initial=0)
    return weights / largest if largest > 0 else np.ones_like(weights)
