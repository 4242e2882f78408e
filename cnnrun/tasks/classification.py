"""Classification: one label per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, format_per_class
from cnnrun.contracts.layer import Shape, require_feature_maps, require_vector
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
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
from cnnrun.tasks.classification_metrics import SingleLabelPredictions
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.temperature import reliability_plot, temperature_metadata

Weight = Annotated[float, Field(ge=0)]


class CrossEntropy(Criterion):
    """Mean over the batch of weight[label] * smoothed cross-entropy.

    Smoothing takes the share `label_smoothing` of each label and spreads it evenly over all classes (Szegedy et al.
    2016, eq. 13). The whole loss of an image is multiplied by the weight of its label. `F.cross_entropy` instead
    multiplies the smoothed part by every class's weight, which pulls rare classes up in images that show none of them.
    For a mixed image with the share t_k of class k, the loss is the sum over k of t_k * weight[k] * smoothed
    cross-entropy of label k.

    The mean divides by the number of samples, where `F.cross_entropy` divides by the sum of their weights. A batch that
    is split into micro-batches therefore has the same loss and gradient.
    """

    weight: Tensor | None

    def __init__(self, label_smoothing: float, weight_K: Tensor | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight_K, persistent=False)

    def forward(self, outputs_BK: Tensor, targets: Targets) -> dict[str, Tensor]:
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

    def update(self, results: Results, targets: Targets) -> None:
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


@dataclass(frozen=True)
class LabelPrediction(Prediction):
    """The most probable classes with their probabilities, the most probable one first."""

    top: Sequence[tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {**top[0], "top": top}

    def to_text(self) -> str:
        return "  ".join(f"{label} {probability:.3f}" for label, probability in self.top)

    def answer(self) -> str:
        return self.top[0][0]

    def csv_columns(self) -> list[str]:
        ranks = [f"{column} {rank}" for rank in range(2, len(self.top) + 1) for column in ("label", "probability")]
        return ["label", "probability", *ranks]

    def csv_rows(self) -> list[list[Any]]:
        return [[cell for entry in self.top for cell in entry]]


class Classify(TaskSpec):
    """One label per image: a linear or convolutional classifier with cross-entropy gives class probabilities."""

    kind = "classify"

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

    def requirements(self) -> Requirements:
        return Requirements(can_mix_targets=True)

    def metrics(self) -> dict[str, Direction]:
        directions: dict[str, Direction] = dict.fromkeys(
            ("accuracy", f"top_{self.top_k}", "precision", "recall", "f1"), "max"
        )
        return directions | {"ece": "min"}

    def check_data(self, facts: DataFacts) -> None:
        if len(facts.classes) < 2:
            raise DataError(f"task: classify needs two or more classes; the data has {len(facts.classes)}")
        check_class_weights("class_weights", self.class_weights, facts)

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self,
            facts,
            ClassifyLearning(self, facts),
            ClassifyMeasuring(self, facts),
            ClassifyPredicting(self, facts),
            ClassifyShowing(self, facts),
            ClassifyCalibration(),
        )

    def loss_weights(self, facts: DataFacts) -> Tensor | None:
        """Weight of each class's images in the loss; None if all are 1."""
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, list):
            return torch.tensor(self.class_weights)
        if not facts.class_counts:  # not counted yet
            return None
        counts = torch.tensor(facts.class_counts, dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts)).float()


