"""Object detection: any number of boxes with labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from cnnrun.base.boxes import box_areas, intersection_over_union
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape, ShapeError, require_feature_maps
from cnnrun.contracts.objects import CROWD, DIFFICULT, OBJECT
from cnnrun.contracts.prediction import CaptionedBox, Overlay
from cnnrun.contracts.results import ClassScores, Results, View
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import Requirements, Task, TaskSpec
from cnnrun.contracts.task_parts import (
    AssignedCell,
    CellAssignment,
    Criterion,
    Direction,
    FeatureLevel,
    Learning,
    Measuring,
    Predicting,
    Showing,
    Targets,
)
from cnnrun.tasks.detection.assignment import AssignmentSettings, batch_objects
from cnnrun.tasks.detection.average_precision import COCO_METRICS, undefined_coco_metrics, undo_view
from cnnrun.tasks.detection.box_losses import BoxLoss
from cnnrun.tasks.detection.criterion import DetectionCriterion, DetectionLoss
from cnnrun.tasks.detection.head import FIRST_LOGIT, DenseHead, DetectionDecoder, cell_stride
from cnnrun.tasks.detection.meter import DetectMeter
from cnnrun.tasks.detection.prediction import DetectedObject, DetectPrediction

Score = Annotated[float, Field(ge=0, lt=1)]
_DEFAULT_SCORE = 0.3  # of classes for which `score` gives none
_CANDIDATES_PER_BOX = 6  # candidates for non-maximum suppression, for each of the `most` boxes that it may keep
_SCORE_TOLERANCE = 1e-4  # of an exported file
_CLEAR_SCORE = 1e-3  # boxes of a lower score may change places with boxes that are cut off


class Detect(TaskSpec):
    """Boxes with labels: an anchor-free head on one or more levels, task-aligned assignment, NMS in the graph."""

    kind = "detect"
    main = "levels"
    target_kind = TargetKind.BOXES

    levels: list[str] = []
    """Names of the layers whose cells detect objects; by default the last layer alone."""
    channels: int = Field(64, ge=1, le=4096)
    """Channels of the towers' convolutions."""
    depth: int = Field(2, ge=0, le=16)
    """Number of convolutions in each of the two towers."""
    towers: Literal["shared", "separate"] = "shared"
    """`shared`: all levels use the same convolutions, with their own batch norms; `separate`: they use their own."""
    depthwise: bool = False
    """Use depthwise and 1x1 convolutions in the towers."""
    box_loss: BoxLoss = "ciou"
    """The overlap loss of the boxes: complete, distance or generalized IoU."""
    box_weight: float = Field(2.0, gt=0)
    """Weight of the loss of the boxes; that of the scores has weight 1."""
    gamma: float = Field(2.0, ge=0)
    """Exponent of the scores' loss (quality focal loss, Li et al. 2020); 0 is cross-entropy, slower at first."""
    top_k: int = Field(13, ge=1)
    """Maximum number of cells that learn an object."""
    alpha: float = Field(1.0, ge=0)
    """Exponent of the score in the assignment."""
    beta: float = Field(6.0, ge=0)
    """Exponent of the overlap in the assignment."""
    nms: float = Field(0.6, ge=0, le=1)
    """If two boxes of a class overlap by more than this (IoU), the one of the lower score is removed."""
    most: int = Field(100, ge=1, le=10_000)
    """Maximum number of boxes per image; COCO measures 100."""
    least_score: float = Field(0.001, ge=0, lt=1)
    """Boxes whose score is not above this are left out of the results."""
    score: Score | dict[str, Score] = _DEFAULT_SCORE
    """Minimum score of the boxes in predictions and figures: one number, or one for each of some classes by name \
(others: 0.3)."""

    @field_validator("levels")
    @classmethod
    def _check_unique(cls, levels: list[str]) -> list[str]:
        if len(set(levels)) < len(levels):
            raise ValueError("names a layer twice")
        return levels

    def requirements(self) -> Requirements:
        return Requirements(feature_layers=self.levels)

    def metrics(self) -> dict[str, Direction]:
        return dict.fromkeys(COCO_METRICS, "max")

    def check_data(self, facts: DataFacts) -> None:
        if not sum(facts.class_counts):
            raise DataError("task: detect needs objects to learn; no training image has a box")
        named = self.score if isinstance(self.score, dict) else {}
        if unknown := [name for name in named if name not in facts.classes]:
            known = join_names(facts.classes)
            raise ConfigError(f"task: score: there is no class {unknown[0]!r}; the data has {known}")

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self,
            facts,
            DetectLearning(self, facts),
            DetectMeasuring(facts),
            DetectPredicting(self, facts),
            DetectShowing(self, facts),
            cells=DetectCells(self),
        )

    def loss_settings(self) -> DetectionLoss:
        """The settings of the criterion."""
        assignment = AssignmentSettings(self.top_k, self.alpha, self.beta)
        return DetectionLoss(self.box_loss, self.box_weight, self.gamma, assignment)


