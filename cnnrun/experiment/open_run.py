"""Opening a finished run: its config, the network it chose, its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnnrun.base.errors import CheckpointError, ConfigError, DataError, escape
from cnnrun.base.progress import say
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.index import index_source
from cnnrun.experiment.assemble import build_for, prepare_dataset
from cnnrun.experiment.config_differences import check_config_fits_run
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.weights_source import read_weights, weights_of_checkpoint
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Network, build_network, materialize
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.tasks.temperature import TEMPERATURE
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.evaluation import measure_split
from cnnrun.training.run_records import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    RESULT,
    read_calibration,
    read_facts,
)
from cnnrun.training.state import TrainingState


def find_run(target: Path | None, root: Path) -> tuple[Path, Path | None]:
    """The run folder that `target` means (a run, a checkpoint, a config, or none: the newest), and the checkpoint.

    Raises CheckpointError where there is none, or where links lead out of it.
    """
    run, checkpoint_path = _find_run(target, root)
    if not (run / CONFIG).exists():
        raise CheckpointError(f"{escape(str(run))}: has no {CONFIG}; not a run")
    run_folder.refuse_links(run)
    return run, checkpoint_path


def _find_run(target: Path | None, root: Path) -> tuple[Path, Path | None]:
    if target is None:
        return _say_which(run_folder.newest_run(root)), None
    if target.is_file() and target.suffix == ".safetensors":
        raise CheckpointError(f"{target}: weights without data of their own; train from them with model.weights")
    if target.is_file() and target.suffix in (".yaml", ".yml"):
        if target.name == CONFIG and (target.parent / CHECKPOINTS).is_dir():
            return target.parent, None
        return _newest_run_of(target, root), None
    if target.is_file() and (name := checkpoints.read_pointer(target.parent, target.name)):
        target = target.parent / name  # checkpoints/best, checkpoints/latest
    if (target / "manifest.json").exists():
        return target.resolve().parent.parent, target
    if (target / CONFIG).exists():
        return target, None
    raise CheckpointError(f"{target}: neither a run folder, a checkpoint nor a config")


def _newest_run_of(config: Path, root: Path) -> Path:
    """The newest run of a config. Raises ConfigError where the config would not give that run's answers."""
    given = read_config(config)
    run = run_folder.newest_run(root, given.name)
    run_folder.refuse_links(run)
    check_config_fits_run(config, given, run, read_run_config(run))
    return _say_which(run)


def _say_which(run: Path) -> Path:
    say(f"using {run}" + ("" if (run / RESULT).exists() else ", which is unfinished"))
    return run


def open_trained(
    target: Path | None, root: Path, device: torch.device, with_calibration: bool = True
) -> tuple[Experiment, TrainedNetwork]:
    """The network that a run chose (its best checkpoint), or that of a given checkpoint. Raises CheckpointError.

    With what `cnnrun calibrate` chose for it, but where `calibrated` is false.
    """
    run, path = find_run(target, root)
    experiment = read_run_config(run)
    saved = checkpoints.load(path) if path else checkpoints.load_newest(run / CHECKPOINTS, "best", say)
    if saved is None:
        raise CheckpointError(f"{run}: no checkpoint yet")
    facts, given = weights_of_checkpoint(saved)
    if (began := read_facts(run)) and began.classes != facts.classes:
        raise CheckpointError(f"{saved.path}: its classes are not those of {run / FACTS}")
    try:
        built = build_for(experiment, facts).network
    except ConfigError as error:
        raise CheckpointError(f"{saved.path}: does not fit {run / CONFIG}: {error.lines[0]}") from None
    try:
        tensor_matching.check_exact_match(built.state_dict(), given)
    except tensor_matching.TensorMismatchError as misfit:
        raise CheckpointError(*misfit.table(f"{saved.path}: does not fit {run / CONFIG}")) from None
    made = materialize(built, 0)
    made.load_state_dict(given)
    _ready(made, device)
    criterion = _criterion(experiment, facts, saved).to(device)
    step = TrainingState.from_json(saved.state.get("training"), str(saved.path)).step
    found = TrainedNetwork(made, criterion, experiment.task, facts, experiment.data.image, run, step, device)
    return experiment, _calibrated(found) if with_calibration else found


def read_run_config(run: Path) -> Experiment:
    """The config that a run was trained with. Raises CheckpointError where it cannot be read."""
    try:
        return read_config(run / CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"the run's config is damaged, or of another version of cnnrun: {error.lines[0]}"
        ) from None


