"""Readings of data by `init`: source, task and reason; and requests of its user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, escape
from cnnrun.config.spec import union_members
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import TaskSpec
from cnnrun.tasks import TaskUnion


@dataclass(frozen=True)
class Reading:
    """A reading of data: the `source` of the config, the task, the reason, a name, and the tasks that it can serve.

    `notes` say what was found on the way, `questions` what else the data may be. `verifies_faces` is true if the task
    is to tell apart faces that `cnnrun faces` has aligned. `why_not` has the reason for a task that such data can serve
    and this cannot.
    """

    source: Any
    task: str
    reason: str
    name: str
    tasks: tuple[str, ...]
    notes: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    verifies_faces: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The sentence that says how the data is read, why, and how to say otherwise."""
        others = [f"--task {task}" for task in self.tasks if task != self.task]
        otherwise = f"; if it is not: {' or '.join(others)}" if others else ""
        return f"read as {self.task}, because {self.reason}{otherwise}"


@dataclass(frozen=True)
class Request:
    """Statements of the user about the data: the task and the columns of its targets; None where nothing is said."""

    task: str | None = None
    label: Sequence[str] | None = None

    @property
    def target_kind(self) -> TargetKind | None:
        """The kind of target that the task learns; None if no task is asked for."""
        specs: Sequence[type[TaskSpec]] = union_members(TaskUnion)  # type: ignore[assignment]
        return next((spec.target_kind for spec in specs if spec.kind == self.task), None)

    def check(self, reading: Reading) -> Reading:
        """Return the reading with the task that is asked for. Raises ConfigError if the data cannot serve it."""
        if self.task is None or self.task == reading.task:
            return reading
        if self.task not in reading.tasks:
            known = join_names(list(reading.tasks))
            reason = reading.why_not.get(self.task, f"this data serves {known}, because {reading.reason}")
            raise ConfigError(f"--task {escape(self.task)}: {reason}")
        source = reading.source
        if give := _GIVES.get(self.task):
            ((kind, settings),) = source.items()
            source = {kind: {**settings, "give": give}}
        said = "--task says so"
        return replace(reading, task=self.task, source=source, reason=said, questions=(), verifies_faces=False)


_GIVES = {
    "multilabel": "presence",
    "regress": "counts",
    "segment": "masks",
}  # what sources of boxes give to other tasks