@dataclass(frozen=True)
class DetectLearning(Learning):
    """A dense head on one or more levels, and its loss."""

    spec: Detect
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        spec, channels = self.spec, [require_feature_maps("its dense head", shape)[0] for shape in in_shapes]
        is_shared = spec.towers == "shared"
        if is_shared and len(set(channels)) > 1:
            raise ShapeError("levels that share towers need equal channels", "make them equal, or `towers: separate`")
        image, classes = list(self.facts.image_shape[1:]), len(self.facts.classes)
        tower_channels = [spec.channels] * spec.depth
        return DenseHead(channels, image, classes, tower_channels, is_shared, spec.depthwise)

    def build_criterion(self) -> Criterion:
        images, objects = self.facts.counts.get("train", 0), sum(self.facts.class_counts)
        return DetectionCriterion(max(1.0, objects / images) if images else 1.0, self.spec.loss_settings())


@dataclass(frozen=True)
class DetectMeasuring(Measuring):
    """Average precision by COCO's protocol."""

    facts: DataFacts

    def build_meter(self, choices: Choices) -> DetectMeter:
        return DetectMeter(self.facts.classes)

    def split_problem(self, targets: Targets) -> str | None:
        return "no image has an object; it needs some that have" if "AP" in undefined_coco_metrics(targets) else None

    def undefined_metrics(self, targets: Targets) -> dict[str, str]:
        return undefined_coco_metrics(targets)

    def comparison_key(self) -> list[Any]:
        return list(self.facts.classes)


@dataclass(frozen=True)
class DetectPredicting(Predicting):
    """Boxes with scores and labels after non-maximum suppression."""

    has_objects = True
    has_overlays = True
    unreadable_json = {"objects": []}

    spec: Detect
    facts: DataFacts

    def build_decoder(self, choices: Choices) -> nn.Module:
        import torchvision.ops  # noqa: F401  registers its NMS, which `boxes.non_maximum_suppression` uses if present

        spec = self.spec
        candidates = _CANDIDATES_PER_BOX * spec.most
        return DetectionDecoder(list(self.facts.image_shape[1:]), spec.most, candidates, spec.nms, spec.least_score)

    def result_shapes(self) -> dict[str, Shape]:
        most = self.spec.most
        return {"boxes": (most, 4), "scores": (most,), "labels": (most,)}

    def metadata(self, choices: Choices) -> dict[str, Any]:
        return {
            "boxes": "x1, y1, x2, y2 in pixels of the input. If the image was stretched to it, multiply by image size "
            "/ input size in x and in y; if it was scaled and padded, subtract the padding, then divide by the scale",
            "scores": "falling; 0 where there is no box",
            "labels": "indices into `classes`; -1 where there is no box",
            "score": self.spec.score,
            "nms": self.spec.nms,
        }

    def thresholds(self, choices: Choices) -> dict[str, float]:
        if isinstance(self.spec.score, dict):
            return {name: self.spec.score.get(name, _DEFAULT_SCORE) for name in self.facts.classes}
        return dict.fromkeys(self.facts.classes, self.spec.score)

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[DetectPrediction]:
        views_B6 = torch.tensor([view.as_tuple() for view in views]).numpy()
        boxes_BN4 = undo_view(results["boxes"].cpu().numpy(), views_B6)
        classes, ids = self.facts.classes, self.facts.class_ids or range(1, len(self.facts.classes) + 1)
        predictions = []
        for boxes, scores, labels, view in zip(
            boxes_BN4.tolist(), results["scores"].tolist(), results["labels"].tolist(), views, strict=True
        ):
            objects = [
                DetectedObject(classes[label], label, ids[label], score, tuple(box))
                for box, score, label in zip(boxes, scores, labels, strict=True)
                if label >= 0 and score >= thresholds[classes[label]]
            ]
            predictions.append(DetectPrediction(objects, view.size[0], view.size[1]))
        return predictions

    def largest_difference(self, expected: Results, actual: Results) -> float:
        """The largest difference of scores at the same rank.

        A box that is missing counts as one with `least_score`, because rounding decides on which side such a box lies.
        """
        scores, others = (results["scores"].clamp(min=self.spec.least_score) for results in (expected, actual))
        return float((scores - others).abs().max())

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        gap = self.largest_difference(expected, actual)
        if not gap <= _SCORE_TOLERANCE:
            return f"scores differ by up to {gap:.2e} (allowed {_SCORE_TOLERANCE:g})"
        # Boxes of nearly equal scores may change places, so each box is compared with all boxes on the other side.
        is_match = expected["labels"][:, :, None] == actual["labels"][:, None]
        is_match &= (expected["scores"][:, :, None] - actual["scores"][:, None]).abs() <= _SCORE_TOLERANCE
        overlap = intersection_over_union(expected["boxes"], actual["boxes"]) * is_match
        min_score = max(self.spec.least_score + _SCORE_TOLERANCE, _CLEAR_SCORE)
        best_overlaps = overlap.amax(2)[expected["scores"] > min_score], overlap.amax(1)[actual["scores"] > min_score]
        best = torch.cat(best_overlaps)
        worst = float(best.min()) if len(best) else 1.0
        return None if worst >= 0.999 else f"a box overlaps the network's by only {worst:.4f} (at least 0.999)"


