"""Open a trained run: its config, its best network and its data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cnnrun.base.errors import CheckpointError, ConfigError, DataError, escape
from cnnrun.base.progress import say
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.results import Measurement
from cnnrun.contracts.task import Task
from cnnrun.contracts.task_parts import Criterion
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.index import index_source
from cnnrun.experiment.assemble import build_experiment_network, prepare_dataset
from cnnrun.experiment.config_differences import check_config_fits_run
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.weights_source import checkpoint_weights, read_weights
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Network, build_network, materialize
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.tasks.intervals import confidence_intervals
from cnnrun.training import checkpoint_pointers, checkpoints, run_folder
from cnnrun.training.evaluation import measure_split
from cnnrun.training.run_records import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    RESULT,
    parse_calibration,
    read_calibration,
    read_facts,
)
from cnnrun.training.state import TrainingState


def find_run(run: Path | None, runs: Path) -> tuple[Path, Path | None]:
    """Find the folder of a run, and the path of the checkpoint if `run` is one.

    `run` is a run folder, a checkpoint, or a config, whose newest run in `runs` is used; None means the newest run.
    Raises CheckpointError if there is no run, or if links lead out of its folder.
    """
    folder, checkpoint_path = _resolve_run(run, runs)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{escape(str(folder))}: has no {CONFIG}; not a run")
    run_folder.refuse_links(folder)
    return folder, checkpoint_path


def _resolve_run(run: Path | None, runs: Path) -> tuple[Path, Path | None]:
    if run is None:
        return _say_run(run_folder.newest_run(runs)), None
    if run.is_file() and run.suffix == ".safetensors":
        raise CheckpointError(
            f"{run}: a weights file has no config and data; give a run, or train from it with model.weights={run}"
        )
    if run.is_file() and run.suffix in (".yaml", ".yml"):
        if run.name == CONFIG and (run.parent / CHECKPOINTS).is_dir():
            return run.parent, None
        return _find_newest_run(run, runs), None
    if run.is_file() and (name := checkpoint_pointers.read_pointer(run.parent, run.name)):
        run = run.parent / name  # checkpoints/best, checkpoints/latest
    if (run / "manifest.json").exists():
        return run.resolve().parent.parent, run
    if (run / CONFIG).exists():
        return run, None
    raise CheckpointError(f"{run}: neither a run folder, a checkpoint nor a config")


def _find_newest_run(config: Path, runs: Path) -> Path:
    """Find the newest run of a config. Raises ConfigError if they differ now in task, data or network."""
    experiment = read_config(config)
    run = run_folder.newest_run(runs, experiment.name)
    run_folder.refuse_links(run)
    check_config_fits_run(config, experiment, run, read_run_config(run))
    return _say_run(run)


def _say_run(run: Path) -> Path:
    say(f"using {run}" + ("" if (run / RESULT).exists() else ", which is unfinished"))
    return run


def open_trained(
    run: Path | None, runs: Path, device: torch.device, with_calibration: bool = True
) -> tuple[Experiment, TrainedNetwork]:
    """Open the network of a run's best checkpoint, or of the checkpoint `run` (see `find_run`).

    With `with_calibration` the choices of `cnnrun calibrate` for these weights are used. Raises CheckpointError.
    """
    folder, path = find_run(run, runs)
    experiment = read_run_config(folder)
    checkpoint = checkpoints.load(path) if path else checkpoints.load_newest(folder / CHECKPOINTS, "best", say)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: no checkpoint yet; continue its training with `cnnrun train CONFIG --resume`")
    facts, choices, weights = checkpoint_weights(checkpoint)
    if (run_facts := read_facts(folder)) and run_facts.classes != facts.classes:
        raise CheckpointError(f"{checkpoint.path}: its classes are not those of {folder / FACTS}")
    try:
        task = experiment.task.bind(facts)
        network = build_experiment_network(experiment, task).network
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{checkpoint.path}: does not fit {folder / CONFIG}: {error.lines[0]}") from None
    try:
        tensor_matching.check_exact_match(network.state_dict(), weights)
    except tensor_matching.TensorMismatchError as error:
        raise CheckpointError(*error.message_lines(f"{checkpoint.path}: does not fit {folder / CONFIG}")) from None
    network = materialize(network, 0)
    network.load_state_dict(weights)
    _prepare_inference(network, device)
    criterion = _load_criterion(task, checkpoint).to(device)
    step = TrainingState.from_json(checkpoint.state.get("training"), str(checkpoint.path)).step
    trained = TrainedNetwork(network, criterion, task, choices, experiment.data.image, folder, step, device)
    return experiment, _apply_calibration(trained) if with_calibration else trained


def read_run_config(run: Path) -> Experiment:
    """Read the config that a run was trained with. Raises CheckpointError."""
    try:
        return read_config(run / CONFIG, warn=False)
    except ConfigError as error:
        raise CheckpointError(
            f"the run's config is damaged, or of another version of cnnrun: {error.lines[0]}"
        ) from None


def _load_criterion(task: Task, checkpoint: checkpoints.Checkpoint) -> Criterion:
    """Build the criterion with its trained weights. Raises CheckpointError if they do not fit."""
    criterion = task.learning.build_criterion()
    try:
        criterion.load_state_dict(checkpoint.parts.get("criterion", {}))
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.path}: the criterion's weights do not fit: {escape(line)}") from None
    return criterion


def _apply_calibration(trained: TrainedNetwork) -> TrainedNetwork:
    """Add the choices that `cnnrun calibrate` made for exactly these weights. Raises CheckpointError."""
    path = trained.run / CALIBRATION
    advice = "remove it, or run `cnnrun calibrate` again"
    try:
        calibrations = read_calibration(trained.run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; {advice}") from None
    if not calibrations:
        return trained
    record = calibrations.get(trained.digest)
    if record is None:
        say(f"{path} has no calibration of the weights of step {trained.step}; run `cnnrun calibrate` to add one")
        return trained
    try:
        choices = parse_calibration(record, trained.run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; {advice}") from None
    return replace(trained, choices=trained.choices.replaced_by(choices))


def open_network(run: Path | None, runs: Path, device: torch.device) -> TrainedNetwork:
    """Open the network of a run, as `open_trained` does, or of a weights file with a description.

    Raises CheckpointError.
    """
    if run is None or run.suffix != ".safetensors":
        return open_trained(run, runs, device)[1]
    weights = read_weights(run)
    description, facts = weights.description, weights.facts
    if description is None or facts is None:
        raise CheckpointError(f"{run}: bare tensors without a description; `cnnrun import --match name` adds one")
    try:
        task = description.task.bind(facts)
        network = build_network(description.model.layers, task).network
    except (BuildError, ConfigError, DataError) as error:
        raise CheckpointError(f"{run}: does not fit its own description: {error}") from None
    try:
        matches = tensor_matching.match_by_name(network.state_dict(), weights.tensors)
    except tensor_matching.TensorMismatchError as error:
        raise CheckpointError(*error.message_lines(f"{run}: does not fit its own description")) from None
    network = materialize(network, 0)
    weights_file.load_weights(network, weights, matches)
    _prepare_inference(network, device)
    criterion = task.learning.build_criterion()
    return TrainedNetwork(network, criterion, task, Choices(), description.image, run.parent, 0, device)


@dataclass(frozen=True)
class MeasuredRun:
    """A run's config and network, the name and the samples of a split, and the network's measurement on them."""

    experiment: Experiment
    trained: TrainedNetwork
    split: str
    examples: Examples
    measurement: Measurement

    @property
    def name(self) -> str:
        """The run's folder, as messages and reports show it."""
        return str(self.trained.run)

    @property
    def intervals(self) -> dict[str, list[float]]:
        """The confidence interval of each metric that has one."""
        measurement = self.measurement
        return confidence_intervals(measurement.metrics, measurement.bootstrap_draws, measurement.correct)


