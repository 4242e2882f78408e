"""A task as the config says it (`TaskSpec`), and the task bound to the facts of its data (`Task`).

A task is made of parts; everything else in cnnrun works with the parts. A part that a task lacks is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cnnrun.config.spec import Kind
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task_parts import (
    Calibration,
    CellAssignment,
    Direction,
    Learning,
    Matching,
    Measuring,
    Predicting,
    Showing,
)


@dataclass(frozen=True)
class Requirements:
    """Requirements of a task on the other sections of a config; it is known before the data is read."""

    feature_layers: Sequence[str] = ()
    """Names of the layers whose outputs the head takes; empty for the output of the last layer."""
    can_mix_targets: bool = False
    """True if the task has `Learning.mix_targets`; otherwise mixup and cutmix are refused."""
    needs_class_batches: bool = False
    """True if each batch must hold several images of a class, which a sampler then has to ensure."""
    has_unseen_classes: bool = False
    """True if the task is measured on classes that are not in train: val has no loss, and a class in two splits is a \
leak."""
    averages_mirror: bool = False
    """True if a network that is not training gives the mean of its outputs for an image and its mirror image."""
    invalid_transforms: Sequence[str] = ()
    """Settings of `data.augment` that the targets cannot follow, as an angle cannot follow a rotation."""


@dataclass(frozen=True)
class Task:
    """A task bound to the facts of its data."""

    spec: TaskSpec
    facts: DataFacts
    learning: Learning
    measuring: Measuring
    predicting: Predicting
    showing: Showing
    calibration: Calibration | None = None
    matching: Matching | None = None
    cells: CellAssignment | None = None

    @property
    def kind(self) -> str:
        """The task's word in the YAML, for messages."""
        return self.spec.kind

    @property
    def requirements(self) -> Requirements:
        """Requirements of the task on the config."""
        return self.spec.requirements()

    def is_comparable_with(self, other: Task) -> bool:
        """Return whether both are the same kind of task on the same classes or numbers."""
        is_same_kind = type(self.spec) is type(other.spec)
        return is_same_kind and self.measuring.comparison_key() == other.measuring.comparison_key()


class TaskSpec(Kind):
    """A task as the config says it: its settings, what they require of other sections, and its parts once bound."""

    target_kind: ClassVar[TargetKind] = TargetKind.LABELS
    """Kind of targets that the task learns; a source must give it."""

    def requirements(self) -> Requirements:
        """Return what the task requires of the other sections of the config."""
        return Requirements()

    def metrics(self) -> dict[str, Direction]:
        """Names of the meter's metrics, which `train.monitor` may name, and whether more or less is better."""
        raise NotImplementedError

    def bind(self, facts: DataFacts) -> Task:
        """Bind the task to what is known of its data. Raises DataError or ConfigError if this data cannot serve.

        The data can be judged only when it has been listed; for facts without counts nothing is refused.
        """
        if facts.counts:
            self.check_data(facts)
        return self.assemble(facts)

    def check_data(self, facts: DataFacts) -> None:
        """Raise DataError if the data lacks what the task needs, or ConfigError if a setting does not fit the data."""

    def assemble(self, facts: DataFacts) -> Task:
        """Assemble the task's parts for data with these facts."""
        raise NotImplementedError
