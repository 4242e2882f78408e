"""Multilabel classification: any number of labels per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cnnrun.config.spec import Kind, Kinds
from cnnrun.contracts.facts import Facts, format_per_class
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.task import Criterion, Direction, TaskSpec
from cnnrun.tasks.classification_metrics import MultilabelPredictions
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.temperature import TEMPERATURE, reliability_plot, temperature_metadata

_EPS = 1e-6
_MAX_CURVES, _MAX_POINTS = 10, 200  # classes in a figure, and points of each curve
DEFAULT_THRESHOLD = 0.5  # for a class whose threshold was not chosen on val


class MultilabelLossSpec(Kind):
    """Base class of losses that treat each label on its own."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        """Loss of each label, [B, K].

        `present_BK` is 0 or 1, or between them for blended images. `weight_K` multiplies the loss of the present share
        of a label.
        """
        raise NotImplementedError


class Bce(MultilabelLossSpec):
    """Binary cross-entropy."""

    kind = "bce"

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit_BK, present_BK, pos_weight=weight_K, reduction="none")


class Focal(MultilabelLossSpec):
    """Focal loss: binary cross-entropy that gives easy labels less weight (Lin et al. 2017, eq. 4).

    A label that is present with the share t has the loss of `torchvision.ops.sigmoid_focal_loss`: cross-entropy with t,
    times (t * (1 - p) + (1 - t) * p)^gamma.
    """

    kind = "focal"
    main = "gamma"

    gamma: float = Field(2.0, ge=0)
    """The focusing exponent; 0 is `bce`."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        error = present_BK * (1 - score) + (1 - present_BK) * score
        # A power below 1 has an infinite slope at 0, where nothing is left to learn.
        return error.clamp(min=_EPS).pow(self.gamma) * Bce().loss_per_label(logit_BK, present_BK, weight_K)


class Asymmetric(MultilabelLossSpec):
    """Focal loss with a separate exponent for absent labels, whose easiest have no loss (Ridnik et al. 2021)."""

    kind = "asymmetric"

    positive: float = Field(0.0, ge=0)
    """The focusing exponent of present labels (gamma+)."""
    negative: float = Field(4.0, ge=0)
    """The focusing exponent of absent labels (gamma-)."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Absent labels whose probability is below this have no loss."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        shifted = (score - self.margin).clamp(
            min=0, max=1 - _EPS
        )  # eq. 5; below 1, for a tiny margin, so log1p is finite
        positive = (1 - score).clamp(min=_EPS).pow(self.positive) * F.logsigmoid(logit_BK)
        log_absent = F.logsigmoid(-logit_BK) if self.margin == 0 else torch.log1p(-shifted)
        negative = shifted.clamp(min=_EPS).pow(self.negative) * log_absent
        weight = 1.0 if weight_K is None else weight_K
        return -(weight * present_BK * positive + (1 - present_BK) * negative)


MultilabelLoss = Bce | Focal | Asymmetric


class MultilabelCriterion(Criterion):
    """Mean of the loss over labels and images."""

    weight: Tensor | None

    def __init__(self, loss: MultilabelLossSpec, weight_K: Tensor | None) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("weight", weight_K, persistent=False)

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            self.loss.kind: self.loss.loss_per_label(outputs, targets["present"].to(outputs.dtype), self.weight).mean()
        }


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

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._batches.add(score=results["probabilities"].double(), present=targets["present"].bool())

    def compute(self, tables: bool = True) -> Measurement:
        arrays = self._batches.concatenate()
        predictions = MultilabelPredictions(arrays["score"], arrays["present"], self._thresholds)
        best = predictions.best_thresholds()
        choices = {f"threshold of {name}": threshold for name, threshold in zip(self._classes, best, strict=True)}
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


class Multilabel(TaskSpec):
    """Any number of labels per image: a probability for each class, and a threshold chosen on val."""

    kind = "multilabel"
    target_kind = "label sets"
    can_blend = True

    loss: Annotated[MultilabelLoss, Kinds()] = Bce()
    """The loss of each label."""
    positive_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """Factor on the loss where a label is present: a number for each class, in order; `balanced` gives presence and \
absence the same total weight."""

    def metrics(self) -> dict[str, Direction]:
        rising: dict[str, Direction] = dict.fromkeys(("mAP", "f1", "micro_f1", "exact"), "max")
        return rising | {"ece": "min"}

    def data_problem(self, facts: Facts) -> str | None:
        if not facts.classes:
            return "multilabel needs a class; no training image has a label"
        if isinstance(self.positive_weights, list) and len(self.positive_weights) != len(facts.classes):
            return (
                f"positive_weights has {len(self.positive_weights)} numbers; the data has {len(facts.classes)} classes"
            )
        if self.positive_weights == "balanced" and 0 in facts.class_counts:
            missing = facts.classes[facts.class_counts.index(0)]
            return f"positive_weights: balanced needs images of every class; {missing!r} has none"
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        return None if bool(targets["present"].any()) else "no image has a label; it needs some that have"

    def data_notes(self, facts: Facts) -> list[str]:
        weights = self._positive_weights(facts)
        return [] if weights is None else [f"positive weights: {format_per_class(facts.classes, weights.tolist())}"]

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return nn.Linear(require_vector("its linear layer", in_shape), len(facts.classes))

    def criterion(self, facts: Facts) -> Criterion:
        return MultilabelCriterion(self.loss, self._positive_weights(facts))

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """Replace 0 and 1 by the share to which each label is present, between 0 and 1."""
        own_BK, partner_BK = (part["present"].float() for part in (targets, partners))
        return {**targets, "present": torch.lerp(partner_BK, own_BK, own_B[:, None])}

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        lines = []
        for row in targets["present"].tolist():
            present = [(share, name) for share, name in zip(row, facts.classes, strict=True) if share]
            lines.append(", ".join(name if share == 1 else f"{name} {share:.2f}" for share, name in present) or "none")
        return lines

    def thresholds(self, facts: Facts) -> dict[str, float]:
        return {name: facts.chosen.get(f"threshold of {name}", DEFAULT_THRESHOLD) for name in facts.classes}

    def decoder(self, facts: Facts) -> nn.Module:
        return SigmoidDecoder(facts.chosen.get(TEMPERATURE, 1.0))

    def meter(self, facts: Facts) -> MultilabelMeter:
        return MultilabelMeter(facts.classes, list(self.thresholds(facts).values()))

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        return ClassScores(
            facts.classes, outputs, self.decoder(facts)(outputs)["probabilities"], "probability", outputs.argmax(1)
        )

    def negative_log_likelihood(
        self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float
    ) -> float | None:
        present = targets["present"].double()
        return float(F.binary_cross_entropy_with_logits(outputs.double() / temperature, present))

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        return {"probabilities": (len(facts.classes),)}

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return {"thresholds": self.thresholds(facts), **temperature_metadata(facts)}

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(expected, actual, facts)
        return None if gap <= 1e-4 else f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        thresholds = list(self.thresholds(facts).values())
        return [
            {
                "labels": [name for name, p, t in zip(facts.classes, row, thresholds, strict=True) if p >= t],
                "probabilities": dict(zip(facts.classes, row, strict=True)),
            }
            for row in results["probabilities"].tolist()
        ]

    def _positive_weights(self, facts: Facts) -> Tensor | None:
        if self.positive_weights is None:
            return None
        if isinstance(self.positive_weights, list):
            return torch.tensor(self.positive_weights)
        if not facts.class_counts:  # not counted yet
            return None
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return ((facts.counts["train"] - counts).clamp(min=1) / counts).float()
