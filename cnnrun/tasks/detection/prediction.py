"""The prediction of detection: the objects of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cnnrun.contracts.prediction import CaptionedBox, Overlay, Prediction


@dataclass(frozen=True)
class DetectedObject:
    """An object: its class's name, index and id in the data's files, its score, and its box (x1, y1, x2, y2)."""

    label: str
    label_index: int
    category_id: int
    score: float
    box: tuple[float, float, float, float]

    @property
    def bbox(self) -> list[float]:
        """The box as COCO writes it: x, y, width, height."""
        x1, y1, x2, y2 = self.box
        return [x1, y1, x2 - x1, y2 - y1]

    def to_text(self) -> str:
        x, y, width, height = self.bbox
        return f"{self.label} {self.score:.2f} at {x:.0f},{y:.0f} {width:.0f}x{height:.0f}"


@dataclass(frozen=True)
class DetectPrediction(Prediction):
    """The objects of an image, by falling score, and its height and width."""

    objects: Sequence[DetectedObject]
    height: int
    width: int

    def to_json(self) -> dict[str, Any]:
        objects = [
            {"label": found.label, "category_id": found.category_id, "score": found.score, "bbox": found.bbox}
            for found in self.objects
        ]
        return {"height": self.height, "width": self.width, "objects": objects}

    def to_text(self) -> str:
        return "  ".join(found.to_text() for found in self.objects) or "nothing"

    def answer(self) -> tuple[str, ...]:
        return tuple(sorted(detected.label for detected in self.objects))

    def csv_columns(self) -> list[str]:
        return ["label", "score", "x", "y", "width", "height"]

    def csv_rows(self) -> list[list[Any]]:
        return [[found.label, found.score, *found.bbox] for found in self.objects] or [[]]

    def overlay(self) -> Overlay:
        return Overlay(
            [CaptionedBox(found.box, f"{found.label} {found.score:.2f}", found.label_index) for found in self.objects]
        )

    def coco_results(self) -> list[dict[str, Any]]:
        return [{"category_id": found.category_id, "bbox": found.bbox, "score": found.score} for found in self.objects]