@dataclass(frozen=True)
class DetectShowing(Showing):
    """Boxes to draw, and how the levels suit the objects."""

    has_overlays = True

    spec: Detect
    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        lines = []
        for row in targets["objects"].tolist():
            counts = {name: row.count(k) for k, name in enumerate(self.facts.classes) if k in row}
            lines.append(", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing")
        return lines

    def target_overlays(self, targets: Targets) -> list[Overlay]:
        suffixes = {OBJECT: "", DIFFICULT: " (difficult)", CROWD: " (crowd)"}
        rows = zip(*(targets[name].tolist() for name in ("boxes", "objects", "roles")), strict=True)
        return [
            Overlay(
                [
                    CaptionedBox(tuple(box), self.facts.classes[label] + suffixes[role], label)
                    for box, label, role in zip(*row, strict=True)
                    if label >= 0
                ]
            )
            for row in rows
        ]

    def feature_level_notes(self, levels: Sequence[FeatureLevel], targets: Targets) -> list[str]:
        boxes = targets["boxes"][targets["objects"] >= 0]
        if not len(boxes):
            return []
        sides = box_areas(boxes).sqrt()
        small, large = sides.quantile(0.05).item(), sides.quantile(0.95).item()
        lines = [f"objects: nine of ten are {small:.0f} to {large:.0f} pixels a side, as the network sees them"]
        strides = [cell_stride(self.facts.image_shape[1:], level.shape) for level in levels]
        # Each 3x3 convolution of the towers adds two cells to the receptive field.
        receptive_fields = [
            min(level.receptive_field) + round(2 * self.spec.depth * stride)
            for level, stride in zip(levels, strides, strict=True)
        ]
        names = self.spec.levels or ["the last layer"]
        lines += [
            f"{name}: a cell every {stride:.0f} pixels, which sees {receptive_field} pixels"
            for name, stride, receptive_field in zip(names, strides, receptive_fields, strict=True)
        ]
        min_stride, max_field = min(strides), max(receptive_fields)
        if small < min_stride:
            lines.append(
                f"warning: the smaller objects ({small:.0f} pixels) lie between the cells of the finest level, one "
                f"every {min_stride:.0f} pixels: add a finer level or enlarge data.image.size"
            )
        if large > max_field:
            lines.append(
                f"warning: the larger objects ({large:.0f} pixels) are larger than the {max_field} pixels that a cell "
                "sees: add layers or a coarser level"
            )
        if self.facts.class_counts and (max_count := int(targets["counts"].max())) > self.spec.most:
            lines.append(f"warning: an image has up to {max_count} objects; task.detect.most is {self.spec.most}")
        return lines

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        """Best score of each class over all cells."""
        best_BK = outputs[:, :, FIRST_LOGIT:].amax(1)
        scores = best_BK.sigmoid()
        return ClassScores(self.facts.classes, best_BK, scores, "best score", best_BK.argmax(1), is_local=True)


@dataclass(frozen=True)
class DetectCells(CellAssignment):
    """The task-aligned assignment."""

    spec: Detect

    def assigned_cells(self, outputs: Tensor, targets: Targets) -> list[AssignedCell]:
        objects = batch_objects({name: value[:1] for name, value in targets.items()})
        assignment = DetectionCriterion(1.0, self.spec.loss_settings()).assign(outputs[:1], objects)
        # Objects are counted as in `target_overlays`: without the padding between those of a mosaic.
        object_index_M = (targets["objects"][0] >= 0).cumsum(0) - 1
        return [
            AssignedCell(
                cell,
                float(outputs[0, cell, 4]),
                float(outputs[0, cell, 5]),
                int(object_index_M[assignment.object_BA[0, cell]]),
                float(assignment.quality_BA[0, cell]),
            )
            for cell in assignment.foreground_BA[0].nonzero()[:, 0].tolist()
        ]
