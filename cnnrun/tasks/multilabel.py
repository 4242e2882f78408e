"""Multilabel classification: any number of labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cnnrun.base.errors import DataError
from cnnrun.config.spec import Kinds
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, format_per_class
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import Requirements, Task, TaskSpec
from cnnrun.contracts.task_parts import (
    Calibration,
    Criterion,
    Direction,
    Learning,
    Measuring,
    Predicting,
    Showing,
    Targets,
)
from cnnrun.tasks.class_weights import check_class_weights
from cnnrun.tasks.classification_metrics import MultilabelPredictions
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.multilabel_losses import Bce, MultilabelCriterion, MultilabelLoss
from cnnrun.tasks.temperature import reliability_plot, temperature_metadata

_MAX_CURVES, _MAX_POINTS = 10, 200  # classes in a figure, and points of each curve
DEFAULT_THRESHOLD = 0.5  # for a class whose threshold was not chosen on val


class SigmoidDecoder(nn.Module):
    """Raw outputs [B, K] -> the probability that each class is present: the sigmoid of outputs / temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"probabilities": (outputs / self.temperature).sigmoid()}


class MultilabelMeter:
    """Meter of mAP, F1 at each class's threshold and calibration error; also chooses the thresholds of highest F1."""

    def __init__(self, classes: tuple[str, ...], thresholds: Sequence[float]) -> None:
        self._classes, self._thresholds, self._batches = classes, np.array(thresholds), BatchTensors()

    def update(self, results: Results, targets: Targets) -> None:
        self._batches.add(score=results["probabilities"].double(), present=targets["present"].bool())

    def compute(self, tables: bool = True) -> Measurement:
        arrays = self._batches.concatenate()
        predictions = MultilabelPredictions(arrays["score"], arrays["present"], self._thresholds)
        best = predictions.best_thresholds()
        choices = Choices(class_thresholds=dict(zip(self._classes, best, strict=True)))
        metrics = predictions.metrics()
        if not tables:
            return Measurement(metrics, choices=choices)
        rows = {
            "per_class": predictions.per_class_rows(self._classes, self._thresholds),
            "reliability": predictions.reliability_rows(),
        }
        return Measurement(
            metrics,
            rows,
            choices=choices,
            plots=(
                _precision_recall_plot(predictions, self._classes, arrays["present"].sum(0) > 0),
                reliability_plot(rows["reliability"]),
            ),
            bootstrap_draws=bootstrap(predictions.metrics, len(predictions)),
            correct={"exact": predictions.exact},
        )


def _precision_recall_plot(
    predictions: MultilabelPredictions, classes: Sequence[str], is_present_K: NDArray[np.bool_]
) -> Plot:
    """Precision-recall curves of the first classes that some image has; the title says if classes are left out."""
    series, present = [], np.flatnonzero(is_present_K)
    for k in present[:_MAX_CURVES].tolist():
        recall, precision = predictions.precision_recall_curve(k)
        points = np.unique(np.linspace(0, len(recall) - 1, _MAX_POINTS).round().astype(int))
        series.append(Series(classes[k], recall[points].tolist(), precision[points].tolist()))
    scope = f" of the first {_MAX_CURVES} of {len(present):,} classes" if len(present) > _MAX_CURVES else ""
    return Plot(f"Precision and recall{scope}", "recall", "precision", tuple(series))


@dataclass(frozen=True)
class LabelSetPrediction(Prediction):
    """The probability of each class by name, and the classes that reach their thresholds."""

    labels: Sequence[str]
    probabilities: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "probabilities": self.probabilities}

    def to_text(self) -> str:
        return "  ".join(f"{name} {self.probabilities[name]:.3f}" for name in self.labels) or "none"

    def answer(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def csv_columns(self) -> list[str]:  # a list in one cell would need a separator, which names may contain
        return [f"{column} {name}" for column in ("present", "probability") for name in self.probabilities]

    def csv_rows(self) -> list[list[Any]]:
        return [[*(int(name in self.labels) for name in self.probabilities), *self.probabilities.values()]]


class Multilabel(TaskSpec):
    """Any number of labels per image: a probability for each class, and a threshold chosen on val."""

    kind = "multilabel"
    target_kind = TargetKind.LABEL_SETS

    loss: Annotated[MultilabelLoss, Kinds()] = Bce()
    """The loss of each label."""
    positive_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """Factor on the loss where a label is present: a number for each class, in order; `balanced` gives presence and \
absence the same total weight."""

    def requirements(self) -> Requirements:
        return Requirements(can_mix_targets=True)

    def metrics(self) -> dict[str, Direction]:
        directions: dict[str, Direction] = dict.fromkeys(("mAP", "f1", "micro_f1", "exact"), "max")
        return directions | {"ece": "min"}

    def check_data(self, facts: DataFacts) -> None:
        if not facts.classes:
            raise DataError("task: multilabel needs a class; no training image has a label")
        check_class_weights("positive_weights", self.positive_weights, facts)

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self,
            facts,
            MultilabelLearning(self, facts),
            MultilabelMeasuring(facts),
            MultilabelPredicting(facts),
            MultilabelShowing(self, facts),
            MultilabelCalibration(),
        )

    def loss_weights(self, facts: DataFacts) -> Tensor | None:
        """Weight of the present share of each label in the loss; None if all are 1."""
        if self.positive_weights is None:
            return None
        if isinstance(self.positive_weights, list):
            return torch.tensor(self.positive_weights)
        if not facts.class_counts:  # not counted yet
            return None
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return ((facts.counts["train"] - counts).clamp(min=1) / counts).float()


