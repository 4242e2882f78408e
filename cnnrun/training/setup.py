"""Everything that a training needs, fixed before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import ResourceError
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.task import Task
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Dataset
from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches, default_prefetch
from cnnrun.model.network import Network
from cnnrun.training.settings import Train, batch_problem, check_batch_size


@dataclass(frozen=True)
class TrainingSetup:
    """The inputs of a training: settings, network, task, data and device."""

    spec: Train
    network: Network
    task: Task
    dataset: Dataset
    augment: Augment
    seed: int
    device: torch.device
    run: Folder | None
    """The run's folder; None on ranks that write nothing."""
    memory_gib: float = 4.0
    prefetch: int | None = None
    reading_timeout: float = 120.0
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def facts(self) -> DataFacts:
        """The facts of the data."""
        return self.dataset.facts

    @property
    def train_count(self) -> int:
        """Number of training images."""
        return len(self.dataset.splits["train"])

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.spec.steps_per_epoch(self.train_count)

    def batches(self, micro_batch_count: int) -> TrainingBatches:
        """Build the training batches, each split into `micro_batch_count` micro-batches."""
        train = self.dataset.splits["train"]
        prefetch = default_prefetch(train, self.device) if self.prefetch is None else self.prefetch
        order = self.spec.sampler.order(train.targets, self.spec.batch)
        plan = BatchPlan(self.spec.batch, self.steps_per_epoch, self.seed, order, micro_batch_count)
        reading = BatchReading(self.device, prefetch, self.reading_timeout)
        return TrainingBatches(train, self.augment, plan, reading, self.task.learning.mix_targets, self.ranks)

    def check_batch_size(self) -> None:
        """Raise ConfigError if the batches do not fit the data, the network or the ranks."""
        needs_pairs = self.task.requirements.needs_class_batches
        check_batch_size(self.spec, self.train_count, self.network, self.ranks.world_size, needs_pairs)

    def double_micro_batches(self, count: int, reason: str) -> int:
        """Return twice the micro-batch count. Raises ResourceError, with `reason`, if there are too few images."""
        needs_pairs, doubled = self.task.requirements.needs_class_batches, 2 * count
        problem = batch_problem(self.spec, self.train_count, self.network, self.ranks.world_size, doubled, needs_pairs)
        if problem or self.spec.smallest_batch(self.train_count) < doubled:
            line = "memory ran out with micro-batches as small as they can be"
            raise ResourceError(f"{line} ({problem or 'one image'}): {reason}")
        return doubled
