"""Drawing of masks from COCO's segmentations, with the pixels of COCO's own tools."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.drawn_masks import DrawnMask
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.image_settings import MAX_PIXELS, ImageRefusedError


def draw_mask(mask: DrawnMask) -> NDArray[np.uint8]:
    """Draw a mask's shapes: class indices, uint8 [H, W]. Call it within `image_errors`.

    Shapes to ignore lie below all others, and of the others those of fewer pixels lie above.
    """
    content = json.loads(mask.shapes)
    height, width = content["size"]
    if height * width > MAX_PIXELS:
        raise ImageRefusedError(f"{width}x{height} pixels; at most {MAX_PIXELS:,}")
    shapes = [(index, _runs_of(segmentation, (height, width))) for index, segmentation in content["shapes"]]
    pixels = np.zeros(height * width, np.uint8)  # down the columns, as run lengths are
    for class_index, runs in sorted(shapes, key=lambda shape: (shape[0] != IGNORED, -sum(shape[1][1::2]))):
        ends = np.cumsum(runs).tolist()
        for start, end in zip(ends[:-1:2], ends[1::2], strict=False):
            pixels[start:end] = class_index
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def _runs_of(segmentation: Any, size: HeightWidth) -> list[int]:
    """The run lengths of a checked segmentation."""
    if isinstance(segmentation, dict):
        return read_runs(segmentation["counts"])
    from faster_coco_eval.core import mask as coco_mask

    polygons = [list(map(float, polygon)) for polygon in segmentation]
    return read_runs(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))["counts"].decode())


def read_runs(counts: list[int] | str) -> list[int]:
    """The run lengths of an RLE, a list or COCO's text: six bits a character, five of them of a number.

    Runs go down the columns and begin with background. From the third on, a number of the text is the difference from
    the last but one. Raises ValueError for other text.
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
