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
from cnnrun.contracts.facts import Facts, of_classes
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.layer import Shape, need_vector
from cnnrun.contracts.results import Kept, Measured, Results, Said, View
from cnnrun.contracts.task import Better, Criterion, TaskSpec
from cnnrun.tasks.classification_metrics import Present
from cnnrun.tasks.intervals import spread
from cnnrun.tasks.temperature import TEMPERATURE, reliability, told_temperature

_TINY = 1e-6
_MOST_LINES, _MOST_POINTS = 10, 200  # classes in a figure, and points of each
THRESHOLD = 0.5  # of a class for which val has chosen none


class LabelLoss(Kind):
    """A loss of each label on its own."""

    def each(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        """The loss of each label, [B, K].

        `present` is 0, 1, or between where pictures are mixed. `weight` multiplies what a label costs where it is
        present, or by so much of it as is.
        """
        raise NotImplementedError


class Bce(LabelLoss):
    """Binary cross-entropy."""

    kind = "bce"

    def each(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit_BK, present_BK, pos_weight=weight_K, reduction="none")


class Focal(LabelLoss):
    """Binary cross-entropy that minds easy labels less (Lin et al. 2017, eq. 4).

    Of mixed labels as torchvision's: cross-entropy with the part t, times (t * (1 - p) + (1 - t) * p)^gamma.
    """

    kind = "focal"
    main = "gamma"

    gamma: float = Field(2.0, ge=0)
    """The exponent of how wrong it is; 0 is `bce`."""

    def each(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        wrong = present_BK * (1 - score) + (1 - present_BK) * score
        # A root has no slope at 0, where nothing is left to learn.
        return wrong.clamp(min=_TINY).pow(self.gamma) * Bce().each(logit_BK, present_BK, weight_K)


class Asymmetric(LabelLoss):
    """Focal with an exponent of its own for absent labels, of which the easiest count nothing (Ridnik et al. 2021)."""

    kind = "asymmetric"

    positive: float = Field(0.0, ge=0)
    """The exponent where the label is present (gamma+)."""
    negative: float = Field(4.0, ge=0)
    """The exponent where it is absent (gamma-)."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Absent labels of a probability below this count nothing."""

    def each(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        shifted = (score - self.margin).clamp(min=0, max=1 - _TINY)  # eq. 5; 1 is as near as a margin comes to none
        there = (1 - score).clamp(min=_TINY).pow(self.positive) * F.logsigmoid(logit_BK)
        absent = F.logsigmoid(-logit_BK) if self.margin == 0 else torch.log1p(-shifted)
        absent = shifted.clamp(min=_TINY).pow(self.negative) * absent
        weight = 1.0 if weight_K is None else weight_K
        return -(weight * present_BK * there + (1 - present_BK) * absent)


Label = Bce | Focal | Asymmetric


class Labelled(Criterion):
    """The mean over labels and pictures."""

    weight: Tensor | None

    def __init__(self, loss: LabelLoss, weight_K: Tensor | None) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("weight", weight_K, persistent=False)

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.loss.kind: self.loss.each(outputs, targets["present"].to(outputs.dtype), self.weight).mean()}


class Scores(nn.Module):
    """Raw outputs [B, K] -> the probability that each class is there, at a temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"probabilities": (outputs / self.temperature).sigmoid()}


class MultilabelMeter:
    """mAP, F1 at each class's threshold, calibration; and the thresholds that would be best here."""

    def __init__(self, classes: tuple[str, ...], thresholds: Sequence[float]) -> None:
        self._classes, self._thresholds, self._kept = classes, np.array(thresholds), Kept()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._kept.add(score=results["probabilities"].double(), present=targets["present"].bool())

    def compute(self, tables: bool = True) -> Measured:
        kept = self._kept.all()
        found = Present(kept["score"], kept["present"], self._thresholds)
        best = found.best_thresholds()
        chosen = {f"threshold of {name}": value for name, value in zip(self._classes, best, strict=True)}
        numbers = found.numbers()
        if not tables:
            return Measured(numbers, chosen=chosen)
        rows = {"per_class": found.per_class(self._classes, self._thresholds), "reliability": found.reliability()}
        return Measured(
            numbers,
            rows,
            chosen=chosen,
            plots=(
                _precision_recall(found, self._classes, kept["present"].sum(0) > 0),
                reliability(rows["reliability"]),
            ),
            spread=spread(found.numbers, len(found)),
            right={"exact": found.exact},
        )


def _precision_recall(found: Present, classes: Sequence[str], known_K: NDArray[np.bool_]) -> Plot:
    """A line for each of the first classes that some picture has; the title says where there are more."""
    series, known = [], np.flatnonzero(known_K)
    for k in known[:_MOST_LINES].tolist():
        recall, precision = found.curve(k)
        some = np.unique(np.linspace(0, len(recall) - 1, _MOST_POINTS).round().astype(int))
        series.append(Series(classes[k], recall[some].tolist(), precision[some].tolist()))
    of = f" of the first {_MOST_LINES} of {len(known):,} classes" if len(known) > _MOST_LINES else ""
    return Plot(f"Precision and recall{of}", "recall", "precision", tuple(series))


class Multilabel(TaskSpec):
    """Any number of labels a picture: a probability for each, and a threshold that val chooses."""

    kind = "multilabel"
    targets = "label sets"
    mixes = True

    loss: Annotated[Label, Kinds()] = Bce()
    """What each label is learned by."""
    positive_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """How much more a label's presence counts than its absence: a number for each class, in order; `balanced` makes \
both count alike."""

    def numbers(self) -> dict[str, Better]:
        best: Better = "max"
        return dict.fromkeys(("mAP", "f1", "micro_f1", "exact"), best) | {"ece": "min"}

    def problem(self, facts: Facts) -> str | None:
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

    def unmeasurable(self, targets: dict[str, Tensor]) -> str | None:
        return None if bool(targets["present"].any()) else "no picture has a label; give it some that have"

    def notes(self, facts: Facts) -> list[str]:
        weights = self._weights(facts)
        return [] if weights is None else [f"positive weights: {of_classes(facts.classes, weights.tolist())}"]

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return nn.Linear(need_vector("its linear layer", in_shape), len(facts.classes))

    def criterion(self, facts: Facts) -> Criterion:
        return Labelled(self.loss, self._weights(facts))

    def blend(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """How far each label is present, between 0 and 1."""
        mine, others = (each["present"].float() for each in (targets, partners))
        return {**targets, "present": torch.lerp(others, mine, own_B[:, None])}

    def words(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        rows = targets["present"].tolist()
        found = [[(part, name) for part, name in zip(row, facts.classes, strict=True) if part] for row in rows]
        return [", ".join(name if part == 1 else f"{name} {part:.2f}" for part, name in row) or "none" for row in found]

    def thresholds(self, facts: Facts) -> dict[str, float]:
        return {name: facts.chosen.get(f"threshold of {name}", THRESHOLD) for name in facts.classes}

    def decoder(self, facts: Facts) -> nn.Module:
        return Scores(facts.chosen.get(TEMPERATURE, 1.0))

    def meter(self, facts: Facts) -> MultilabelMeter:
        return MultilabelMeter(facts.classes, list(self.thresholds(facts).values()))

    def said(self, outputs: Tensor, facts: Facts) -> Said:
        return Said(
            facts.classes, outputs, self.decoder(facts)(outputs)["probabilities"], "probability", outputs.argmax(1)
        )

    def nll(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float) -> float | None:
        present = targets["present"].double()
        return float(F.binary_cross_entropy_with_logits(outputs.double() / temperature, present))

    def signature(self, facts: Facts) -> dict[str, Shape]:
        return {"probabilities": (len(facts.classes),)}

    def meaning(self, facts: Facts) -> dict[str, Any]:
        return {"thresholds": self.thresholds(facts), **told_temperature(facts)}

    def agree(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        gap = self.gap(ours, theirs, facts)
        return None if gap <= 1e-4 else f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"

    def rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
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
