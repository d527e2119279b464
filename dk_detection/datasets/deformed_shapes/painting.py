"""Pictures: surfaces of texture and clutter, cut out along outlines."""

import math
from functools import partial

import cv2
import numpy as np
import shapely
from shapely.geometry import Polygon

from dk_detection.datasets.deformed_shapes.parameters import Difficulty

_SUPERSAMPLING = 8


def paint(rng: np.random.Generator, outlines: list[Polygon], difficulty: Difficulty, image_size: int) -> np.ndarray:
    """A picture of outlines over each other, from the bottom to the top. [size, size, 3], RGB, uint8"""
    palette = _Palette(rng, difficulty, image_size)
    surfaces = [partial(palette.surface, shift=palette.shift(difficulty.contrast)) for _ in outlines]
    image = composite(palette.surface(image_size, image_size), outlines, surfaces)
    image += 2 * rng.standard_normal(image.shape, np.float32)  # the camera's noise
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def composite(image: np.ndarray, outlines: list[Polygon], surfaces) -> np.ndarray:
    """Lays surfaces, cut out along outlines, over an image.

    Args:
        image: What lies below. [size, size, 3], float
        surfaces: For each outline a function of (height, width) that gives its colours. [height, width, 3]
    """
    image = image.copy()
    for outline, surface in zip(outlines, surfaces, strict=True):
        window, coverage = _coverage(outline, len(image))
        image[window] += coverage[..., None] * (surface(*coverage.shape) - image[window])
    return image


def _coverage(outline: Polygon, image_size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the image that an outline touches, and which share of each of its pixels the outline covers."""
    x0, y0, x1, y1 = np.clip(outline.bounds, 0, image_size)
    x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLING, (x1 - x0) * _SUPERSAMPLING), np.uint8)
    fraction_bits = 8
    # OpenCV counts from the centre of the first pixel, COCO from its corner.
    points = (shapely.get_coordinates(outline) - (x0, y0)) * _SUPERSAMPLING - 0.5
    cv2.fillPoly(fine, [np.round(points * 2**fraction_bits).astype(np.int32)], 255, shift=fraction_bits)
    coverage = cv2.resize(fine.astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA) / 255
    return np.s_[y0:y1, x0:x1], coverage


class _Palette:
    """The colours and the texture of one image; background, objects, occluders and clutter share them."""

    def __init__(self, rng: np.random.Generator, difficulty: Difficulty, image_size: int):
        self.rng, self.difficulty, self.image_size = rng, difficulty, image_size
        self.base = rng.uniform(80, 175, 3)
        mixing = rng.normal(0, 0.6, (3, 3)) + [1, 0, 0]  # channels vary mostly together
        self.mixing = mixing / np.linalg.norm(mixing, axis=1, keepdims=True)
        weights = rng.uniform(0.5, 1) ** np.arange(4)
        self.octaves = [(image_size // 2**i, weight) for i, weight in enumerate(weights / np.linalg.norm(weights), 2)]

    def shift(self, contrast: float) -> np.ndarray:
        """A random colour difference of this length, about. [3]"""
        shift = self.rng.normal(size=3)
        shift *= contrast * self.rng.uniform(0.8, 1.2) / np.linalg.norm(shift)
        colour = self.base + shift
        return np.where((colour > 5) & (colour < 250), shift, -shift)  # towards the other side where there is no room

    def surface(self, height: int, width: int, shift=0) -> np.ndarray:
        """Textured and cluttered area whose mean colour differs by `shift` from the background's. [height, width, 3]"""
        texture = np.zeros((height, width, 3), np.float32)
        for wavelength, weight in self.octaves:
            rows, columns = math.ceil(height / wavelength) + 1, math.ceil(width / wavelength) + 1
            noise = self.rng.standard_normal((rows, columns, 3), np.float32)
            noise = cv2.resize(noise, None, fx=wavelength, fy=wavelength, interpolation=cv2.INTER_CUBIC)
            y, x = self.rng.integers(wavelength, size=2)
            texture += weight * noise[y : y + height, x : x + width]
        return self.base + shift + self.difficulty.texture * texture @ self.mixing.T + self._clutter(height, width)

    def _clutter(self, height: int, width: int) -> np.ndarray:
        """Strokes and spots, as differences from the surface that they are on. [height, width, 3]"""
        rng, unit = self.rng, self.image_size / 128
        canvas = np.full((height, width, 3), 128, np.uint8)  # OpenCV draws smooth edges on 8 bits only
        for _ in range(rng.poisson(self.difficulty.clutter * height * width / self.image_size**2)):
            colour = tuple(128 + self.shift(self.difficulty.clutter_contrast))
            start = rng.uniform(0, (width, height))
            if rng.random() < 0.5:
                heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.4, 8))
                steps = rng.uniform(1, 5) * unit * np.stack([np.cos(heading), np.sin(heading)], axis=1)
                points = np.round((start + np.cumsum(steps, axis=0)) * 16).astype(np.int32)
                thickness = max(1, round(rng.uniform(1, 3) * unit))
                cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA, shift=4)
            else:
                axes = rng.uniform(1, 4, 2) * unit
                centre, axes = (tuple(int(v) for v in np.round(a * 16)) for a in (start, axes))
                cv2.ellipse(canvas, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA, shift=4)
        return canvas.astype(np.float32) - 128