def _criterion(experiment: Experiment, facts: Facts, saved: checkpoints.Checkpoint) -> nn.Module:
    """The criterion with its trained weights. Raises CheckpointError where these are not its own."""
    criterion = experiment.task.criterion(facts)
    try:
        criterion.load_state_dict(saved.parts.get("criterion", {}))
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{saved.path}: the criterion's weights do not fit: {escape(line)}") from None
    return criterion


def _calibrated(given: TrainedNetwork) -> TrainedNetwork:
    """The network with what was chosen for these very weights after the training. Raises CheckpointError."""
    path = given.run / CALIBRATION
    advice = "remove it, or run `cnnrun calibrate` again"
    try:
        kept = read_calibration(given.run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; {advice}") from None
    if not kept:
        return given
    of_these = kept.get(given.digest)
    chosen = of_these.chosen if of_these else {}
    if chosen.get(TEMPERATURE, 1.0) <= 0:
        raise CheckpointError(f"{path}: a temperature is above 0; {advice}")
    if of_these is None:
        say(f"{path} is of other weights than step {given.step}'s and is not used; `cnnrun calibrate` adds to it")
        return given
    return replace(given, facts=replace(given.facts, chosen=given.facts.chosen | chosen))


def open_network(target: Path | None, root: Path, device: torch.device) -> TrainedNetwork:
    """As `open_trained`, or the network of a weights file that says what it is for. Raises CheckpointError."""
    if target is None or target.suffix != ".safetensors":
        return open_trained(target, root, device)[1]
    given = read_weights(target)
    about, facts = given.description, given.facts
    if about is None or facts is None:
        raise CheckpointError(f"{target}: bare tensors; `cnnrun import --match name` writes what they are for")
    try:
        built = build_network(about.model.layers, about.task, facts).network
    except BuildError as error:
        raise CheckpointError(f"{target}: does not fit its own description: {error}") from None
    try:
        found = tensor_matching.match_by_name(built.state_dict(), given.tensors)
    except tensor_matching.TensorMismatchError as misfit:
        raise CheckpointError(*misfit.table(f"{target}: does not fit its own description")) from None
    made = materialize(built, 0)
    weights_file.load_weights(made, given, found)
    return TrainedNetwork(
        _ready(made, device), about.task.criterion(facts), about.task, facts, about.image, target.parent, 0, device
    )


def measure_run(
    target: Path | None, root: Path, device: torch.device, split: str | None
) -> tuple[Experiment, TrainedNetwork, str, Examples, Measurement]:
    """A run's network on a split: with the split's name and samples, and what its task's meter says of them.

    Raises CheckpointError, DataError.
    """
    experiment, given = open_trained(target, root, device)
    name, data = prepare_eval_data(experiment, given, split)
    examples, criterion = data.splits[name], None if given.task.is_open_set else given.criterion
    batch = experiment.train.batch
    found = measure_split(given.network, criterion, given.task, given.facts, examples, batch, device)
    return experiment, given, name, examples, found


def _ready(made: Network, device: torch.device) -> Network:
    return made.to(device).to(memory_format=torch.channels_last).eval()


def prepare_eval_data(
    experiment: Experiment, given: TrainedNetwork, split: str | None, min_images: int = 0
) -> tuple[str, Dataset]:
    """The split to report (test where there is one, else val), decoded; its classes must be the network's.

    Where it has less than `at_least` pictures, the training split is decoded as well.
    """
    indexed = index_source(experiment.data)
    name = split or ("test" if "test" in indexed.splits else "val")
    if name not in indexed.splits:
        raise DataError(f"no split {name!r}; the data has {', '.join(indexed.splits)}")
    data = prepare_dataset(experiment, indexed, [name] if indexed.counts[name] >= min_images else [name, "train"])
    if name in indexed.held_out_splits and data.facts.fingerprint != given.facts.fingerprint:
        say(f"the data changed since the training: pictures of the held-out {name} split may have been trained on")
    if problem := experiment.task.split_problem(data.splits[name].all_targets()):
        raise DataError(f"the {name} split: {problem}")
    if [each.name for each in data.facts.numbers] != [each.name for each in given.facts.numbers]:
        raise DataError("the data's numbers are not those that the network learned")
    if data.facts.classes != given.facts.classes:
        raise DataError(f"the data's classes {data.facts.classes} are not the network's {given.facts.classes}")
    return name, replace(data, facts=given.facts)
