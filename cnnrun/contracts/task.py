"""Interface of a task, which decides the head, the loss, the metrics and the form of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from cnnrun.base.boxes import Mark
from cnnrun.config.spec import Kind
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.results import ClassScores, Measurement, Results, View

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class FeatureLevel:
    """A feature map that the head takes, with its receptive field and its stride in pixels of the input."""

    shape: Shape
    receptive_field: HeightWidth
    stride: tuple[float, float]


class Meter(Protocol):
    """Collector of results and targets, batch by batch, that computes metrics over all samples."""

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        """Add one batch."""
        ...

    def compute(self, tables: bool = True) -> Measurement:
        """Compute the measurement; without `tables` only the metrics and choices, which suffices after each epoch."""
        ...


class Criterion(nn.Module):
    """Module: (outputs, targets) -> named scalar losses, each a mean over the batch.

    Its parameters are trained with the network's. The loss of a batch must equal the mean over its parts, weighted by
    their sizes, so that the batch can be split into micro-batches.
    """

    def set_progress(self, done: float) -> None:
        """Set the fraction of the training that is done, from 0 to 1; called before each step."""


class TaskSpec(Kind):
    """A task of the YAML, and the factory of everything that depends on it.

    A task defines every method that raises NotImplementedError here; `blend_targets` only if it sets `can_blend`.
    """

    def metrics(self) -> dict[str, Direction]:
        """Names of the metrics of the meter, which `train.monitor` may name, and whether more or less is better."""
        raise NotImplementedError

    def data_problem(self, facts: Facts) -> str | None:
        """Reason that the task cannot use this data, or None."""
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        """Reason that metrics on a split with these targets would be meaningless, or None."""
        return None

    def undefined_metrics(self, targets: dict[str, Tensor]) -> dict[str, str]:
        """Metrics that are undefined on a split with these targets, each with what the split lacks."""
        return {}

    def data_notes(self, facts: Facts) -> list[str]:
        """Lines for the log about the effect of the settings on this data, such as class weights."""
        return []

    def feature_layers(self) -> list[str]:
        """Names of the layers whose outputs the head takes; empty for the output of the last layer."""
        return []

    def network_remarks(self, levels: Sequence[FeatureLevel], targets: dict[str, Tensor], facts: Facts) -> list[str]:
        """Lines of `cnnrun check` about how the feature levels suit the targets of the training split."""
        return []

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        """Build the head, which maps features of `in_shapes`, one argument each, to raw outputs. Raises ShapeError."""
        raise NotImplementedError

    def criterion(self, facts: Facts) -> Criterion:
        """Build the criterion, which computes the loss."""
        raise NotImplementedError

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """Mix the targets of blended images: the share `own_B` of each image is its own, the rest its partner's."""
        raise NotImplementedError

    def chance_loss(self, facts: Facts) -> float | None:
        """Loss of an untrained network that predicts at random, or None if it is unknown."""
        return None

    target_kind: ClassVar[str] = "labels"
    """Kind of targets that the task needs; see SourceSpec.target_kind."""
    is_open_set: ClassVar[bool] = False
    """True if the task is measured on classes that are not in train. Then val has no loss, and a class in two splits \
is a leak."""

    def harmful_augmentations(self) -> Sequence[str]:
        """Settings of `data.augment` that would falsify targets, as a rotation falsifies an angle."""
        return ()

    can_blend: ClassVar[bool] = False
    """True if the task has `blend_targets`; otherwise mixup and cutmix are refused."""

    def needs_class_batches(self) -> bool:
        """Return whether each batch must hold several images of a class, which a sampler then has to ensure."""
        return False

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        """Text of each sample's target, for people."""
        raise NotImplementedError

    def target_marks(self, targets: dict[str, Tensor], facts: Facts) -> list[list[Mark]] | None:
        """Boxes to draw for each sample's targets; None if the task has no boxes."""
        return None

    def result_marks(self, results: Results, facts: Facts) -> list[list[Mark]] | None:
        """Boxes to draw for each sample's results; None if the task has no boxes."""
        return None

    def assignment(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts) -> list[dict[str, Any]] | None:
        """Cells of the first sample that are assigned to objects, each as {cell, x, y, object, quality}.

        None if the task has no cells.
        """
        return None

    def decoder(self, facts: Facts) -> nn.Module:
        """Build the module from raw outputs to results, such as probabilities. It is part of the exported network."""
        raise NotImplementedError

    def meter(self, facts: Facts) -> Meter:
        """Build an empty meter."""
        raise NotImplementedError

    def negative_log_likelihood(
        self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float
    ) -> float | None:
        """Mean negative log-likelihood with probabilities at this temperature; None if the task has no probabilities.

        `decoder` uses the temperature in `Facts.chosen` instead.
        """
        return None

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        """Differentiable scores computed from raw outputs, for explanations."""
        raise NotImplementedError

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        """Name and shape (without the batch) of each result, in the order of the decoder's outputs."""
        raise NotImplementedError

    def metadata(self, facts: Facts) -> dict[str, Any]:
        """Metadata of an exported file that its user needs to interpret results, such as thresholds."""
        return {}

    def comparison_key(self, facts: Facts) -> list[Any]:
        """Key of what is measured. Two runs are comparable only if their keys are equal."""
        return list(facts.classes)

    def thresholds(self, facts: Facts) -> dict[str, float]:
        """Minimum score of each class's shown results; empty if all are shown."""
        return {}

    def largest_difference(self, expected: Results, actual: Results, facts: Facts) -> float:
        """Largest absolute difference between two results, for the export's record."""
        return max(float((expected[name] - actual[name]).abs().max()) for name in expected)

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        """Reason that an exported file's results (`actual`) differ from the network's (`expected`), or None."""
        raise NotImplementedError

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        """Each sample's result as plain data for people and JSON, in coordinates of the original image."""
        raise NotImplementedError
