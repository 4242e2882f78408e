"""A config with a few of its images, and trainings on them, for the checks of the selftest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.task import Task
from cnnrun.data.dataset import Dataset
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment.preparation import PreparedTraining
from cnnrun.experiment.schema import Experiment
from cnnrun.training.learner import Learner
from cnnrun.training.optimizers import AdamW
from cnnrun.training.setup import TrainingSetup

# For checks that train for a few steps; the config's own optimizer and schedule are tuned for thousands.
GENTLE_OPTIMIZER = AdamW(lr=5e-4, weight_decay=0.0)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check; `passed` is None if the check does not apply."""

    check: str
    passed: bool | None
    found: str


@dataclass
class SelftestContext:
    """The config with a few of its images, and the networks trained on them."""

    training: PreparedTraining
    device: torch.device
    folder: Path
    learners: dict[str, Learner] = field(default_factory=dict)
    step_seconds: float = 0.0

    @property
    def experiment(self) -> Experiment:
        """The config, with short settings of training."""
        return self.training.experiment

    @property
    def data(self) -> Dataset:
        """The images."""
        return self.training.data

    @property
    def task(self) -> Task:
        """The task, bound to these images."""
        return self.experiment.task.bind(self.data.facts)

    def build_setup(self, name: str, data: Dataset | None = None, **train: Any) -> TrainingSetup:
        """Build the setup of a new training on these images, with other settings of training if given."""
        (self.folder / name).mkdir(exist_ok=True)
        training = replace(self.training.with_train(**train), data=data or self.data)
        return training.build_setup(self.device, Folder(self.folder / name))

    def first_batch(self, count: int) -> Batch:
        """Batch of the first `count` training images, without augmentation."""
        examples = self.data.splits["train"]
        is_selected = torch.zeros(len(examples), dtype=torch.bool)
        is_selected[:count] = True
        return next(batches_in_order(examples.select(is_selected), count, self.device))
