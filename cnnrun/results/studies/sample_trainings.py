"""A config with a few of its images, and trainings on them, for the checks of the selftest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.contracts.batch import Batch
from cnnrun.data.dataset import Dataset
from cnnrun.data.training_batches import batches_in_order
from cnnrun.experiment import assemble
from cnnrun.experiment.schema import Experiment
from cnnrun.model.weights_file import Weights
from cnnrun.training.learner import Job, Learner
from cnnrun.training.optimizers import AdamW

# For checks that train for a few steps; the config's own optimizer and schedule are tuned for thousands.
GENTLE_OPTIMIZER = AdamW(lr=5e-4, weight_decay=0.0)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check; `passed` is None if the check does not apply."""

    check: str
    passed: bool | None
    found: str


@dataclass
class SelftestBench:
    """The config with a few of its images, and the networks trained on them."""

    experiment: Experiment
    data: Dataset
    weights: Weights | None
    device: torch.device
    folder: Path
    learners: dict[str, Learner] = field(default_factory=dict)
    step_seconds: float = 0.0

    def make_job(self, name: str, data: Dataset | None = None, **train: Any) -> Job:
        """Assemble a new job on these images, with other settings of training if given."""
        spec = self.experiment.train.model_copy(update=train)
        experiment = self.experiment.model_copy(update={"train": spec})
        (self.folder / name).mkdir(exist_ok=True)
        return assemble.assemble_job(
            experiment, data or self.data, self.weights, Folder(self.folder / name), self.device
        )

    def first_batch(self, count: int) -> Batch:
        """Batch of the first `count` training images, without augmentation."""
        examples = self.data.splits["train"]
        is_selected = torch.zeros(len(examples), dtype=torch.bool)
        is_selected[:count] = True
        return next(batches_in_order(examples.select(is_selected), count, self.device))
