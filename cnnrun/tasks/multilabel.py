"""Any number of labels a picture."""

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

_TINY = 1e-6
_MOST_LINES, _MOST_POINTS = 10, 200  # classes in a figure, and points of each
DEFAULT_THRESHOLD = 0.5  # of a class for which val has chosen none


class MultilabelLossSpec(Kind):
    """A loss of each label on its own."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        """The loss of each label, [B, K].

        `present` is 0, 1, or between where pictures are mixed. `weight` multiplies what a label costs where it is
        present, or by so much of it as is.
        """
        raise NotImplementedError


class Bce(MultilabelLossSpec):
    """Binary cross-entropy."""

    kind = "bce"

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit_BK, present_BK, pos_weight=weight_K, reduction="none")


class Focal(MultilabelLossSpec):
    """Binary cross-entropy that minds easy labels less (Lin et al. 2017, eq. 4).

    Of mixed labels as torchvision's: cross-entropy with the part t, times (t * (1 - p) + (1 - t) * p)^gamma.
    """

    kind = "focal"
    main = "gamma"

    gamma: float = Field(2.0, ge=0)
    """The exponent of how wrong it is; 0 is `bce`."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        wrong = present_BK * (1 - score) + (1 - present_BK) * score
        # A root has no slope at 0, where nothing is left to learn.
        return wrong.clamp(min=_TINY).pow(self.gamma) * Bce().loss_per_label(logit_BK, present_BK, weight_K)


class Asymmetric(MultilabelLossSpec):
    """Focal with an exponent of its own for absent labels, of which the easiest count nothing (Ridnik et al. 2021)."""

    kind = "asymmetric"

    positive: float = Field(0.0, ge=0)
    """The exponent where the label is present (gamma+)."""
    negative: float = Field(4.0, ge=0)
    """The exponent where it is absent (gamma-)."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Absent labels of a probability below this count nothing."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        shifted = (score - self.margin).clamp(min=0, max=1 - _TINY)  # eq. 5; 1 is as near as a margin comes to none
        there = (1 - score).clamp(min=_TINY).pow(self.positive) * F.logsigmoid(logit_BK)
        absent = F.logsigmoid(-logit_BK) if self.margin == 0 else torch.log1p(-shifted)
        absent = shifted.clamp(min=_TINY).pow(self.negative) * absent
        weight = 1.0 if weight_K is None else weight_K
        return -(weight * present_BK * there + (1 - present_BK) * absent)


MultilabelLoss = Bce | Focal | Asymmetric


class MultilabelCriterion(Criterion):
    """The mean over labels and pictures."""

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
    """Raw outputs [B, K] -> the probability that each class is there, at a temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"probabilities": (outputs / self.temperature).sigmoid()}


class MultilabelMeter:
    """mAP, F1 at each class's threshold, calibration; and the thresholds that would be best here."""

    def __init__(self, classes: tuple[str, ...], thresholds: Sequence[float]) -> None:
        self._classes, self._thresholds, self._kept = classes, np.array(thresholds), BatchTensors()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._kept.add(score=results["probabilities"].double(), present=targets["present"].bool())

    def compute(self, tables: bool = True) -> Measurement:
        kept = self._kept.concatenate()
        found = MultilabelPredictions(kept["score"], kept["present"], self._thresholds)
        best = found.best_thresholds()
        chosen = {f"threshold of {name}": value for name, value in zip(self._classes, best, strict=True)}
        numbers = found.metrics()
        if not tables:
            return Measurement(numbers, choices=chosen)
        rows = {
            "per_class": found.per_class_rows(self._classes, self._thresholds),
            "reliability": found.reliability_rows(),
        }
        return Measurement(
            numbers,
            rows,
            choices=chosen,
            plots=(
                _precision_recall(found, self._classes, kept["present"].sum(0) > 0),
                reliability_plot(rows["reliability"]),
            ),
            bootstrap_draws=bootstrap(found.metrics, len(found)),
            correct={"exact": found.exact},
        )


def _precision_recall(found: MultilabelPredictions, classes: Sequence[str], known_K: NDArray[np.bool_]) -> Plot:
    """A line for each of the first classes that some picture has; the title says where there are more."""
    series, known = [], np.flatnonzero(known_K)
    for k in known[:_MOST_LINES].tolist():
        recall, precision = found.precision_recall_curve(k)
        some = np.unique(np.linspace(0, len(recall) - 1, _MOST_POINTS).round().astype(int))
        series.append(Series(classes[k], recall[some].tolist(), precision[some].tolist()))
    of = f" of the first {_MOST_LINES} of {len(known):,} classes" if len(known) > _MOST_LINES else ""
    return Plot(f"Precision and recall{of}", "recall", "precision", tuple(series))


class Multilabel(TaskSpec):
    """Any number of labels a picture: a probability for each, and a threshold that val chooses."""

    kind = "multilabel"
    target_kind = "label sets"
    can_blend = True

    loss: Annotated[MultilabelLoss, Kinds()] = Bce()
    """What each label is learned by."""
    positive_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """How much more a label's presence counts than its absence: a number for each class, in order; `balanced` makes \
both count alike."""

    def metrics(self) -> dict[str, Direction]:
        best: Direction = "max"
        return dict.fromkeys(("mAP", "f1", "micro_f1", "exact"), best) | {"ece": "min"}

    def data_problem(self, facts: Facts) -> str | None:
        if not facts.classes:
            return "multilabel needs a class; no training picture has a label"
        if isinstance(self.positive_weights, list) and len(self.positive_weights) != len(facts.classes):
            return (
                f"positive_weights has {len(self.positive_weights)} numbers; the data has {len(facts.classes)} classes"
            )
        if self.positive_weights == "balanced" and 0 in facts.class_counts:
            missing = facts.classes[facts.class_counts.index(0)]
            return f"positive_weights: balanced needs pictures of every class; {missing!r} has none"
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        return None if bool(targets["present"].any()) else "no picture has a label; give it some that have"

    def data_notes(self, facts: Facts) -> list[str]:
        weights = self._weights(facts)
        return [] if weights is None else [f"positive weights: {format_per_class(facts.classes, weights.tolist())}"]

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return nn.Linear(require_vector("its linear layer", in_shape), len(facts.classes))

    def criterion(self, facts: Facts) -> Criterion:
        return MultilabelCriterion(self.loss, self._weights(facts))

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """How far each label is present, between 0 and 1."""
        mine, others = (each["present"].float() for each in (targets, partners))
        return {**targets, "present": torch.lerp(others, mine, own_B[:, None])}

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        rows = targets["present"].tolist()
        found = [[(part, name) for part, name in zip(row, facts.classes, strict=True) if part] for row in rows]
        return [", ".join(name if part == 1 else f"{name} {part:.2f}" for part, name in row) or "none" for row in found]

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

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(ours, theirs, facts)
        return None if gap <= 1e-4 else f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        least = list(self.thresholds(facts).values())
        return [
            {
                "labels": [name for name, p, t in zip(facts.classes, row, least, strict=True) if p >= t],
                "probabilities": dict(zip(facts.classes, row, strict=True)),
            }
            for row in results["probabilities"].tolist()
        ]

    def _weights(self, facts: Facts) -> Tensor | None:
        if self.positive_weights is None:
            return None
        if isinstance(self.positive_weights, list):
            return torch.tensor(self.positive_weights)
        if not facts.class_counts:  # not counted yet
            return None
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return ((facts.counts["train"] - counts).clamp(min=1) / counts).float()
