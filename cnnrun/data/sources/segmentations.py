"""COCO's segmentations of objects: what is wrong with one, the box around it, and the masks that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnrun.base.errors import escape
from cnnrun.contracts.drawn_masks import DrawnMask, DrawnMasks
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.objects import CROWD
from cnnrun.contracts.source import Masks
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.mask_drawing import read_runs
from cnnrun.data.sources.annotated_images import AnnotatedImage, Box, Corners, is_coordinate


def draw_masks(
    images: Sequence[AnnotatedImage], boxes: Sequence[Sequence[Box]], labels: Sequence[int], origin: str
) -> Masks:
    """The mask of each image, of these boxes' segmentations; `labels` has the class index of each label.

    Crowds are ignored pixels. The segmentations must have been checked.
    """
    masks = []
    for image, image_boxes in zip(images, boxes, strict=True):
        shapes = [(IGNORED if box.role == CROWD else labels[box.label], box.segmentation) for box in image_boxes]
        content = json.dumps({"size": image.size, "shapes": shapes}, separators=(",", ":")).encode()
        masks.append(DrawnMask(escape(f"the mask of {Path(image.path).name} in {image.where}"), content))
    return Masks(DrawnMasks(masks), tuple(range(256)), origin)


def segmentation_problem(segmentation: Any, size: HeightWidth) -> str | None:
    """Reason that a segmentation cannot be drawn into an image of this size, or None."""
    if isinstance(segmentation, dict):
        return _runs_problem(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        return "it has no segmentation; `give: masks` needs polygons or run lengths"
    return next((problem for polygon in segmentation if (problem := _polygon_problem(polygon, size))), None)


def segmentation_corners(segmentation: Any, size: HeightWidth) -> Corners:
    """The corners of the box around a checked segmentation; all 0 if it has no pixel."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation])
        return (*points.min(0).tolist(), *points.max(0).tolist())
    ends = np.cumsum(read_runs(segmentation["counts"]))
    starts, ends = ends[:-1:2], ends[1::2]  # of the runs that are drawn
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return 0.0, 0.0, 0.0, 0.0
    (columns, rows), (last_columns, last_rows) = np.divmod(starts, size[0]), np.divmod(ends - 1, size[0])
    is_whole = (columns != last_columns).any()  # a run over the end of a column
    top, bottom = (0, size[0]) if is_whole else (int(rows.min()), int(last_rows.max()) + 1)
    return float(columns.min()), float(top), float(last_columns.max() + 1), float(bottom)


def _polygon_problem(polygon: Any, size: HeightWidth) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "a polygon of its segmentation is not [x1, y1, x2, y2, x3, y3, ...]"
    if not all(map(is_coordinate, polygon)):
        return "a polygon of its segmentation has something that is not a number of pixels"
    margin = max(size)  # what lies outside is cut off, but so far outside it is a mistake
    for value, side in zip(polygon, [size[1], size[0]] * (len(polygon) // 2), strict=True):
        if not -margin <= value <= side + margin:
            return f"a polygon of its segmentation has {value:g}, far outside the image of {size[1]}x{size[0]}"
    return None


def _runs_problem(segmentation: dict[str, Any], size: HeightWidth) -> str | None:
    if segmentation.get("size") != list(size):
        return f"its segmentation is of size {escape(str(segmentation.get('size')))[:80]}, its image of {list(size)}"
    counts = segmentation.get("counts")
    is_list = isinstance(counts, list) and all(type(count) is int for count in counts)
    try:
        runs = read_runs(counts) if is_list or isinstance(counts, str) else []  # type: ignore[arg-type]
    except ValueError:
        runs = []
    if not runs or min(runs) < 0 or sum(runs) != size[0] * size[1]:
        return "the counts of its segmentation are not run lengths of all pixels"
    return None