def measure_run(run: Path | None, runs: Path, device: torch.device, split: str | None) -> MeasuredRun:
    """Measure a run's network on a split. Raises CheckpointError or DataError."""
    experiment, trained = open_trained(run, runs, device)
    name, data = prepare_eval_data(experiment, trained, split)
    examples = data.splits[name]
    batch = experiment.train.batch
    measurement = measure_split(trained.to_measure(), examples, batch)
    return MeasuredRun(experiment, trained, name, examples, measurement)


def _prepare_inference(network: Network, device: torch.device) -> None:
    network.to(device).to(memory_format=torch.channels_last).eval()


def prepare_eval_data(
    experiment: Experiment, trained: TrainedNetwork, split: str | None, min_images: int = 0
) -> tuple[str, Dataset]:
    """Decode the split to report and return its name: `split`, or by default test, or val if there is no test.

    If it has fewer than `min_images` images, which an export's comparison needs, the training split is decoded too.
    Raises DataError unless the classes are the network's.
    """
    source_index = index_source(experiment.data)
    name = split or ("test" if "test" in source_index.splits else "val")
    if name not in source_index.splits:
        raise DataError(f"no split {name!r}; the data has {', '.join(source_index.splits)}")
    splits = [name] if source_index.counts[name] >= min_images else [name, "train"]
    data = prepare_dataset(experiment, source_index, splits)
    if name in source_index.held_out_splits and data.facts.fingerprint != trained.facts.fingerprint:
        say(f"the data has changed since the training: images of the held-out {name} split may have been trained on")
    if problem := trained.task.measuring.split_problem(data.splits[name].all_targets()):
        raise DataError(f"the {name} split: {problem}")
    data_columns, network_columns = ([row.name for row in facts.numbers] for facts in (data.facts, trained.facts))
    _check_same_names("target columns", data_columns, network_columns)
    _check_same_names("classes", data.facts.classes, trained.facts.classes)
    return name, replace(data, facts=trained.facts)


def _check_same_names(noun: str, data_names: Sequence[str], network_names: Sequence[str]) -> None:
    """Raise DataError if the data's classes or target columns (`noun`) are not the network's."""
    for number, names in enumerate(itertools.zip_longest(data_names, network_names), 1):
        if names[0] != names[1]:
            data_name, network_name = ("nothing" if name is None else escape(name) for name in names)
            difference = f"the first that differs is number {number:,}, {data_name} instead of {network_name}"
            raise DataError(f"the data's {noun} are not the network's: {difference}")
