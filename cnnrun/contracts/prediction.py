"""A network's prediction for one image, and what can be drawn of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CaptionedBox:
    """A box to draw: its corners (x1, y1, x2, y2) in pixels, its text, and the index of its colour."""

    box: tuple[float, float, float, float]
    text: str
    colour: int


@dataclass(frozen=True)
class Overlay:
    """Drawing to lay over an image: boxes, and a class for each pixel, uint8 [H, W]; `IGNORED` is not painted."""

    boxes: Sequence[CaptionedBox] = ()
    class_map: NDArray[np.uint8] | None = None

    def without_text(self) -> Overlay:
        """Return the overlay without the texts of its boxes."""
        return replace(self, boxes=[replace(box, text="") for box in self.boxes])


class Prediction:
    """The prediction for one image, in coordinates of the original image, for people, JSON, CSV and drawings."""

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as plain data for JSON."""
        raise NotImplementedError

    def to_text(self) -> str:
        """Describe the prediction in one line."""
        raise NotImplementedError

    def answer(self) -> Hashable:
        """Return what is predicted, without its scores, such as the class; None if a prediction is only numbers."""
        return None

    def csv_columns(self) -> list[str]:
        """Names of the CSV columns, equal for all predictions of a network."""
        raise NotImplementedError

    def csv_rows(self) -> list[list[Any]]:
        """Rows of the CSV file, with cells under `csv_columns`; missing cells at the end of a row are left empty."""
        raise NotImplementedError

    def overlay(self) -> Overlay | None:
        """Overlay to draw onto the image, or None."""
        return None

    def class_map(self) -> NDArray[np.uint8] | None:
        """A class index for each pixel of the original image, uint8 [H, W], or None."""
        return None

    def coco_results(self) -> list[dict[str, Any]]:
        """The objects in COCO's results format, without the image's id."""
        return []
