"""Build the dataset, the network, the training setup and the run folder of an experiment."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cnnrun.base.atomic_files import Folder, json_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.base.progress import progress_bar, say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.task import Task
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.weights_source import read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import BuiltNetwork, Network, build_network, materialize
from cnnrun.model.weights_file import Weights
from cnnrun.training import run_folder
from cnnrun.training.frozen_layers import layers_until
from cnnrun.training.run_records import (
    CONFIG,
    DATA_LIST,
    FACTS,
    INITIAL_WEIGHTS,
)
from cnnrun.training.settings import check_batch_size, check_schedule
from cnnrun.training.setup import TrainingSetup


def prepare_dataset(
    experiment: Experiment, source_index: SourceIndex | None = None, splits: Sequence[str] | None = None
) -> Dataset:
    """Decode the experiment's data: all splits, or only those in `splits`. Raises DataError."""
    return build_dataset(experiment.data, source_index or index_source(experiment.data), progress_bar, splits)


def build_experiment_network(experiment: Experiment, task: Task) -> BuiltNetwork:
    """Build the experiment's network for its bound task, without memory. Raises ConfigError."""
    try:
        return build_network(experiment.model.layers, task)
    except BuildError as error:
        raise ConfigError(*(problem.message for problem in error.problems)) from None


def load_initial_weights(experiment: Experiment) -> Weights | None:
    """Read the weights in `model.weights`; None if the config names none. Raises CheckpointError."""
    return read_weights(Path(experiment.model.weights)) if experiment.model.weights else None


def build_checked_network(
    experiment: Experiment, facts: DataFacts, weights: Weights | None = None, ranks: int = 1
) -> BuiltNetwork:
    """Build the network, without memory, after checking that task, sampler, batch, data and weights fit together.

    Raises ConfigError, DataError or CheckpointError.
    """
    task = experiment.task.bind(facts)
    for split in ("train", "val"):
        if split not in facts.counts:
            raise DataError(f"the data has no {split} split; give data.split.{split} a part of the training images")
    if problem := experiment.train.sampler.batch_problem(facts.class_counts, experiment.train.batch):
        raise ConfigError(f"train.sampler: {problem}")
    built_network = build_experiment_network(experiment, task)
    check_batch_size(
        experiment.train, facts.counts["train"], built_network.network, ranks, task.requirements.needs_class_batches
    )
    check_schedule(experiment.train, facts.counts["train"])
    if weights:
        match_initial_weights(experiment, built_network.network, weights, facts)
    return built_network


def match_initial_weights(
    experiment: Experiment, network: Network, weights: Weights, facts: DataFacts
) -> dict[str, str]:
    """Map tensor names of the network to those of the initial weights. Raises CheckpointError that lists mismatches."""
    try:
        return weights_file.match_weights(network, weights, experiment.model.until, experiment.task.bind(facts))
    except tensor_matching.TensorMismatchError as error:
        raise CheckpointError(
            *error.message_lines(f"{experiment.model.weights}: not weights of this network")
        ) from None


def build_setup(
    experiment: Experiment,
    data: Dataset,
    weights: Weights | None,
    device: torch.device,
    run: Folder | None = None,
    ranks: Ranks | None = None,
) -> TrainingSetup:
    """Build the setup of a training. The network starts from `weights`, or else from random ones."""
    network = build_checked_network(experiment, data.facts).network
    matches = match_initial_weights(experiment, network, weights, data.facts) if weights else {}
    network = materialize(network, experiment.seed)
    if weights:
        _start_from_weights(experiment, network, weights, matches)
    return TrainingSetup(
        spec=experiment.train,
        network=network,
        task=experiment.task.bind(data.facts),
        dataset=data,
        augment=experiment.data.augment,
        seed=experiment.seed,
        device=device,
        run=run,
        memory_gib=experiment.data.memory_gib,
        prefetch=experiment.data.prefetch,
        reading_timeout=experiment.data.timeout,
        ranks=ranks or Ranks(),
    )


def _start_from_weights(experiment: Experiment, network: Network, weights: Weights, matches: dict[str, str]) -> None:
    """Load the matched weights, and log which tensors keep random ones."""
    new_names = weights_file.load_weights(network, weights, matches)
    matched = f"{format_count(len(matches), 'tensor')} from {experiment.model.weights}"
    say(f"{matched}; randomly initialised: {join_names(new_names, 4) or 'none'}")
    if weights.facts is None and experiment.data.image.mean is None:
        say(f"{experiment.model.weights} does not say which mean and std it was trained with; this data's are used")
    frozen = tuple(f"layers.{name}." for name in layers_until(network, experiment.train.freeze))
    if frozen and any(name.startswith(frozen) for name in new_names):
        say("train.freeze freezes layers that are not in the weights: they keep their random weights")


def create_run(
    experiment: Experiment,
    data: Dataset,
    weights: Weights | None,
    runs: Path,
    more_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Create a run folder in `runs` with the resolved config, the data facts, the file list and the weights' digest.

    `more_files` are further files, by their paths in the folder.
    """
    files = {**(more_files or {}), CONFIG: experiment.with_facts(data.facts).to_yaml().encode()}
    files[FACTS] = json_bytes(data.facts.to_json())
    if data.file_listings:
        files[DATA_LIST] = gzip.compress("\n".join(data.listing_lines()).encode(), 1)
    if data.skipped_samples:
        files["skipped.jsonl"] = "".join(json.dumps(sample) + "\n" for sample in data.skipped_samples).encode()
    if weights:
        record = {"path": experiment.model.weights, "sha256": weights.digest}
        files[INITIAL_WEIGHTS] = f"{json.dumps(record)}\n".encode()
    run = run_folder.create_run_folder(runs, experiment.name, files)
    if data.skipped_samples:
        say(f"images left out: {len(data.skipped_samples):,}; {run / 'skipped.jsonl'} lists them")
    return run
