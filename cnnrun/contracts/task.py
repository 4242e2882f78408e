"""What a task promises: what the network is for, and everything that follows from it."""

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
    """A feature map that the head takes: its shape, what a cell sees and how far the next one is, in pixels."""

    shape: Shape
    receptive_field: HeightWidth
    stride: tuple[float, float]


class Meter(Protocol):
    """Collects results and targets batch by batch; each sample counts once."""

    def update(self, results: Results, targets: dict[str, Tensor]) -> None: ...

    def compute(self, tables: bool = True) -> Measurement:
        """What was found; without `tables` the numbers alone and what is chosen, as after each epoch."""
        ...


class Criterion(nn.Module):
    """(outputs, targets) -> dict of named scalar losses, means over the batch; its parameters train with the network's.

    The mean of a batch's parts, weighted by their sizes, is the batch's: so it may be split into micro-batches.
    """

    def set_progress(self, done: float) -> None:
        """Before each step: which part of the training is done, for what grows with it."""


class TaskSpec(Kind):
    """What the network is for, in five words (head, criterion, decode, meter, signature).

    And one for people (rows), and one for mixup (blend).
    """

    def metrics(self) -> dict[str, Direction]:
        """The headline numbers that the meter gives, and which way is better: what `train.monitor` may name."""
        raise NotImplementedError

    def data_problem(self, facts: Facts) -> str | None:
        """Why this data cannot serve this task, or None."""
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        """Why the numbers of a split with these targets (`dataset.flat`) would mean nothing, or None."""
        return None

    def undefined_metrics(self, targets: dict[str, Tensor]) -> dict[str, str]:
        """The numbers that are not defined for a split with these targets, each with what the split lacks."""
        return {}

    def data_notes(self, facts: Facts) -> list[str]:
        """What the settings come to on this data, where that is worth a line in the log."""
        return []

    def feature_layers(self) -> list[str]:
        """The names of the layers whose outputs the head takes; empty for the last layer's."""
        return []

    def network_remarks(self, levels: Sequence[FeatureLevel], targets: dict[str, Tensor], facts: Facts) -> list[str]:
        """What `check` should say of the network's levels and all training targets (`dataset.flat`), a line each."""
        return []

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        """The last layer: features of `in_shapes`, an argument each -> raw outputs. Raises CannotPass."""
        raise NotImplementedError

    def criterion(self, facts: Facts) -> Criterion:
        """What the network learns by."""
        raise NotImplementedError

    def blend_targets(
        self, targets: dict[str, Tensor], partners: dict[str, Tensor], own_B: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """The targets of pictures of which the part `own_B` is their own and the rest their partners'."""
        raise NotImplementedError

    def chance_loss(self, facts: Facts) -> float | None:
        """The loss of a network that knows nothing, where that is known."""
        return None

    target_kind: ClassVar[str] = "labels"
    """What the data must know of each picture, in the words of SourceSpec."""
    is_open_set: ClassVar[bool] = False
    """Whether it is measured on classes that it never learned: then val has no loss, and a class in two splits is a \
leak."""

    def harmful_augmentations(self) -> Sequence[str]:
        """The settings of `data.augment` that would make targets untrue, such as a turn of the picture an angle."""
        return ()

    can_blend: ClassVar[bool] = False
    """Whether the task has a `blend`: else mixup and cutmix are refused."""

    def needs_class_batches(self) -> bool:
        """Whether it learns from pictures of a class that come in one batch: a sampler must put them there."""
        return False

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        """Each sample's target for people."""
        raise NotImplementedError

    def target_marks(self, targets: dict[str, Tensor], facts: Facts) -> list[list[Mark]] | None:
        """What to draw on each sample's picture for its targets; None where nothing has a place."""
        return None

    def result_marks(self, results: Results, facts: Facts) -> list[list[Mark]] | None:
        """So for results."""
        return None

    def assignment(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts) -> list[dict[str, Any]] | None:
        """The cells of the first sample that learn objects: {cell, x, y, object, quality} each; None without cells."""
        return None

    def decoder(self, facts: Facts) -> nn.Module:
        """A module: raw outputs -> results in the user's terms. Traced into the exported graph."""
        raise NotImplementedError

    def meter(self, facts: Facts) -> Meter:
        """A fresh meter."""
        raise NotImplementedError

    def negative_log_likelihood(
        self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float
    ) -> float | None:
        """The mean negative log-likelihood where probabilities are those of this temperature; None without any.

        `decoder` goes by the one in `Facts.chosen`.
        """
        return None

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        """What raw outputs say, with gradients: what explanations explain."""
        raise NotImplementedError

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        """Name and shape (without the batch) of each result, in the order of `decode`."""
        raise NotImplementedError

    def metadata(self, facts: Facts) -> dict[str, Any]:
        """What a user of an exported file needs to know of its results, by name: kept in the file."""
        return {}

    def comparison_key(self, facts: Facts) -> list[Any]:
        """What the numbers are of: networks are compared where it is the same."""
        return list(facts.classes)

    def thresholds(self, facts: Facts) -> dict[str, float]:
        """The score from which each class's results are shown; empty where all are."""
        return {}

    def largest_difference(self, ours: Results, theirs: Results, facts: Facts) -> float:
        """The largest difference of two results, for people."""
        return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        """Why an artefact's results are not the network's, or None: the export's parity check."""
        raise NotImplementedError

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        """Each sample's result as plain data for people and JSON, in the terms of the picture that was given."""
        raise NotImplementedError
