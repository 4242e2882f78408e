"""Image files with the annotated objects that they show, as the sources of boxes read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.objects import OBJECT

_MAX_NUMBER = 1e12  # of a coordinate or an area

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2


def is_coordinate(value: Any) -> bool:
    """Return whether a value of a JSON file can be a coordinate or an area in pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


@dataclass(frozen=True)
class Box:
    """An annotated box: x1, y1, x2, y2 in pixels; `role` as in `contracts.objects`; `id` names it in its file.

    `segmentation` is that of COCO, polygons in pixels or run lengths, where masks are asked for.
    """

    corners: Corners
    label: int
    role: int = OBJECT
    id: str = ""
    area: float | None = None
    segmentation: Any = None


@dataclass
class AnnotatedImage:
    """An image file with its boxes; `where` names the annotation file."""

    path: str
    size: HeightWidth
    where: str
    boxes: list[Box] = field(default_factory=list)