@dataclass(frozen=True)
class ClassifyLearning(Learning):
    """A linear or convolutional classifier, and its cross-entropy."""

    spec: Classify
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        (in_shape,) = in_shapes
        classes = len(self.facts.classes)
        if self.spec.classifier == "conv":
            return ConvClassifier(require_feature_maps("its conv classifier", in_shape)[0], classes)
        return nn.Linear(require_vector("its linear layer", in_shape), classes)

    def build_criterion(self) -> Criterion:
        return CrossEntropy(self.spec.label_smoothing, self.spec.loss_weights(self.facts))

    def mix_targets(self, targets: Targets, partners: Targets, own_weight_B: Tensor) -> Targets:
        """Replace the class indices by class probabilities [B, K]."""
        classes = len(self.facts.classes)
        own_BK, partner_BK = (F.one_hot(part["labels"], classes).float() for part in (targets, partners))
        return {**targets, "labels": torch.lerp(partner_BK, own_BK, own_weight_B[:, None])}

    def guess_loss(self) -> float | None:
        weight, counts = self.spec.loss_weights(self.facts), torch.tensor(self.facts.class_counts, dtype=torch.float64)
        mean_weight = 1.0 if weight is None or not counts.sum() else float((weight * counts).sum() / counts.sum())
        return mean_weight * math.log(len(self.facts.classes))


@dataclass(frozen=True)
class ClassifyMeasuring(Measuring):
    """Accuracy and its relatives."""

    spec: Classify
    facts: DataFacts

    def build_meter(self, choices: Choices) -> ClassifyMeter:
        return ClassifyMeter(self.facts.classes, self.spec.top_k)

    def comparison_key(self) -> list[Any]:
        return list(self.facts.classes)


@dataclass(frozen=True)
class ClassifyPredicting(Predicting):
    """Class probabilities, and the most probable classes of an image."""

    spec: Classify
    facts: DataFacts

    def build_decoder(self, choices: Choices) -> SoftmaxDecoder:
        return SoftmaxDecoder(choices.temperature or 1.0)

    def result_shapes(self) -> dict[str, Shape]:
        return {"probabilities": (len(self.facts.classes),)}

    def metadata(self, choices: Choices) -> dict[str, Any]:
        return temperature_metadata(choices)

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[LabelPrediction]:
        classes = self.facts.classes
        probabilities, labels = results["probabilities"].topk(min(self.spec.top_k, len(classes)), 1)
        return [
            LabelPrediction([(classes[k], probability) for k, probability in zip(indices, row, strict=True)])
            for indices, row in zip(labels.tolist(), probabilities.tolist(), strict=True)
        ]

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        expected_BK, actual_BK = expected["probabilities"], actual["probabilities"]
        gap = float((expected_BK - actual_BK).abs().max())
        if not gap <= 1e-4:
            return f"probabilities differ by up to {gap:.2e} (allowed 1e-4)"
        top_two_B2 = expected_BK.topk(2, 1).values
        is_clear_B = top_two_B2[:, 0] - top_two_B2[:, 1] > 1e-3
        count = int((expected_BK.argmax(1) != actual_BK.argmax(1))[is_clear_B].sum())
        if not count:
            return None
        images = format_count(count, "image")
        return f"another class is predicted for {images}, although the two best probabilities differ by more than 0.001"


@dataclass(frozen=True)
class ClassifyShowing(Showing):
    """Class names, and probabilities to explain."""

    spec: Classify
    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        classes, labels = self.facts.classes, targets["labels"]
        if labels.dim() == 1:
            return [classes[label] for label in labels.tolist()]
        rows = [zip(row, classes, strict=True) for row in labels.tolist()]
        mixtures = [sorted(((share, name) for share, name in row if share), reverse=True) for row in rows]
        return ["  ".join(f"{name} {share:.2f}" for share, name in mixture) for mixture in mixtures]

    def data_notes(self) -> list[str]:
        weights = self.spec.loss_weights(self.facts)
        return [] if weights is None else [f"class weights: {format_per_class(self.facts.classes, weights.tolist())}"]

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        probabilities = SoftmaxDecoder(choices.temperature or 1.0)(outputs)["probabilities"]
        return ClassScores(self.facts.classes, outputs, probabilities, "probability", outputs.argmax(1))


class ClassifyCalibration(Calibration):
    """Calibration of the softmax."""

    error_metric = "ece"

    def negative_log_likelihood(self, outputs: Tensor, targets: Targets, temperature: float) -> float:
        return float(F.cross_entropy(outputs.double() / temperature, targets["labels"]))
