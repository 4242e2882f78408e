"""From a checked experiment to the objects that work: data, network, job; and back from a run folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cnnrun.base.atomic_files import Folder, json_bytes
from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.base.progress import bar, say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import Facts
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import Index, index
from cnnrun.data.prepare import prepare
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.weights_source import read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Built, Network, build, materialize
from cnnrun.model.weights_file import Weights
from cnnrun.training import run_folder
from cnnrun.training.frozen_layers import held
from cnnrun.training.learner import Job
from cnnrun.training.run_records import (
    CONFIG,
    FACTS,
    FILES,
    WEIGHTS,
)
from cnnrun.training.settings import check


def dataset(experiment: Experiment, indexed: Index | None = None, only: Sequence[str] | None = None) -> Dataset:
    """The experiment's data, decoded (`only` those splits). Raises DataError."""
    return prepare(experiment.data, indexed or index(experiment.data), bar, only)


def network(experiment: Experiment, facts: Facts) -> Built:
    """The network for this data, without memory."""
    try:
        return build(experiment.model.layers, experiment.task, facts)
    except BuildError as error:
        raise ConfigError(*(problem.message for problem in error.problems)) from None


def initial(experiment: Experiment) -> Weights | None:
    """The weights that the config starts from, if it names any. Raises CheckpointError."""
    return read_weights(Path(experiment.model.weights)) if experiment.model.weights else None


def fitting(experiment: Experiment, facts: Facts, given: Weights | None = None, ranks: int = 1) -> Built:
    """The network for this data, without memory, once everything is known to fit.

    Raises ConfigError, DataError or CheckpointError.
    """
    if problem := experiment.task.problem(facts):
        raise ConfigError(f"task: {problem}")
    for split in ("train", "val"):
        if split not in facts.counts:
            raise DataError(f"the data has no {split} split; give data.split.{split} a part of the training pictures")
    if problem := experiment.train.sampler.problem(facts.class_counts, experiment.train.batch):
        raise ConfigError(f"train.sampler: {problem}")
    built = network(experiment, facts)
    check(experiment.train, facts.counts["train"], built.network, ranks, experiment.task.together())
    if given:
        start_of(experiment, built.network, given, facts)
    return built


def start_of(experiment: Experiment, made: Network, given: Weights, facts: Facts) -> dict[str, str]:
    """Which tensor of the weights file starts each of the network's. Raises CheckpointError, a line a misfit."""
    try:
        return weights_file.fitting(made, given, experiment.model.until, facts)
    except tensor_matching.Misfit as misfit:
        raise CheckpointError(*misfit.table(f"{experiment.model.weights}: not weights of this network")) from None


def job(
    experiment: Experiment,
    data: Dataset,
    given: Weights | None,
    run: Folder | None,
    device: torch.device,
    ranks: Ranks | None = None,
    enough: Callable[[int, float], bool] | None = None,
) -> Job:
    """What the training loop works on; with `given` weights the network starts from them, aloud."""
    built = fitting(experiment, data.facts).network
    found = start_of(experiment, built, given, data.facts) if given else {}
    made = materialize(built, experiment.seed)
    if given:
        anew = weights_file.start(made, given, found)
        say(f"{len(found)} tensors from {experiment.model.weights}; new: {', '.join(anew) or 'none'}")
        if given.facts is None and experiment.data.image.mean is None:
            say("the file does not say by which mean and deviation it was trained; those of this data are used")
        still = tuple(f"layers.{name}." for name in held(made, experiment.train.freeze))
        if still and any(name.startswith(still) for name in anew):
            say("train.freeze holds still layers that start anew: they keep their random weights")
    return Job(
        spec=experiment.train,
        network=made,
        task=experiment.task,
        dataset=data,
        augment=experiment.data.augment,
        seed=experiment.seed,
        device=device,
        run=run,
        memory_gib=experiment.data.memory_gib,
        prefetch=experiment.data.prefetch,
        reading_timeout=experiment.data.timeout,
        ranks=ranks or Ranks(),
        enough=enough,
    )


def create(experiment: Experiment, data: Dataset, given: Weights | None, root: Path) -> Path:
    """A fresh run folder with the resolved config in it, the data's files, and what the weights it starts from were."""
    files = {CONFIG: experiment.with_facts(data.facts).to_yaml().encode()}
    files[FACTS] = json_bytes(data.facts.to_json())
    if data.listed:
        files[FILES] = gzip.compress("\n".join(data.lines()).encode(), 1)
    if data.left_out:
        files["skipped.jsonl"] = "".join(json.dumps(each) + "\n" for each in data.left_out).encode()
    if given:
        files[WEIGHTS] = (json.dumps({"path": experiment.model.weights, "sha256": given.digest}) + "\n").encode()
    run = run_folder.create(root, experiment.name, files)
    if data.left_out:
        say(f"{len(data.left_out):,} pictures are left out; {run / 'skipped.jsonl'} lists them")
    return run
