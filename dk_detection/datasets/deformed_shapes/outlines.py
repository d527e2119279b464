"""Outlines: polygons of unit area around the origin, and what deforms them."""

from functools import cache

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import Point, Polygon, box

from dk_detection.datasets.deformed_shapes import CLASSES

GRID = 0.01  # pixels; all outlines lie on this grid, so that rounding an annotation changes nothing


def _unit(polygon: Polygon) -> np.ndarray:
    """Densely sampled outline, moved to its centroid and scaled to unit area. [points, 2]"""
    polygon = affinity.translate(polygon, -polygon.centroid.x, -polygon.centroid.y)
    polygon = affinity.scale(polygon, *[polygon.area**-0.5] * 2, origin=(0, 0))
    return shapely.get_coordinates(polygon.segmentize(0.05))[:-1]


def _circular(radii) -> Polygon:
    """The polygon with these radii at equal angles; the first points up."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return Polygon(np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.asarray(radii)[:, None])


@cache
def category_outline(category: int) -> np.ndarray:
    """The outline of a class, upright, of unit area around the origin. [points, 2]"""
    polygon = {
        "disc": _circular([1] * 64),
        "triangle": _circular([1] * 3),
        "square": box(-1, -1, 1, 1),
        "star": _circular([1, 0.42] * 5),
        "cross": box(-3, -1, 3, 1).union(box(-1, -3, 1, 3)),
        "crescent": Point(0, 0).buffer(1, 32).difference(Point(0.55, 0).buffer(0.8, 32)),
    }[CLASSES[category]]
    return _unit(polygon)


def occluder_outline(rng: np.random.Generator) -> np.ndarray:
    """A bar or a lobed blob. [points, 2]"""
    if rng.random() < 0.6:
        return _unit(box(0, 0, rng.uniform(5, 10), 1))
    angles = np.arange(96) * 2 * np.pi / 96
    waves = [rng.uniform(0.2, 0.35) * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3)]
    return _unit(_circular(1 + sum(waves)))


def rotation(angle: float) -> np.ndarray:
    """The matrix that turns by an angle in radians, clockwise in a picture. [2, 2]"""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def bend(rng: np.random.Generator, outline: np.ndarray, warp: float) -> np.ndarray:
    """Displaces points by a random smooth field: three plane waves, 1.5 to 4 object sizes long.

    Args:
        outline: Points of an outline of unit area. [points, 2]
        warp: Root mean square of the displacement, in object sizes.
    """
    heading = rng.uniform(0, 2 * np.pi, (2, 3))
    frequency = rng.uniform(1 / 4, 1 / 1.5, 3) * np.stack([np.cos(heading[0]), np.sin(heading[0])])  # [2, waves]
    amplitude = warp * (2 / 3) ** 0.5 * np.stack([np.cos(heading[1]), np.sin(heading[1])])  # [2, waves]
    phase = 2 * np.pi * (outline @ frequency + rng.random(3))  # [points, waves]
    return outline + np.sin(phase) @ amplitude.T


def finish(points: np.ndarray, size: float) -> Polygon | None:
    """The polygon with these corners [points, 2], around the origin and on the grid; None where it is not simple.

    Args:
        size: Square root of its area, in pixels.
    """
    polygon = Polygon(points)
    if not polygon.is_valid:
        return None
    polygon = Polygon((points - polygon.centroid.coords[0]) * size / polygon.area**0.5)
    polygon = shapely.set_precision(polygon.simplify(0.03), GRID)
    return polygon if polygon.geom_type == "Polygon" and not polygon.interiors else None


def move(polygon: Polygon, centre: np.ndarray) -> Polygon:
    """Moves a polygon from the origin to a point (x, y), rounded to the grid."""
    return affinity.translate(polygon, *np.round(centre / GRID) * GRID)
