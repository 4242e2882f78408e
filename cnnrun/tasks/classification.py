"""One label a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cnnrun.contracts.facts import Facts, format_per_class
from cnnrun.contracts.layer import Shape, require_maps, require_vector
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.task import Criterion, Direction, TaskSpec
from cnnrun.tasks.classification_metrics import SingleLabelPredictions
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.temperature import TEMPERATURE, reliability_plot, temperature_metadata

Weight = Annotated[float, Field(ge=0)]


class CrossEntropy(Criterion):
    """Mean over the batch of weight[label] * smoothed cross-entropy.

    Smoothing takes `label_smoothing` of the label and spreads it evenly over all classes (Szegedy et al. 2016, eq. 13).
    The weight is that of the picture's own label and weighs the whole of it: torch's own weighs the smoothed part by
    every class's weight, which pulls rare classes up in pictures that show none of them. Of a mixed picture, which
    shows the parts t_k of the classes k, it is the sum over k of t_k * weight[k] * smoothed cross-entropy of label k.

    The mean divides by the number of samples, not by the sum of their weights as torch's own does: so a batch split
    into micro-batches has the same loss and gradient.
    """

    weight: Tensor | None

    def __init__(self, label_smoothing: float, weight_K: Tensor | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight_K, persistent=False)

    def forward(self, outputs_BK: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = targets["labels"]
        if self.weight is None:
            return {"cross_entropy": F.cross_entropy(outputs_BK, labels, label_smoothing=self.label_smoothing)}
        loss_B = F.cross_entropy(outputs_BK, labels, self.weight, reduction="none")
        if self.label_smoothing:
            weight_B = self.weight[labels] if labels.dim() == 1 else (labels * self.weight).sum(1)
            even_B = weight_B * -outputs_BK.log_softmax(1).mean(1)
            loss_B = (1 - self.label_smoothing) * loss_B + self.label_smoothing * even_B
        return {"cross_entropy": loss_B.mean()}


class ConvClassifier(nn.Module):
    """Feature maps [B, C, H, W] -> [B, K]: a map a class, ReLU, and the mean (SqueezeNet, Iandola et al. 2016)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))


