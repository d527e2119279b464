"""COCO annotations: the visible regions of objects, as polygons that are computed, not traced."""

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from dk_detection.datasets.deformed_shapes.layout import Layer, area_of


def annotate(layers: list[Layer]) -> list[dict]:
    """COCO annotations of the objects among the layers, without the ids of image and annotation."""
    annotations = []
    for layer in layers:
        if layer.category is None:
            continue
        segmentation = _segmentation(layer.visible)
        region = MultiPolygon([Polygon(np.reshape(polygon, (-1, 2))) for polygon in segmentation])
        x0, y0, x1, y1 = region.bounds
        annotations.append(
            {
                "category_id": layer.category + 1,
                "segmentation": segmentation,
                "area": round(region.area, 4),
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "iscrowd": 0,
            }
        )
    return annotations


def _segmentation(visible: MultiPolygon) -> list[list[float]]:
    """COCO polygons [x0, y0, x1, y1, ...] of a region. They cannot have holes, so that a cut goes through each hole."""
    polygons, todo = [], list(visible.geoms)
    while todo:
        polygon = todo.pop(0)
        if polygon.interiors:
            x0, y0, x1, y1 = polygon.bounds
            hole = polygon.interiors[0].bounds
            cut = (hole[0] + hole[2]) / 2
            for half in (box(x0, y0, cut, y1), box(cut, y0, x1, y1)):
                todo += area_of(polygon.intersection(half)).geoms
        elif polygon.area >= 0.5:  # slivers below half a pixel cannot be seen
            polygons.append(np.round(shapely.get_coordinates(polygon)[:-1], 2).ravel().tolist())
    return polygons
