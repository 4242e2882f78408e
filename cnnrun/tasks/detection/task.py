"""Any number of objects a picture: boxes with labels."""

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
_CANDIDATES = 6  # boxes that suppression chooses from, for each that can be left
_MOST_CURVES, _CURVES = 30, 10  # classes that have a curve each in a figure; of more, those that have
_SCORES = 1e-4  # by which scores may differ in an exported file
_CLEAR = 1e-3  # a difference of scores that decides which of two boxes comes first


def batch_objects(targets: dict[str, Tensor]) -> Objects:
    """The objects of a batch's targets."""
    there = targets["objects"] >= 0
    real = there & (targets["roles"] == OBJECT)
    return Objects(targets["boxes"], targets["objects"], real, there & ~real)


class DetectionCriterion(Criterion):
    """Quality focal loss of every cell's scores; the boxes' overlap loss where a cell learns an object.

    Sums over a picture's cells, divided by the mean number of objects a training picture has: a constant, so that a
    batch split into micro-batches has the same loss and gradient. (TOOD divides by what the batch's qualities add up
    to, which no part of a batch knows.)
    """

    def __init__(self, objects_per_image: float, task: Detect) -> None:
        super().__init__()
        self.objects_per_image, self.task = objects_per_image, task

    def forward(self, outputs_BAF: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        boxes_BA4, logits_BAK = outputs_BAF[:, :, :4], outputs_BAF[:, :, FIRST_LOGIT:]
        objects = batch_objects(targets)
        found = self.assignment(outputs_BAF, objects)
        target = F.one_hot(_of_owner(objects.labels_BM.clamp(min=0), found), logits_BAK.shape[2])
        target = target * (found.quality_BA * found.foreground_BA)[:, :, None]
        scores = (
            quality_focal_loss(logits_BAK, target.to(logits_BAK.dtype), self.task.gamma) * found.has_loss_BA[:, :, None]
        )
        owners = objects.boxes_BM4.gather(1, found.object_BA[:, :, None].expand(-1, -1, 4))
        # A cell without an object is compared with itself: no loss, and no division by a box of no area.
        owners = torch.where(found.foreground_BA[:, :, None], owners, boxes_BA4.detach())
        apart = box_loss(self.task.box_loss, boxes_BA4, owners) * found.quality_BA * found.foreground_BA
        each = 1 / (self.objects_per_image * len(outputs_BAF))
        return {"score": scores.sum() * each, "box": apart.sum() * (self.task.box_weight * each)}

    def assignment(self, outputs_BAF: Tensor, objects: Objects) -> Assignment:
        """Which cells learn which objects."""
        task, place = self.task, outputs_BAF[:, :, 4:FIRST_LOGIT]
        scores = outputs_BAF[:, :, FIRST_LOGIT:].detach().sigmoid()
        return assign_cells(scores, outputs_BAF[:, :, :4].detach(), place, objects, task.top_k, task.alpha, task.beta)


def _of_owner(values_BM: Tensor, found: Assignment) -> Tensor:
    return values_BM.gather(1, found.object_BA)


class DetectMeter:
    """COCO's numbers, AP of each class, precision over recall."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes, self._boxes = classes, AveragePrecision(classes)

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._boxes.add(results, targets)

    def compute(self, tables: bool = True) -> Measurement:
        done = self._boxes.evaluate()
        if not tables:
            return Measurement(coco_metrics(done))
        found = {
            "per_class": per_class_rows(done, self._classes, self._boxes.object_counts()),
            "precision_recall": precision_recall_rows(done, self._classes),
        }
        drawn = (
            _precision_recall_plot(
                found["precision_recall"], dict(zip(self._classes, self._boxes.object_counts(), strict=True))
            ),
        )
        return Measurement(coco_metrics(done), found, plots=drawn, bootstrap_draws=self._boxes.bootstrap_metrics(done))


def _precision_recall_plot(rows: Sequence[dict[str, Any]], counts: dict[str, int]) -> Plot:
    """A curve a class; of many classes those of the most objects, which the title says."""
    names, of = list(counts), ""
    if len(names) > _MOST_CURVES:
        names = sorted(names, key=lambda name: -counts[name])[:_CURVES]
        of = f" of the {_CURVES} most frequent of {len(counts):,} classes"
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row in rows:
        if row["class"] in points:
            points[row["class"]].append((row["recall"], row["precision"]))
    series = [Series(name, [x for x, _ in each], [y for _, y in each]) for name, each in points.items() if each]
    return Plot(f"Precision and recall{of}", "recall", "precision", tuple(series))


class Detect(TaskSpec):
    """Boxes with labels: an anchor-free head over one or more levels, task-aligned assignment, NMS in the graph."""

    kind = "detect"
    main = "levels"
    target_kind = "boxes"

    levels: list[str] = []
    """The layers, by name, at whose cells objects are found; by default the last one alone."""
    channels: int = Field(64, ge=1, le=4096)
    """Of the towers' convolutions."""
    depth: int = Field(2, ge=0, le=16)
    """Convolutions in each of the two towers."""
    towers: Literal["shared", "separate"] = "shared"
    """Whether all levels use the same convolutions (each with batch norms of its own)."""
    depthwise: bool = False
    """Towers of depthwise and 1x1 convolutions."""
    box_loss: BoxLoss = "ciou"
    box_weight: float = Field(2.0, gt=0)
    """Of the boxes' loss, the scores' being 1."""
    gamma: float = Field(2.0, ge=0)
    """The focusing of the scores' loss (quality focal loss, Li et al. 2020); 0 is cross-entropy, slower at first."""
    top_k: int = Field(13, ge=1)
    """Cells that learn an object, at most."""
    alpha: float = Field(1.0, ge=0)
    """The assignment's exponent of the score."""
    beta: float = Field(6.0, ge=0)
    """The assignment's exponent of the overlap."""
    nms: float = Field(0.6, ge=0, le=1)
    """Of two boxes of a class that overlap by more than this, the one of the lower score goes."""
    most: int = Field(100, ge=1, le=10_000)
    """Boxes of a picture, at most; COCO measures 100."""
    least_score: float = Field(0.001, ge=0, lt=1)
    """Boxes of a lower score are not given at all."""
    score: Score | dict[str, Score] = 0.3
    """Boxes of a lower score are not shown to people; or a number for some classes by name (the others: 0.3)."""

    @field_validator("levels")
    @classmethod
    def _once(cls, levels: list[str]) -> list[str]:
        if len(set(levels)) < len(levels):
            raise ValueError("names a layer twice")
        return levels

    def metrics(self) -> dict[str, Direction]:
        best: Direction = "max"
        return dict.fromkeys(COCO_METRICS, best)

    def data_problem(self, facts: Facts) -> str | None:
        if not sum(facts.class_counts):
            return "detect needs objects to learn; no training picture has a box"
        if unknown := [
            name for name in (self.score if isinstance(self.score, dict) else ()) if name not in facts.classes
        ]:
            return f"score: there is no class {unknown[0]!r}; the data has {join_names(facts.classes)}"
        return None

    def undefined_metrics(self, targets: dict[str, Tensor]) -> dict[str, str]:
        return undefined_coco_metrics(targets)

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        return "no picture has an object; give it some that have" if "AP" in undefined_coco_metrics(targets) else None

    def network_remarks(self, levels: Sequence[FeatureLevel], targets: dict[str, Tensor], facts: Facts) -> list[str]:
        boxes = targets["boxes"][targets["objects"] >= 0]
        if not len(boxes):
            return []
        sides = box_areas(boxes).sqrt()
        small, large = sides.quantile(0.05).item(), sides.quantile(0.95).item()
        lines = [f"objects: nine of ten are {small:.0f} to {large:.0f} pixels a side, as the network sees them"]
        strides = [cell_stride(facts.image[1:], level.shape) for level in levels]
        # The towers' convolutions of 3x3 see two cells more each.
        fields = [
            min(level.receptive_field) + round(2 * self.depth * stride)
            for level, stride in zip(levels, strides, strict=True)
        ]
        lines += [
            f"{name}: a cell every {stride:.0f} pixels, which sees {field}"
            for name, stride, field in zip(self.levels or ["the last layer"], strides, fields, strict=True)
        ]
        finest, widest = min(strides), max(fields)
        if small < finest:
            lines.append(
                f"warning: the smaller objects ({small:.0f} pixels) lie between the cells of the finest level, one "
                f"every {finest:.0f}: add a finer level or enlarge data.image.size"
            )
        if large > widest:
            lines.append(
                f"warning: the larger objects ({large:.0f} pixels) are larger than what any cell sees ({widest}): add "
                "layers or a coarser level"
            )
        if facts.class_counts and (crowd := int(targets["counts"].max())) > self.most:
            lines.append(f"warning: a picture has up to {crowd} objects; task.detect.most is {self.most}")
        return lines

    def feature_layers(self) -> list[str]:
        return self.levels

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        channels = [require_maps("its dense head", shape)[0] for shape in in_shapes]
        if self.towers == "shared" and len(set(channels)) > 1:
            raise ShapeError("levels that share towers need equal channels", "equal them, or `towers: separate`")
        shared, image = self.towers == "shared", list(facts.image[1:])
        return DenseHead(channels, image, len(facts.classes), self.channels, self.depth, shared, self.depthwise)

    def criterion(self, facts: Facts) -> Criterion:
        pictures = facts.counts.get("train", 0)
        return DetectionCriterion(max(1.0, sum(facts.class_counts) / pictures) if pictures else 1.0, self)

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        found = []
        for row in targets["objects"].tolist():
            counts = {name: row.count(k) for k, name in enumerate(facts.classes) if k in row}
            found.append(", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing")
        return found

    def target_marks(self, targets: dict[str, Tensor], facts: Facts) -> list[list[Mark]] | None:
        words = {OBJECT: "", DIFFICULT: " (difficult)", CROWD: " (crowd)"}
        rows = zip(*(targets[name].tolist() for name in ("boxes", "objects", "roles")), strict=True)
        return [
            [
                Mark(tuple(box), facts.classes[label] + words[role], label)
                for box, label, role in zip(*row, strict=True)
                if label >= 0
            ]
            for row in rows
        ]

    def result_marks(self, results: Results, facts: Facts) -> list[list[Mark]] | None:
        least = list(self.thresholds(facts).values())
        rows = zip(*(results[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
        return [
            [
                Mark(tuple(box), f"{facts.classes[label]} {score:.2f}", label)
                for box, score, label in zip(*row, strict=True)
                if label >= 0 and score >= least[label]
            ]
            for row in rows
        ]

    def assignment(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts) -> list[dict[str, Any]] | None:
        criterion = DetectionCriterion(1.0, self)
        found = criterion.assignment(outputs[:1], batch_objects({name: value[:1] for name, value in targets.items()}))
        # Objects are counted as `true_marks` has them: without the padding between those of a mosaic.
        number = (targets["objects"][0] >= 0).cumsum(0) - 1
        return [
            {
                "cell": cell,
                "x": float(outputs[0, cell, 4]),
                "y": float(outputs[0, cell, 5]),
                "object": int(number[found.object_BA[0, cell]]),
                "quality": float(found.quality_BA[0, cell]),
            }
            for cell in found.foreground_BA[0].nonzero()[:, 0].tolist()
        ]

    def thresholds(self, facts: Facts) -> dict[str, float]:
        if isinstance(self.score, dict):
            return {name: self.score.get(name, 0.3) for name in facts.classes}
        return dict.fromkeys(facts.classes, self.score)

    def decoder(self, facts: Facts) -> nn.Module:
        import torchvision.ops  # noqa: F401  its suppression, which `boxes.non_maximum_suppression` takes where it is there

        return DetectionDecoder(list(facts.image[1:]), self.most, _CANDIDATES * self.most, self.nms, self.least_score)

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        """Each class's best score in the picture."""
        best = outputs[:, :, FIRST_LOGIT:].amax(1)
        return ClassScores(facts.classes, best, best.sigmoid(), "best score", best.argmax(1), is_local=True)

    def meter(self, facts: Facts) -> DetectMeter:
        return DetectMeter(facts.classes)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        return {"boxes": (self.most, 4), "scores": (self.most,), "labels": (self.most,)}

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return {
            "boxes": "x1, y1, x2, y2 in pixels of the input; in those of a picture that was stretched to it: x times "
            "its width / the input's, y times height / height; of a padded one: less the padding, divided by its scale",
            "scores": "falling; 0 where there is no box",
            "labels": "places in `classes`; -1 where there is no box",
            "score": self.score,
            "nms": self.nms,
        }

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(ours, theirs, facts)
        if not gap <= _SCORES:
            return f"scores differ by up to {gap:.2e} (allowed 1e-4)"
        # Boxes of nearly equal scores may change places: each is looked for among all of the other's.
        same = ours["labels"][:, :, None] == theirs["labels"][:, None]
        same &= (ours["scores"][:, :, None] - theirs["scores"][:, None]).abs() <= _SCORES
        alike = intersection_over_union(ours["boxes"], theirs["boxes"]) * same
        least = max(self.least_score, _CLEAR)
        clear = torch.cat([alike.amax(2)[ours["scores"] > least], alike.amax(1)[theirs["scores"] > least]])
        worst = float(clear.min()) if len(clear) else 1.0
        return None if worst >= 0.999 else f"a box overlaps the network's by {worst:.4f} alone (at least 0.999)"

    def largest_difference(self, ours: Results, theirs: Results, facts: Facts) -> float:
        return float((ours["scores"] - theirs["scores"]).abs().max())

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        back = undo_view(results["boxes"].cpu().numpy(), torch.tensor([each.as_tuple() for each in views]).numpy())
        ids = facts.class_ids or range(1, len(facts.classes) + 1)
        least, found = list(self.thresholds(facts).values()), []
        for boxes, scores, labels, view in zip(
            back.tolist(), results["scores"].tolist(), results["labels"].tolist(), views, strict=True
        ):
            shown = [
                {
                    "label": facts.classes[label],
                    "category_id": ids[label],
                    "score": score,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                }
                for box, score, label in zip(boxes, scores, labels, strict=True)
                if label >= 0 and score >= least[label]
            ]
            found.append({"height": view.size[0], "width": view.size[1], "objects": shown})
        return found
