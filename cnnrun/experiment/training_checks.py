"""Checks that an experiment can be trained on its data: the same answer for whoever asks, before anything is made."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from cnnrun.base.errors import DataError
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import format_per_class
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.assemble import build_checked_network, load_initial_weights, prepare_dataset
from cnnrun.experiment.schema import Experiment
from cnnrun.model.network import BuiltNetwork
from cnnrun.model.weights_file import Weights
from cnnrun.training.settings import refuse_undefined_monitor


def prepare_training(experiment: Experiment) -> tuple[Experiment, Weights | None, Dataset]:
    """The experiment, the weights it starts from and its data, once everything is known to fit.

    Raises ConfigError, DataError or CheckpointError, as `train` would.
    """
    given = load_initial_weights(experiment)
    experiment = experiment.with_statistics_of_weights(given.facts if given else None)
    data = prepare_dataset(experiment)
    refuse_unlearnable(experiment, data, given)
    return experiment, given, data


def refuse_unlearnable(experiment: Experiment, data: Dataset, given: Weights | None, ranks: int = 1) -> BuiltNetwork:
    """The network for this data, without memory. Raises ConfigError, DataError or CheckpointError, as `train`."""
    built = build_checked_network(experiment, data.facts, given, ranks)
    refuse_unmeasurable(experiment, {name: examples.all_targets() for name, examples in data.splits.items()})
    return built


def notes_on_classes(experiment: Experiment, data: Dataset) -> list[str]:
    """Lines for the log about what the sampler and the task's weights make of the classes."""
    lines = experiment.task.data_notes(data.facts)
    sampler, classes = experiment.train.sampler, data.facts.classes
    if (
        times := sampler.repetitions_per_class(data.splits["train"].targets.get("labels", torch.zeros(0)), len(classes))
    ) is not None:
        lines.append(f"sampler: {sampler.kind}, an epoch shows " + format_per_class(classes, times, "times"))
    return lines


def refuse_unmeasurable(experiment: Experiment, targets: dict[str, dict[str, Tensor]]) -> None:
    """Raises DataError where a split would be measured in vain, given each split's targets."""
    for name, of_split in targets.items():
        if name != "train" and (problem := experiment.task.split_problem(of_split)):
            raise DataError(f"the {name} split: {problem}")
        if name == "val":
            refuse_undefined_monitor(experiment.task, of_split, experiment.train.monitor)


def check_same_data(data: Dataset, ranks: Ranks) -> None:
    """Raises DataError where the ranks do not see the same data."""
    seen = repr(replace(data.facts, fingerprint="")).encode()  # by times of files, which copies do not share
    digest = int.from_bytes(hashlib.sha256(seen).digest()[:7], "little")
    largest, smallest = ranks.all_reduce_max([digest, -digest])
    if largest != -smallest:
        raise DataError(f"rank {ranks.rank} does not see the data that others see: {data.facts.counts} pictures here")
