"""From a checked experiment to the objects that work: data, network, job; and back from a run folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cnnrun.base.atomic_files import Folder, json_bytes
from cnnrun.base.errors import CheckpointError, ConfigError, DataError
from cnnrun.base.progress import progress_bar, say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import Facts
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
from cnnrun.training.learner import Job
from cnnrun.training.run_records import (
    CONFIG,
    DATA_LIST,
    FACTS,
    INITIAL_WEIGHTS,
)
from cnnrun.training.settings import check_batch_size


def prepare_dataset(
    experiment: Experiment, indexed: SourceIndex | None = None, only: Sequence[str] | None = None
) -> Dataset:
    """The experiment's data, decoded (`only` those splits). Raises DataError."""
    return build_dataset(experiment.data, indexed or index_source(experiment.data), progress_bar, only)


def build_for(experiment: Experiment, facts: Facts) -> BuiltNetwork:
    """The network for this data, without memory."""
    try:
        return build_network(experiment.model.layers, experiment.task, facts)
    except BuildError as error:
        raise ConfigError(*(problem.message for problem in error.problems)) from None


def load_initial_weights(experiment: Experiment) -> Weights | None:
    """The weights that the config starts from, if it names any. Raises CheckpointError."""
    return read_weights(Path(experiment.model.weights)) if experiment.model.weights else None


def build_checked_network(
    experiment: Experiment, facts: Facts, given: Weights | None = None, ranks: int = 1
) -> BuiltNetwork:
    """The network for this data, without memory, once everything is known to fit.

    Raises ConfigError, DataError or CheckpointError.
    """
    if problem := experiment.task.data_problem(facts):
        raise ConfigError(f"task: {problem}")
    for split in ("train", "val"):
        if split not in facts.counts:
            raise DataError(f"the data has no {split} split; give data.split.{split} a part of the training pictures")
    if problem := experiment.train.sampler.batch_problem(facts.class_counts, experiment.train.batch):
        raise ConfigError(f"train.sampler: {problem}")
    built = build_for(experiment, facts)
    check_batch_size(
        experiment.train, facts.counts["train"], built.network, ranks, experiment.task.needs_class_batches()
    )
    if given:
        match_initial_weights(experiment, built.network, given, facts)
    return built


def match_initial_weights(experiment: Experiment, made: Network, given: Weights, facts: Facts) -> dict[str, str]:
    """Which tensor of the weights file starts each of the network's. Raises CheckpointError, a line a misfit."""
    try:
        return weights_file.match_weights(made, given, experiment.model.until, facts)
    except tensor_matching.TensorMismatchError as misfit:
        raise CheckpointError(*misfit.table(f"{experiment.model.weights}: not weights of this network")) from None


def assemble_job(
    experiment: Experiment,
    data: Dataset,
    given: Weights | None,
    run: Folder | None,
    device: torch.device,
    ranks: Ranks | None = None,
    should_stop: Callable[[int, float], bool] | None = None,
) -> Job:
    """What the training loop works on; with `given` weights the network starts from them, aloud."""
    built = build_checked_network(experiment, data.facts).network
    found = match_initial_weights(experiment, built, given, data.facts) if given else {}
    made = materialize(built, experiment.seed)
    if given:
        anew = weights_file.load_weights(made, given, found)
        say(f"{len(found)} tensors from {experiment.model.weights}; new: {', '.join(anew) or 'none'}")
        if given.facts is None and experiment.data.image.mean is None:
            say("the file does not say by which mean and deviation it was trained; those of this data are used")
        still = tuple(f"layers.{name}." for name in layers_until(made, experiment.train.freeze))
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
        should_stop=should_stop,
    )


def create_run(experiment: Experiment, data: Dataset, given: Weights | None, root: Path) -> Path:
    """A fresh run folder with the resolved config in it, the data's files, and what the weights it starts from were."""
    files = {CONFIG: experiment.with_facts(data.facts).to_yaml().encode()}
    files[FACTS] = json_bytes(data.facts.to_json())
    if data.file_listings:
        files[DATA_LIST] = gzip.compress("\n".join(data.listing_lines()).encode(), 1)
    if data.skipped_samples:
        files["skipped.jsonl"] = "".join(json.dumps(each) + "\n" for each in data.skipped_samples).encode()
    if given:
        files[INITIAL_WEIGHTS] = (
            json.dumps({"path": experiment.model.weights, "sha256": given.digest}) + "\n"
        ).encode()
    run = run_folder.create_run_folder(root, experiment.name, files)
    if data.skipped_samples:
        say(f"{len(data.skipped_samples):,} pictures are left out; {run / 'skipped.jsonl'} lists them")
    return run
