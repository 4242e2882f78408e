"""Object detection: any number of boxes with labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from cnnrun.base.boxes import Mark, box_areas, intersection_over_union
from cnnrun.base.error_lines import join_names
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.layer import Shape, ShapeError, require_maps
from cnnrun.contracts.objects import CROWD, DIFFICULT, OBJECT
from cnnrun.contracts.results import ClassScores, Measurement, Results, View
from cnnrun.contracts.task import Criterion, Direction, FeatureLevel, TaskSpec
from cnnrun.tasks.detection.assignment import Assignment, Objects, assign_cells, quality_focal_loss
from cnnrun.tasks.detection.average_precision import (
    COCO_METRICS,
    AveragePrecision,
    coco_metrics,
    per_class_rows,
    precision_recall_rows,
    undefined_coco_metrics,
    undo_view,
)
from cnnrun.tasks.detection.box_losses import BoxLoss, box_loss
from cnnrun.tasks.detection.head import FIRST_LOGIT, DenseHead, DetectionDecoder, cell_stride

Score = Annotated[float, Field(ge=0, lt=1)]
_CANDIDATES_PER_BOX = 6  # non-maximum suppression gets this many candidates for each box that it may leave
_MAX_CURVES, _FREQUENT_CURVES = 30, 10  # classes in a figure; if there are more, only the most frequent ones
_SCORE_TOLERANCE = 1e-4  # of an exported file
_CLEAR_SCORE = 1e-3  # boxes of a lower score may change places with boxes that are cut off


def batch_objects(targets: dict[str, Tensor]) -> Objects:
    """The objects of a batch's targets, without padding."""
    is_box = targets["objects"] >= 0
    real = is_box & (targets["roles"] == OBJECT)
    return Objects(targets["boxes"], targets["objects"], real, is_box & ~real)


