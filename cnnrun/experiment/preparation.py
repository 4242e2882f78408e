"""Preparation of a training: load and check everything that it needs, before its first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import DataFacts
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.assemble import build_setup, prepare_dataset
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_training_possible
from cnnrun.model.network import Network
from cnnrun.model.weights_file import Weights
from cnnrun.training.dtypes import Precision
from cnnrun.training.frozen_layers import recompute_reason, separate_trunk
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
        precision = _choose_precision(experiment, network, data.facts, device, ranks)
        experiment = experiment.with_train(precision=precision)
    return PreparedTraining(experiment, weights, data)


def _choose_precision(
    experiment: Experiment, network: Network, facts: DataFacts, device: torch.device, ranks: Ranks
) -> Precision:
    """Measure what the training's steps will compute; returns the first rank's choice."""
    spec, data = experiment.train, experiment.data
    batch = min(spec.batch, facts.counts["train"])
    step = StepSize(max(1, batch // spec.accumulate // ranks.world_size), facts.image_shape, device)
    stores_features = False
    frozen = spec.always_frozen
    if frozen:
        parts = separate_trunk(network, frozen)
        stores_features = not recompute_reason(parts[0] if parts else None, facts, data.augment, data.memory_gib)
    chosen: Precision = ranks.broadcast(lambda: choose_precision(network, frozen, step, stores_features))
    return chosen