class SoftmaxDecoder(nn.Module):
    """Raw outputs [B, K] -> the probability of each class, at a temperature (Guo et al. 2017, eq. 9)."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"probabilities": (outputs / self.temperature).softmax(1)}


class ClassifyMeter:
    """Accuracy, top-k, per-class precision, recall and F1, calibration error, confusion matrix."""

    def __init__(self, classes: tuple[str, ...], top_k: int) -> None:
        self._classes, self._top_k, self._kept = classes, top_k, BatchTensors()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        probabilities, labels = results["probabilities"], targets["labels"]
        confidence, predicted = probabilities.max(1)
        among = probabilities.topk(min(self._top_k, len(self._classes)), 1).indices == labels[:, None]
        self._kept.add(labels=labels, predicted=predicted, confidence=confidence.double(), among=among.any(1))

    def compute(self, tables: bool = True) -> Measurement:
        kept = self._kept.concatenate()
        found = SingleLabelPredictions(len(self._classes), **kept)
        numbers = found.metrics(self._top_k)
        confusion = {"confusion": found.confusion_KK().tolist()}
        if not tables:
            return Measurement(numbers, matrices=confusion)
        rows = {"per_class": found.per_class_rows(self._classes), "reliability": found.reliability_rows()}
        return Measurement(
            numbers,
            rows,
            confusion,
            plots=(reliability_plot(rows["reliability"]),),
            bootstrap_draws=bootstrap(lambda weight: found.metrics(self._top_k, weight), len(found)),
            correct={"accuracy": found.correct, f"top_{self._top_k}": kept["among"]},
        )


class Classify(TaskSpec):
    """One label a picture: a linear head, cross-entropy, probabilities."""

    kind = "classify"
    can_blend = True

    classifier: Literal["linear", "conv"] = "linear"
    """The last layer: `linear` over a vector; `conv` makes a map a class (1x1, then ReLU) and takes each map's mean."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The part of each label that is spread evenly over all classes."""
    class_weights: Literal["balanced"] | list[Weight] | None = None
    """What the loss of a picture of each class is multiplied by: `balanced` weighs each class by the inverse of its \
frequency; or a number for each class, in order."""
    top_k: int = Field(5, ge=2)
    """The second accuracy: the label is among the k likeliest."""

    def metrics(self) -> dict[str, Direction]:
        best: Direction = "max"
        return dict.fromkeys(("accuracy", f"top_{self.top_k}", "precision", "recall", "f1"), best) | {"ece": "min"}

    def data_problem(self, facts: Facts) -> str | None:
        if len(facts.classes) < 2:
            return f"classify needs two or more classes; the data has {len(facts.classes)}"
        if isinstance(self.class_weights, list) and len(self.class_weights) != len(facts.classes):
            return f"class_weights has {len(self.class_weights)} numbers; the data has {len(facts.classes)} classes"
        if self.class_weights == "balanced" and 0 in facts.class_counts:
            missing = facts.classes[facts.class_counts.index(0)]
            return f"class_weights: balanced needs pictures of every class; {missing!r} has none"
        return None

    def data_notes(self, facts: Facts) -> list[str]:
        weights = self._weights(facts)
        return [] if weights is None else [f"class weights: {format_per_class(facts.classes, weights.tolist())}"]

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        if self.classifier == "conv":
            return ConvClassifier(require_maps("its conv classifier", in_shape)[0], len(facts.classes))
        return nn.Linear(require_vector("its linear layer", in_shape), len(facts.classes))

    def criterion(self, facts: Facts) -> Criterion:
        return CrossEntropy(self.label_smoothing, self._weights(facts))

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """Probabilities [B, K] in the place of class numbers."""
        mine, others = (F.one_hot(each["labels"], len(facts.classes)).float() for each in (targets, partners))
        return {**targets, "labels": torch.lerp(others, mine, own_B[:, None])}

    def chance_loss(self, facts: Facts) -> float | None:
        weight, counts = self._weights(facts), torch.tensor(facts.class_counts, dtype=torch.float64)
        of_pictures = 1.0 if weight is None or not counts.sum() else float((weight * counts).sum() / counts.sum())
        return of_pictures * math.log(len(facts.classes))

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        labels = targets["labels"]
        if labels.dim() == 1:
            return [facts.classes[label] for label in labels.tolist()]
        shares = [
            [(part, name) for part, name in zip(row, facts.classes, strict=True) if part] for row in labels.tolist()
        ]
        return ["  ".join(f"{name} {part:.2f}" for part, name in sorted(row, reverse=True)) for row in shares]

    def decoder(self, facts: Facts) -> nn.Module:
        return SoftmaxDecoder(facts.chosen.get(TEMPERATURE, 1.0))

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        return ClassScores(
            facts.classes, outputs, self.decoder(facts)(outputs)["probabilities"], "probability", outputs.argmax(1)
        )

    def negative_log_likelihood(
        self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float
    ) -> float | None:
        return float(F.cross_entropy(outputs.double() / temperature, targets["labels"]))

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return temperature_metadata(facts)

    def meter(self, facts: Facts) -> ClassifyMeter:
        return ClassifyMeter(facts.classes, self.top_k)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        return {"probabilities": (len(facts.classes),)}

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        expected, got = ours["probabilities"], theirs["probabilities"]
        gap = float((expected - got).abs().max())
        if not gap <= 1e-4:
            return f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"
        best = expected.topk(2, 1).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        differ = int((expected.argmax(1) != got.argmax(1))[clear].sum())
        return f"{differ} clear predictions differ" if differ else None

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        values, labels = results["probabilities"].topk(min(self.top_k, len(facts.classes)), 1)
        return [
            {
                "label": facts.classes[places[0]],
                "probability": row[0],
                "top": [{"label": facts.classes[k], "probability": p} for k, p in zip(places, row, strict=True)],
            }
            for places, row in zip(labels.tolist(), values.tolist(), strict=True)
        ]

    def _weights(self, facts: Facts) -> Tensor | None:
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, list):
            return torch.tensor(self.class_weights)
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts)).float()
