"""Preparation of a training: load and check everything that it needs, before its first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.ranks import Ranks
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.assemble import build_setup, prepare_dataset
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_training_possible
from cnnrun.model.weights_file import Weights
from cnnrun.training.precision import choose_precision
from cnnrun.training.setup import TrainingSetup
from cnnrun.training.step_time import StepSize


@dataclass(frozen=True)
class PreparedTraining:
    """A training that can begin: the config with its mean and std, its initial weights and its decoded data."""

    experiment: Experiment
    weights: Weights | None
    data: Dataset

    def build_setup(self, device: torch.device, run: Folder | None = None, ranks: Ranks | None = None) -> TrainingSetup:
        """Build the setup of the training, with a network of its own."""
        return build_setup(self.experiment, self.data, self.weights, device, run, ranks)

    def with_train(self, **settings: Any) -> PreparedTraining:
        """Return a copy with other settings of `train`."""
        return replace(self, experiment=self.experiment.with_train(**settings))


def prepare_training(
    experiment: Experiment,
    weights: Weights | None,
    device: torch.device,
    ranks: Ranks | None = None,
    data: Dataset | None = None,
) -> PreparedTraining:
    """Decode the data, unless `data` is given, check that a training can begin, and replace the precision `auto`.

    Raises ConfigError, DataError or CheckpointError.
    """
    ranks = ranks or Ranks()
    experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
    data = data or prepare_dataset(experiment)
    network = check_training_possible(experiment, data, weights, ranks.world_size).network
    if experiment.train.precision == "auto":
        spec = experiment.train
        batch = min(spec.batch, data.facts.counts["train"])
        step = StepSize(max(1, batch // spec.accumulate // ranks.world_size), data.facts.image_shape, device)
        precision = ranks.broadcast(lambda: choose_precision(network, spec.freeze, step))
        experiment = experiment.with_train(precision=precision)
    return PreparedTraining(experiment, weights, data)
