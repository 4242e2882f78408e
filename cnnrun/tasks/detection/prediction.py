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

    def to_captioned_box(self) -> CaptionedBox:
        return CaptionedBox(self.box, f"{self.label} {self.score:.2f}", self.label_index)

    def to_coco(self) -> dict[str, Any]:
        return {"category_id": self.category_id, "score": self.score, "bbox": self.bbox}


@dataclass(frozen=True)
class DetectPrediction(Prediction):
    """The objects of an image, by falling score, and its height and width."""

    objects: Sequence[DetectedObject]
    height: int
    width: int

    def to_json(self) -> dict[str, Any]:
        objects = [{"label": detected.label, **detected.to_coco()} for detected in self.objects]
        return {"height": self.height, "width": self.width, "objects": objects}

    def to_text(self) -> str:
        return "  ".join(detected.to_text() for detected in self.objects) or "nothing"

    def answer(self) -> tuple[str, ...]:
        return tuple(sorted(detected.label for detected in self.objects))

    def csv_columns(self) -> list[str]:
        return ["label", "score", "x", "y", "width", "height"]

    def csv_rows(self) -> list[list[Any]]:
        return [[detected.label, detected.score, *detected.bbox] for detected in self.objects] or [[]]

    def overlay(self) -> Overlay:
        return Overlay([detected.to_captioned_box() for detected in self.objects])

    def coco_results(self) -> list[dict[str, Any]]:
        return [detected.to_coco() for detected in self.objects]
