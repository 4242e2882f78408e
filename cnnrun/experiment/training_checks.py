"""Checks that an experiment can be trained on its data, shared by all commands and run before anything is written."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import DataFacts, format_per_class
from cnnrun.contracts.task_parts import Targets
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.assemble import build_checked_network
from cnnrun.experiment.schema import Experiment
from cnnrun.model.network import BuiltNetwork
from cnnrun.model.weights_file import Weights
from cnnrun.training.settings import refuse_undefined_monitor

_FEW_STEPS = 20  # in an epoch; fewer are too coarse for schedules, averages and statistics
_MANY_DROPPED = 0.1  # share of the images


def check_training_possible(
    experiment: Experiment, data: Dataset, weights: Weights | None, ranks: int = 1
) -> BuiltNetwork:
    """Check that the experiment can train on decoded data. Returns the network, without memory.

    Raises ConfigError, DataError or CheckpointError, as `train` would.
    """
    built_network = build_checked_network(experiment, data.facts, weights, ranks)
    check_eval_splits(experiment, data.facts, {name: examples.all_targets() for name, examples in data.splits.items()})
    return built_network


def class_notes(experiment: Experiment, data: Dataset) -> list[str]:
    """Lines for the log about the task's class weights and how often the sampler repeats each class."""
    lines = experiment.task.bind(data.facts).showing.data_notes()
    sampler, classes = experiment.train.sampler, data.facts.classes
    labels = data.splits["train"].targets.get("labels", torch.zeros(0))
    repetitions = sampler.repetitions_per_class(labels, len(classes))
    if repetitions is not None:
        lines.append(f"sampler: {sampler.kind}, an epoch shows " + format_per_class(classes, repetitions, "times"))
    return lines


def step_notes(experiment: Experiment, facts: DataFacts) -> list[str]:
    """Lines for the log about epochs of few steps, and about images that each epoch leaves out."""
    spec, images = experiment.train, facts.counts["train"]
    steps, lines = spec.steps_per_epoch(images), list[str]()
    smaller = 1 << int(math.log2(max(1, images // _FEW_STEPS)))
    if steps < _FEW_STEPS and max(2, spec.accumulate) <= smaller < spec.batch and not spec.sampler.images_per_class:
        count = format_count(steps, "step")
        more = spec.model_copy(update={"batch": smaller}).steps_per_epoch(images)
        lines.append(f"train.batch: an epoch has {count}; with {smaller} instead of {spec.batch} it has {more}")
    dropped = images - steps * spec.batch if spec.drop_last else 0
    if dropped > _MANY_DROPPED * images:
        lines.append(f"train.drop_last: each epoch leaves out {dropped:,} of {images:,} images, others each time")
    return lines


def check_eval_splits(experiment: Experiment, facts: DataFacts, targets: dict[str, Targets]) -> None:
    """Raise DataError if the task cannot be measured on val or test; `targets` are those of each split."""
    task = experiment.task.bind(facts)
    for name, split_targets in targets.items():
        if name != "train" and (problem := task.measuring.split_problem(split_targets)):
            raise DataError(f"the {name} split: {problem}")
        if name == "val":
            refuse_undefined_monitor(task, split_targets, experiment.train.monitor)


def check_same_data(data: Dataset, ranks: Ranks) -> None:
    """Raise DataError if the ranks do not have the same data."""
    # The fingerprint depends on the files' times, which differ between copies of the same data.
    facts = repr(replace(data.facts, fingerprint="")).encode()
    digest = int.from_bytes(hashlib.sha256(facts).digest()[:7], "little")
    largest, smallest = ranks.all_reduce_max([digest, -digest])
    if largest != -smallest:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.facts.counts.items())
        raise DataError(f"rank {ranks.rank} does not have the same data as other ranks; its images: {counts}")
