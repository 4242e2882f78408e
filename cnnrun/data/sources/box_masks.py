"""Segmentations of objects as a mask for each image: which are usable, and the order in which they are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import escape
from cnnrun.contracts.drawn_masks import DrawnMask, DrawnMasks
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.objects import CROWD
from cnnrun.contracts.source import Masks
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.drawn_masks import read_runs
from cnnrun.data.image_settings import MAX_PIXELS
from cnnrun.data.sources.box_lists import AnnotatedImage, Box


def draw_masks(images: Sequence[AnnotatedImage], classes: Sequence[int]) -> Masks:
    """The mask of each image; `classes` has the class index of each label.

    Crowds are ignored pixels below all objects; a smaller object is drawn over a larger one. Raises DataError with a
    line for every object whose segmentation cannot be used.
    """
    problems: list[str] = []
    masks = []
    for image in images:
        for box in image.boxes:
            if problem := _segmentation_problem(box.segmentation, image.size):
                problems.append(escape(f"{image.where}: {box.id}: {problem}"))
        ordered = sorted(image.boxes, key=_area, reverse=True)
        shapes = [(IGNORED if box.role == CROWD else classes[box.label], box.segmentation) for box in ordered]
        content = json.dumps({"size": image.size, "shapes": shapes}, separators=(",", ":")).encode()
        masks.append(DrawnMask(escape(f"the mask of {Path(image.path).name} in {image.where}"), content))
    check_problems(problems)
    return Masks(DrawnMasks(masks), tuple(range(256)))


def _area(box: Box) -> float:
    """The area by which boxes are ordered; that of a crowd, which is below all others, is infinite."""
    if box.role == CROWD:
        return math.inf
    x1, y1, x2, y2 = box.corners
    return box.area if box.area is not None else (x2 - x1) * (y2 - y1)


def _segmentation_problem(segmentation: Any, size: HeightWidth) -> str | None:
    """Reason that a segmentation cannot be drawn into an image of this size, or None."""
    if size[0] * size[1] > MAX_PIXELS:
        return f"its image has {size[1]}x{size[0]} pixels; a mask has at most {MAX_PIXELS:,}"
    if isinstance(segmentation, dict):
        return _runs_problem(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        return "it has no segmentation; `give: masks` needs polygons or run lengths"
    return next((problem for polygon in segmentation if (problem := _polygon_problem(polygon, size))), None)


def _polygon_problem(polygon: Any, size: HeightWidth) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "a polygon of its segmentation is not [x1, y1, x2, y2, x3, y3, ...]"
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in polygon):
        return "a polygon of its segmentation has something that is not a number"
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
