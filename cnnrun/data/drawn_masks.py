"""Drawing of masks from COCO's segmentations, to the same pixels as COCO's own tools."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.drawn_masks import DrawnMask
from cnnrun.contracts.layer import HeightWidth


def draw_mask(mask: DrawnMask) -> NDArray[np.uint8]:
    """Draw a mask's shapes, each over those before it: class indices, uint8 [H, W]."""
    content = json.loads(mask.shapes)
    height, width = content["size"]
    classes_HW = np.zeros((height, width), np.uint8)
    for class_index, segmentation in content["shapes"]:
        classes_HW[_rasterize(segmentation, (height, width))] = class_index
    return classes_HW


def _rasterize(segmentation: Any, size: HeightWidth) -> NDArray[np.bool_]:
    """The pixels of a checked segmentation: bool [H, W]."""
    if isinstance(segmentation, dict):
        return draw_runs(read_runs(segmentation["counts"]), size)
    from faster_coco_eval.core import mask as coco_mask

    polygons = [list(map(float, polygon)) for polygon in segmentation]
    drawn_HW: NDArray[Any] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))
    return drawn_HW.astype(np.bool_)


def draw_runs(runs: list[int], size: HeightWidth) -> NDArray[np.bool_]:
    """The pixels of run lengths, which go down the columns and begin with background: bool [H, W]."""
    is_drawn: NDArray[np.bool_] = (np.arange(len(runs)) % 2 == 1).repeat(runs)
    return is_drawn.reshape(size[1], size[0]).T


def read_runs(counts: list[int] | str) -> list[int]:
    """The run lengths of an RLE, a list or COCO's text: six bits a character, five of them of a number.

    From the third on, a number of the text is the difference from the last but one. Raises ValueError for other text.
    """
    if not isinstance(counts, str):
        return counts
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("not the text of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            if bits & 16:  # a negative number
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the text of run lengths is cut")
    return runs