@dataclass(frozen=True)
class MultilabelLearning(Learning):
    """A linear layer with one output per class, and a loss of each label on its own."""

    spec: Multilabel
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        (in_shape,) = in_shapes
        return nn.Linear(require_vector("its linear layer", in_shape), len(self.facts.classes))

    def build_criterion(self) -> Criterion:
        return MultilabelCriterion(self.spec.loss, self.spec.loss_weights(self.facts))

    def mix_targets(self, targets: Targets, partners: Targets, own_weight_B: Tensor) -> Targets:
        """Replace 0 and 1 by the share to which each label is present, between 0 and 1."""
        own_BK, partner_BK = (part["present"].float() for part in (targets, partners))
        return {**targets, "present": torch.lerp(partner_BK, own_BK, own_weight_B[:, None])}


def _thresholds(facts: DataFacts, choices: Choices) -> dict[str, float]:
    """Threshold of each class, chosen on val or the default."""
    return {name: choices.class_thresholds.get(name, DEFAULT_THRESHOLD) for name in facts.classes}


@dataclass(frozen=True)
class MultilabelMeasuring(Measuring):
    """Average precision, and F1 at each class's threshold."""

    facts: DataFacts

    def build_meter(self, choices: Choices) -> MultilabelMeter:
        return MultilabelMeter(self.facts.classes, list(_thresholds(self.facts, choices).values()))

    def split_problem(self, targets: Targets) -> str | None:
        return None if bool(targets["present"].any()) else "no image has a label; it needs some that have"

    def comparison_key(self) -> list[Any]:
        return list(self.facts.classes)


@dataclass(frozen=True)
class MultilabelPredicting(Predicting):
    """The probability of each class, and the classes that reach their thresholds."""

    facts: DataFacts

    def build_decoder(self, choices: Choices) -> SigmoidDecoder:
        return SigmoidDecoder(choices.temperature or 1.0)

    def result_shapes(self) -> dict[str, Shape]:
        return {"probabilities": (len(self.facts.classes),)}

    def metadata(self, choices: Choices) -> dict[str, Any]:
        return {"thresholds": self.thresholds(choices), **temperature_metadata(choices)}

    def thresholds(self, choices: Choices) -> dict[str, float]:
        return _thresholds(self.facts, choices)

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[LabelSetPrediction]:
        rows = [dict(zip(self.facts.classes, row, strict=True)) for row in results["probabilities"].tolist()]
        return [LabelSetPrediction([name for name in row if row[name] >= thresholds[name]], row) for row in rows]

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        gap = self.largest_difference(expected, actual)
        return None if gap <= 1e-4 else f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"


@dataclass(frozen=True)
class MultilabelShowing(Showing):
    """Class names, and probabilities to explain."""

    spec: Multilabel
    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        lines = []
        for row in targets["present"].tolist():
            present = [(share, name) for share, name in zip(row, self.facts.classes, strict=True) if share]
            lines.append(", ".join(name if share == 1 else f"{name} {share:.2f}" for share, name in present) or "none")
        return lines

    def data_notes(self) -> list[str]:
        weights = self.spec.loss_weights(self.facts)
        return (
            [] if weights is None else [f"positive weights: {format_per_class(self.facts.classes, weights.tolist())}"]
        )

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        probabilities = SigmoidDecoder(choices.temperature or 1.0)(outputs)["probabilities"]
        return ClassScores(self.facts.classes, outputs, probabilities, "probability", outputs.argmax(1))


class MultilabelCalibration(Calibration):
    """Calibration of the sigmoids, by one temperature for all classes."""

    error_metric = "ece"

    def negative_log_likelihood(self, outputs: Tensor, targets: Targets, temperature: float) -> float:
        present = targets["present"].double()
        return float(F.binary_cross_entropy_with_logits(outputs.double() / temperature, present))