class DetectionCriterion(Criterion):
    """Quality focal loss of every cell's scores, and overlap loss of the boxes of cells that learn an object.

    Both are sums over an image's cells, divided by the mean number of objects of a training image. This is a constant,
    so that a batch split into micro-batches has the same loss and gradient. (TOOD divides by the sum of the batch's
    qualities, which no part of a batch knows.)
    """

    def __init__(self, objects_per_image: float, task: Detect) -> None:
        super().__init__()
        self.objects_per_image, self.task = objects_per_image, task

    def forward(self, outputs_BAF: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        boxes_BA4, logits_BAK = outputs_BAF[:, :, :4], outputs_BAF[:, :, FIRST_LOGIT:]
        objects = batch_objects(targets)
        assignment = self.assignment(outputs_BAF, objects)
        labels_BA = objects.labels_BM.clamp(min=0).gather(1, assignment.object_BA)
        quality_BA = assignment.quality_BA * assignment.foreground_BA
        target_BAK = (F.one_hot(labels_BA, logits_BAK.shape[2]) * quality_BA[:, :, None]).to(logits_BAK.dtype)
        score_loss_BAK = (
            quality_focal_loss(logits_BAK, target_BAK, self.task.gamma) * assignment.has_loss_BA[:, :, None]
        )
        true_BA4 = objects.boxes_BM4.gather(1, assignment.object_BA[:, :, None].expand(-1, -1, 4))
        # The box of a cell without an object is compared with itself: no loss, and no division by the area of padding.
        true_BA4 = torch.where(assignment.foreground_BA[:, :, None], true_BA4, boxes_BA4.detach())
        box_loss_BA = (
            box_loss(self.task.box_loss, boxes_BA4, true_BA4) * assignment.quality_BA * assignment.foreground_BA
        )
        scale = 1 / (self.objects_per_image * len(outputs_BAF))
        return {"score": score_loss_BAK.sum() * scale, "box": box_loss_BA.sum() * (self.task.box_weight * scale)}

    def assignment(self, outputs_BAF: Tensor, objects: Objects) -> Assignment:
        """Assign cells to objects for these raw outputs, without gradients."""
        task, cells_BA3 = self.task, outputs_BAF[:, :, 4:FIRST_LOGIT]
        scores, boxes = outputs_BAF[:, :, FIRST_LOGIT:].detach().sigmoid(), outputs_BAF[:, :, :4].detach()
        return assign_cells(scores, boxes, cells_BA3, objects, task.top_k, task.alpha, task.beta)


class DetectMeter:
    """Meter of COCO's metrics, AP of each class, and precision-recall curves."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes, self._average_precision = classes, AveragePrecision(classes)

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._average_precision.add(results, targets)

    def compute(self, tables: bool = True) -> Measurement:
        evaluation = self._average_precision.evaluate()
        metrics = coco_metrics(evaluation)
        if not tables:
            return Measurement(metrics)
        counts = self._average_precision.object_counts()
        rows = {
            "per_class": per_class_rows(evaluation, self._classes, counts),
            "precision_recall": precision_recall_rows(evaluation, self._classes),
        }
        plot = _precision_recall_plot(rows["precision_recall"], dict(zip(self._classes, counts, strict=True)))
        draws = self._average_precision.bootstrap_metrics(evaluation)
        return Measurement(metrics, rows, plots=(plot,), bootstrap_draws=draws)


def _precision_recall_plot(rows: Sequence[dict[str, Any]], counts: dict[str, int]) -> Plot:
    """Precision-recall curve of each class; of many classes only the most frequent ones, and the title says so."""
    names, scope = list(counts), ""
    if len(names) > _MAX_CURVES:
        names = sorted(names, key=lambda name: -counts[name])[:_FREQUENT_CURVES]
        scope = f" of the {_FREQUENT_CURVES} most frequent of {len(counts):,} classes"
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row in rows:
        if row["class"] in curves:
            curves[row["class"]].append((row["recall"], row["precision"]))
    series = [Series(name, [x for x, _ in curve], [y for _, y in curve]) for name, curve in curves.items() if curve]
    return Plot(f"Precision and recall{scope}", "recall", "precision", tuple(series))


class Detect(TaskSpec):
    """Boxes with labels: an anchor-free head on one or more levels, task-aligned assignment, NMS in the graph."""

    kind = "detect"
    main = "levels"
    target_kind = "boxes"

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
    score: Score | dict[str, Score] = 0.3
    """Minimum score of the boxes in predictions and figures; or one per class, by name (others: 0.3)."""

    @field_validator("levels")
    @classmethod
    def _check_unique(cls, levels: list[str]) -> list[str]:
        if len(set(levels)) < len(levels):
            raise ValueError("names a layer twice")
        return levels

    def metrics(self) -> dict[str, Direction]:
        direction: Direction = "max"
        return dict.fromkeys(COCO_METRICS, direction)

    def data_problem(self, facts: Facts) -> str | None:
        if not sum(facts.class_counts):
            return "detect needs objects to learn; no training image has a box"
        named = self.score if isinstance(self.score, dict) else {}
        if unknown := [name for name in named if name not in facts.classes]:
            return f"score: there is no class {unknown[0]!r}; the data has {join_names(facts.classes)}"
        return None

    def undefined_metrics(self, targets: dict[str, Tensor]) -> dict[str, str]:
        return undefined_coco_metrics(targets)

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        return "no image has an object; it needs some that have" if "AP" in undefined_coco_metrics(targets) else None

    def network_remarks(self, levels: Sequence[FeatureLevel], targets: dict[str, Tensor], facts: Facts) -> list[str]:
        boxes = targets["boxes"][targets["objects"] >= 0]
        if not len(boxes):
            return []
        sides = box_areas(boxes).sqrt()
        small, large = sides.quantile(0.05).item(), sides.quantile(0.95).item()
        lines = [f"objects: nine of ten are {small:.0f} to {large:.0f} pixels a side, as the network sees them"]
        strides = [cell_stride(facts.image[1:], level.shape) for level in levels]
        # Each 3x3 convolution of the towers adds two cells to the receptive field.
        receptive_fields = [
            min(level.receptive_field) + round(2 * self.depth * stride)
            for level, stride in zip(levels, strides, strict=True)
        ]
        names = self.levels or ["the last layer"]
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
        if facts.class_counts and (max_count := int(targets["counts"].max())) > self.most:
            lines.append(f"warning: an image has up to {max_count} objects; task.detect.most is {self.most}")
        return lines

    def feature_layers(self) -> list[str]:
        return self.levels

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        channels = [require_maps("its dense head", shape)[0] for shape in in_shapes]
        if self.towers == "shared" and len(set(channels)) > 1:
            raise ShapeError("levels that share towers need equal channels", "make them equal, or `towers: separate`")
        shared, image = self.towers == "shared", list(facts.image[1:])
        return DenseHead(channels, image, len(facts.classes), self.channels, self.depth, shared, self.depthwise)

    def criterion(self, facts: Facts) -> Criterion:
        images = facts.counts.get("train", 0)
        return DetectionCriterion(max(1.0, sum(facts.class_counts) / images) if images else 1.0, self)

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        lines = []
        for row in targets["objects"].tolist():
            counts = {name: row.count(k) for k, name in enumerate(facts.classes) if k in row}
            lines.append(", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing")
        return lines

    def target_marks(self, targets: dict[str, Tensor], facts: Facts) -> list[list[Mark]] | None:
        suffixes = {OBJECT: "", DIFFICULT: " (difficult)", CROWD: " (crowd)"}
        rows = zip(*(targets[name].tolist() for name in ("boxes", "objects", "roles")), strict=True)
        return [
            [
                Mark(tuple(box), facts.classes[label] + suffixes[role], label)
                for box, label, role in zip(*row, strict=True)
                if label >= 0
            ]
            for row in rows
        ]

    def result_marks(self, results: Results, facts: Facts) -> list[list[Mark]] | None:
        thresholds = list(self.thresholds(facts).values())
        rows = zip(*(results[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
        return [
            [
                Mark(tuple(box), f"{facts.classes[label]} {score:.2f}", label)
                for box, score, label in zip(*row, strict=True)
                if label >= 0 and score >= thresholds[label]
            ]
            for row in rows
        ]

    def assignment(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts) -> list[dict[str, Any]] | None:
        objects = batch_objects({name: value[:1] for name, value in targets.items()})
        assignment = DetectionCriterion(1.0, self).assignment(outputs[:1], objects)
        # Objects are numbered as in `target_marks`: without the padding between those of a mosaic.
        number_M = (targets["objects"][0] >= 0).cumsum(0) - 1
        return [
            {
                "cell": cell,
                "x": float(outputs[0, cell, 4]),
                "y": float(outputs[0, cell, 5]),
                "object": int(number_M[assignment.object_BA[0, cell]]),
                "quality": float(assignment.quality_BA[0, cell]),
            }
            for cell in assignment.foreground_BA[0].nonzero()[:, 0].tolist()
        ]

    def thresholds(self, facts: Facts) -> dict[str, float]:
        if isinstance(self.score, dict):
            return {name: self.score.get(name, 0.3) for name in facts.classes}
        return dict.fromkeys(facts.classes, self.score)

    def decoder(self, facts: Facts) -> nn.Module:
        import torchvision.ops  # noqa: F401  registers its NMS, which `boxes.non_maximum_suppression` uses if present

        candidates = _CANDIDATES_PER_BOX * self.most
        return DetectionDecoder(list(facts.image[1:]), self.most, candidates, self.nms, self.least_score)

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        """Best score of each class over all cells."""
        best_BK = outputs[:, :, FIRST_LOGIT:].amax(1)
        return ClassScores(facts.classes, best_BK, best_BK.sigmoid(), "best score", best_BK.argmax(1), is_local=True)

    def meter(self, facts: Facts) -> DetectMeter:
        return DetectMeter(facts.classes)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        return {"boxes": (self.most, 4), "scores": (self.most,), "labels": (self.most,)}

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return {
            "boxes": "x1, y1, x2, y2 in pixels of the input. If the image was stretched to it, multiply by image size "
            "/ input size in x and in y; if it was scaled and padded, subtract the padding, then divide by the scale",
            "scores": "falling; 0 where there is no box",
            "labels": "indices into `classes`; -1 where there is no box",
            "score": self.score,
            "nms": self.nms,
        }

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(expected, actual, facts)
        if not gap <= _SCORE_TOLERANCE:
            return f"scores differ by up to {gap:.2e} (allowed {_SCORE_TOLERANCE:g})"
        # Boxes of nearly equal scores may change places, so each box is compared with all boxes on the other side.
        is_match = expected["labels"][:, :, None] == actual["labels"][:, None]
        is_match &= (expected["scores"][:, :, None] - actual["scores"][:, None]).abs() <= _SCORE_TOLERANCE
        overlap = intersection_over_union(expected["boxes"], actual["boxes"]) * is_match
        min_score = max(self.least_score, _CLEAR_SCORE)
        best_overlaps = overlap.amax(2)[expected["scores"] > min_score], overlap.amax(1)[actual["scores"] > min_score]
        best = torch.cat(best_overlaps)
        worst = float(best.min()) if len(best) else 1.0
        return None if worst >= 0.999 else f"a box overlaps the network's by only {worst:.4f} (at least 0.999)"

    def largest_difference(self, expected: Results, actual: Results, facts: Facts) -> float:
        """The largest difference of scores at the same rank."""
        return float((expected["scores"] - actual["scores"]).abs().max())

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        views_B6 = torch.tensor([view.as_tuple() for view in views]).numpy()
        boxes_BN4 = undo_view(results["boxes"].cpu().numpy(), views_B6)
        ids = facts.class_ids or range(1, len(facts.classes) + 1)
        thresholds, rows = list(self.thresholds(facts).values()), []
        for boxes, scores, labels, view in zip(
            boxes_BN4.tolist(), results["scores"].tolist(), results["labels"].tolist(), views, strict=True
        ):
            objects = [
                {
                    "label": facts.classes[label],
                    "category_id": ids[label],
                    "score": score,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                }
                for box, score, label in zip(boxes, scores, labels, strict=True)
                if label >= 0 and score >= thresholds[label]
            ]
            rows.append({"height": view.size[0], "width": view.size[1], "objects": objects})
        return rows
