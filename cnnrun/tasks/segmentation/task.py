"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape, require_feature_maps
from cnnrun.contracts.prediction import Overlay, Prediction
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN, TargetKind
from cnnrun.contracts.task import Requirements, Task, TaskSpec
from cnnrun.contracts.task_parts import Criterion, Direction, Learning, Measuring, Predicting, Showing, Targets
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.segmentation.network import SegmentationCriterion, SegmentationDecoder, SegmentationHead
from cnnrun.tasks.segmentation.overlaps import Overlaps, count_pixels

_TOLERANCE = 1e-4  # of an exported file's confidence
_CLEAR_CONFIDENCE = 0.5 + 1e-3  # a class of at least this confidence is the most probable one beyond rounding
_MAX_DIFFERING_SHARE = 0.01  # of an image's pixels: as many as may change class because two are equally probable
_MIN_SHARE = 0.005  # of an image's pixels: classes with less are left out of its text


class SegmentMeter:
    """Meter of mean IoU, mean Dice, pixel accuracy, the overlaps of each class, and the confusion matrix of pixels."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes, self._batches, self._confusion_KK = classes, BatchTensors(), torch.zeros((), dtype=torch.int64)

    def update(self, results: Results, targets: Targets) -> None:
        counts_B3K, confusion_KK = count_pixels(results["mask"], targets["masks"], len(self._classes))
        self._batches.add(counts=counts_B3K)
        self._confusion_KK = self._confusion_KK.to(confusion_KK.device) + confusion_KK

    def compute(self, tables: bool = True) -> Measurement:
        overlaps = Overlaps(self._batches.concatenate()["counts"].astype(np.float64))
        metrics, matrices = overlaps.metrics(), {"confusion": self._confusion_KK.tolist()}
        if not tables:
            return Measurement(metrics, matrices=matrices)
        return Measurement(
            metrics,
            {"per_class": overlaps.per_class_rows(self._classes)},
            matrices,
            bootstrap_draws=bootstrap(overlaps.metrics, len(overlaps)),
        )


def pixel_shares(mask: NDArray[np.uint8], classes: Sequence[str]) -> dict[str, float]:
    """The share of an image's pixels that each of its classes has, the largest first; pixels to ignore do not count."""
    counts = np.bincount(mask[mask != IGNORED].ravel(), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    return {classes[k]: float(counts[k] / counts.sum()) for k in order.tolist() if counts[k]}


def _describe_shares(shares: dict[str, float]) -> str:
    shown = [f"{name} {share:.0%}" for name, share in shares.items() if share >= _MIN_SHARE]
    return ", ".join(shown) or "nothing"


@dataclass(frozen=True)
class SegmentPrediction(Prediction):
    """The class of each pixel of the network's input, and the mapping from the original image to that input."""

    mask: NDArray[np.uint8]
    view: View
    classes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        height, width = self.view.size
        return {"height": height, "width": width, "shares": self._shares()}

    def to_text(self) -> str:
        return _describe_shares(self._shares())

    def csv_columns(self) -> list[str]:
        return [f"share {name}" for name in self.classes]

    def csv_rows(self) -> list[list[Any]]:
        shares = self._shares()
        return [[shares.get(name, 0.0) for name in self.classes]]

    def overlay(self) -> Overlay:
        return Overlay(class_map=self.class_map())

    def class_map(self) -> NDArray[np.uint8]:
        """The class of each pixel of the original image; `IGNORED` where the network did not see it."""
        rows, is_row = _source_indices(self.view.size[0], self.view.scale_y, self.view.top, self.mask.shape[0])
        columns, is_column = _source_indices(self.view.size[1], self.view.scale_x, self.view.left, self.mask.shape[1])
        return np.where(is_row[:, None] & is_column, self.mask[rows][:, columns], IGNORED).astype(np.uint8)

    def _shares(self) -> dict[str, float]:
        return pixel_shares(self.class_map(), self.classes)


def _source_indices(size: int, scale: float, offset: float, side: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The pixel of the network's input nearest to each of `size` original pixels, and whether it lies in the input."""
    positions = np.floor((np.arange(size) + 0.5) * scale + offset).astype(np.int64)
    return positions.clip(0, side - 1), (positions >= 0) & (positions < side)


class Segment(TaskSpec):
    """A class for every pixel: 1x1 convolution and upsampling over feature maps, cross-entropy and Dice loss."""

    kind = "segment"
    main = "level"
    target_kind = TargetKind.MASKS

    level: str | None = None
    """Name of the layer whose feature maps are classified, such as `merged1` of the zoo's unet; by default the last \
layer."""
    dice_weight: float = Field(1.0, ge=0)
    """Weight of the Dice loss; that of cross-entropy is 1."""

    def requirements(self) -> Requirements:
        return Requirements(feature_layers=[self.level] if self.level else [])

    def metrics(self) -> dict[str, Direction]:
        return {"mean_iou": "max", "mean_dice": "max", "pixel_accuracy": "max"}

    def check_data(self, facts: DataFacts) -> None:
        if not 2 <= len(facts.classes) < UNKNOWN:
            raise DataError(f"task: segment needs 2 to {UNKNOWN - 1} classes; the data has {len(facts.classes)}")

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self, facts, SegmentLearning(self, facts), SegmentMeasuring(facts), SegmentPredicting(facts),
            SegmentShowing(facts),
        )  # fmt: skip


@dataclass(frozen=True)
class SegmentLearning(Learning):
    """A convolution to one map per class, and the loss of its pixels."""

    spec: Segment
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        (in_shape,) = in_shapes
        channels = require_feature_maps("its convolution", in_shape)[0]
        return SegmentationHead(channels, len(self.facts.classes), list(self.facts.image_shape[1:]))

    def build_criterion(self) -> Criterion:
        return SegmentationCriterion(self.spec.dice_weight)


@dataclass(frozen=True)
class SegmentMeasuring(Measuring):
    """Overlap of predicted and true masks."""

    facts: DataFacts

    def build_meter(self, choices: Choices) -> SegmentMeter:
        return SegmentMeter(self.facts.classes)

    def comparison_key(self) -> list[Any]:
        return list(self.facts.classes)


@dataclass(frozen=True)
class SegmentPredicting(Predicting):
    """The class of each pixel."""

    has_overlays = True
    has_class_maps = True

    facts: DataFacts

    def build_decoder(self, choices: Choices) -> SegmentationDecoder:
        return SegmentationDecoder()

    def result_shapes(self) -> dict[str, Shape]:
        height_width = self.facts.image_shape[1:]
        return {"mask": height_width, "confidence": height_width}

    def metadata(self, choices: Choices) -> dict[str, Any]:
        return {
            "mask": "the index into `classes` of each pixel of the input",
            "confidence": "the probability of that class",
        }

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[SegmentPrediction]:
        masks = results["mask"].cpu().numpy()
        return [SegmentPrediction(mask, view, self.facts.classes) for mask, view in zip(masks, views, strict=True)]

    def largest_difference(self, expected: Results, actual: Results) -> float:
        """The largest difference of a pixel's confidence."""
        return float((expected["confidence"] - actual["confidence"]).abs().max())

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        gap = self.largest_difference(expected, actual)
        if not gap <= _TOLERANCE:
            return f"confidences differ by up to {gap:.2e} (allowed {_TOLERANCE:g})"
        differs_BHW = expected["mask"] != actual["mask"]
        is_clear_BHW = torch.minimum(expected["confidence"], actual["confidence"]) > _CLEAR_CONFIDENCE
        if count := int((is_clear_BHW & differs_BHW).sum()):
            pixels = format_count(count, "pixel has", "pixels have")
            return f"{pixels} another class, although both confidences are above 0.5"
        share = float(differs_BHW.float().mean((1, 2)).max())
        return f"{share:.1%} of an image's pixels have another class" if share > _MAX_DIFFERING_SHARE else None


@dataclass(frozen=True)
class SegmentShowing(Showing):
    """Shares of the classes in words, and masks to draw."""

    has_overlays = True

    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        masks = targets["masks"].cpu().numpy()
        return [_describe_shares(pixel_shares(mask, self.facts.classes)) for mask in masks]

    def target_overlays(self, targets: Targets) -> list[Overlay]:
        return [Overlay(class_map=mask) for mask in targets["masks"].cpu().numpy()]

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        """Mean logit of each class over all pixels."""
        raw_BK, shown_BK = outputs.mean((2, 3)), outputs.softmax(1).mean((2, 3))
        return ClassScores(self.facts.classes, raw_BK, shown_BK, "mean probability", shown_BK.argmax(1))
