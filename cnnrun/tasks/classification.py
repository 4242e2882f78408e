"""Classification: one label per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cnnrun.base.counts import format_count
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

    Smoothing takes the share `label_smoothing` of each label and spreads it evenly over all classes (Szegedy et al.
    2016, eq. 13). The whole loss of an image is multiplied by the weight of its label. `F.cross_entropy` instead
    multiplies the smoothed part by every class's weight, which pulls rare classes up in images that show none of them.
    For a blended image with the share t_k of class k, the loss is the sum over k of t_k * weight[k] * smoothed
    cross-entropy of label k.

    The mean divides by the number of samples, where `F.cross_entropy` divides by the sum of their weights. A batch that
    is split into micro-batches therefore has the same loss and gradient.
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
            uniform_loss_B = weight_B * -outputs_BK.log_softmax(1).mean(1)
            loss_B = (1 - self.label_smoothing) * loss_B + self.label_smoothing * uniform_loss_B
        return {"cross_entropy": loss_B.mean()}


class ConvClassifier(nn.Module):
    """Feature maps [B, C, H, W] -> logits [B, K]: 1x1 convolution to one map per class, ReLU, global average pooling.

    Source: SqueezeNet (Iandola et al. 2016).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))


class SoftmaxDecoder(nn.Module):
    """Raw outputs [B, K] -> class probabilities: the softmax of outputs / temperature (Guo et al. 2017, eq. 9)."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"probabilities": (outputs / self.temperature).softmax(1)}


class ClassifyMeter:
    """Meter of accuracy, top-k accuracy, precision, recall and F1, calibration error and the confusion matrix."""

    def __init__(self, classes: tuple[str, ...], top_k: int) -> None:
        self._classes, self._top_k, self._batches = classes, top_k, BatchTensors()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        probabilities, labels = results["probabilities"], targets["labels"]
        confidence, predicted = probabilities.max(1)
        in_top_k = (probabilities.topk(min(self._top_k, len(self._classes)), 1).indices == labels[:, None]).any(1)
        self._batches.add(labels=labels, predicted=predicted, confidence=confidence.double(), in_top_k=in_top_k)

    def compute(self, tables: bool = True) -> Measurement:
        arrays = self._batches.concatenate()
        predictions = SingleLabelPredictions(len(self._classes), **arrays)
        metrics = predictions.metrics(self._top_k)
        confusion = {"confusion": predictions.confusion_KK().tolist()}
        if not tables:
            return Measurement(metrics, matrices=confusion)
        rows = {"per_class": predictions.per_class_rows(self._classes), "reliability": predictions.reliability_rows()}
        return Measurement(
            metrics,
            rows,
            confusion,
            plots=(reliability_plot(rows["reliability"]),),
            bootstrap_draws=bootstrap(lambda weight_N: predictions.metrics(self._top_k, weight_N), len(predictions)),
            correct={"accuracy": predictions.correct, f"top_{self._top_k}": arrays["in_top_k"]},
        )


class Classify(TaskSpec):
    """One label per image: a linear or convolutional classifier with cross-entropy gives class probabilities."""

    kind = "classify"
    can_blend = True

    classifier: Literal["linear", "conv"] = "linear"
    """The last layer: `linear` takes a vector; `conv` makes one map per class (1x1 convolution, then ReLU) and takes \
the mean of each map."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of each label that is spread evenly over all classes."""
    class_weights: Literal["balanced"] | list[Weight] | None = None
    """Factor on the loss of each class's images: a number for each class, in order; `balanced` uses the inverse of \
each class's frequency."""
    top_k: int = Field(5, ge=2)
    """Also measure top-k accuracy: how often the label is among the k most probable classes."""

    def metrics(self) -> dict[str, Direction]:
        rising: dict[str, Direction] = dict.fromkeys(
            ("accuracy", f"top_{self.top_k}", "precision", "recall", "f1"), "max"
        )
        return rising | {"ece": "min"}

    def data_problem(self, facts: Facts) -> str | None:
        if len(facts.classes) < 2:
            return f"classify needs two or more classes; the data has {len(facts.classes)}"
        if isinstance(self.class_weights, list) and len(self.class_weights) != len(facts.classes):
            return f"class_weights has {len(self.class_weights)} numbers; the data has {len(facts.classes)} classes"
        if self.class_weights == "balanced" and 0 in facts.class_counts:
            missing = facts.classes[facts.class_counts.index(0)]
            return f"class_weights: balanced needs images of every class; {missing!r} has none"
        return None

    def data_notes(self, facts: Facts) -> list[str]:
        weights = self._class_weights(facts)
        return [] if weights is None else [f"class weights: {format_per_class(facts.classes, weights.tolist())}"]

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        if self.classifier == "conv":
            return ConvClassifier(require_maps("its conv classifier", in_shape)[0], len(facts.classes))
        return nn.Linear(require_vector("its linear layer", in_shape), len(facts.classes))

    def criterion(self, facts: Facts) -> Criterion:
        return CrossEntropy(self.label_smoothing, self._class_weights(facts))

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """Replace the class indices by class probabilities [B, K]."""
        own_BK, partner_BK = (F.one_hot(part["labels"], len(facts.classes)).float() for part in (targets, partners))
        return {**targets, "labels": torch.lerp(partner_BK, own_BK, own_B[:, None])}

    def chance_loss(self, facts: Facts) -> float | None:
        weight, counts = self._class_weights(facts), torch.tensor(facts.class_counts, dtype=torch.float64)
        mean_weight = 1.0 if weight is None or not counts.sum() else float((weight * counts).sum() / counts.sum())
        return mean_weight * math.log(len(facts.classes))

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        labels = targets["labels"]
        if labels.dim() == 1:
            return [facts.classes[label] for label in labels.tolist()]
        blends = [
            [(share, name) for share, name in zip(row, facts.classes, strict=True) if share] for row in labels.tolist()
        ]
        return ["  ".join(f"{name} {share:.2f}" for share, name in sorted(blend, reverse=True)) for blend in blends]

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

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        expected_BK, actual_BK = expected["probabilities"], actual["probabilities"]
        gap = float((expected_BK - actual_BK).abs().max())
        if not gap <= 1e-4:
            return f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"
        top_two_B2 = expected_BK.topk(2, 1).values
        is_clear_B = top_two_B2[:, 0] - top_two_B2[:, 1] > 1e-3
        count = int((expected_BK.argmax(1) != actual_BK.argmax(1))[is_clear_B].sum())
        return (
            f"another class for {format_count(count, 'image')} whose best probability leads by 0.001" if count else None
        )

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        probabilities, labels = results["probabilities"].topk(min(self.top_k, len(facts.classes)), 1)
        return [
            {
                "label": facts.classes[indices[0]],
                "probability": row[0],
                "top": [{"label": facts.classes[k], "probability": p} for k, p in zip(indices, row, strict=True)],
            }
            for indices, row in zip(labels.tolist(), probabilities.tolist(), strict=True)
        ]

    def _class_weights(self, facts: Facts) -> Tensor | None:
        if self.class_weights is None or (self.class_weights == "balanced" and not facts.class_counts):  # not counted
            return None
        if isinstance(self.class_weights, list):
            return torch.tensor(self.class_weights)
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts)).float()
