"""Opening a finished run: its config, the network it chose, its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnnrun.base.errors import CheckpointError, ConfigError, DataError, printable
from cnnrun.base.progress import say
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Measured
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.index import index
from cnnrun.experiment.assemble import dataset, network
from cnnrun.experiment.config_differences import check_config_fits_run
from cnnrun.experiment.config_file import load
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.weights_source import read_weights, weights_of_checkpoint
from cnnrun.model import tensor_matching, weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Network, build, materialize
from cnnrun.model.trained import Trained
from cnnrun.tasks.temperature import TEMPERATURE
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.evaluate import evaluate
from cnnrun.training.run_records import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    RESULT,
    read_calibration,
    read_facts,
)
from cnnrun.training.state import State


def find_run(target: Path | None, root: Path) -> tuple[Path, Path | None]:
    """The run folder that `target` means (a run, a checkpoint, a config, or none: the newest), and the checkpoint.

    Raises CheckpointError where there is none, or where links lead out of it.
    """
    run, checkpoint_path = _find_run(target, root)
    if not (run / CONFIG).exists():
        raise CheckpointError(f"{printable(str(run))}: has no {CONFIG}; not a run")
    run_folder.refuse_links(run)
    return run, checkpoint_path


def _find_run(target: Path | None, root: Path) -> tuple[Path, Path | None]:
    if target is None:
        return _say_which(run_folder.newest(root)), None
    if target.is_file() and target.suffix == ".safetensors":
        raise CheckpointError(f"{target}: weights without data of their own; train from them with model.weights")
    if target.is_file() and target.suffix in (".yaml", ".yml"):
        if target.name == CONFIG and (target.parent / CHECKPOINTS).is_dir():
            return target.parent, None
        return _newest_run_of(target, root), None
    if target.is_file() and (name := checkpoints.pointed_at(target.parent, target.name)):
        target = target.parent / name  # checkpoints/best, checkpoints/latest
    if (target / "manifest.json").exists():
        return target.resolve().parent.parent, target
    if (target / CONFIG).exists():
        return target, None
    raise CheckpointError(f"{target}: neither a run folder, a checkpoint nor a config")


def _newest_run_of(config: Path, root: Path) -> Path:
    """The newest run of a config. Raises ConfigError where the config would not give that run's answers."""
    given = load(config)
    run = run_folder.newest(root, given.name)
    run_folder.refuse_links(run)
    check_config_fits_run(config, given, run, config_of(run))
    return _say_which(run)


def _say_which(run: Path) -> Path:
    say(f"using {run}" + ("" if (run / RESULT).exists() else ", which is unfinished"))
    return run


def trained(
    target: Path | None, root: Path, device: torch.device, calibrated: bool = True
) -> tuple[Experiment, Trained]:
    """The network that a run chose (its best checkpoint), or that of a given checkpoint. Raises CheckpointError.

    With what `cnnrun calibrate` chose for it, but where `calibrated` is false.
    """
    run, path = find_run(target, root)
    experiment = config_of(run)
    saved = checkpoints.load(path) if path else checkpoints.load_newest(run / CHECKPOINTS, "best", say)
    if saved is None:
        raise CheckpointError(f"{run}: no checkpoint yet")
    facts, given = weights_of_checkpoint(saved)
    if (began := read_facts(run)) and began.classes != facts.classes:
        raise CheckpointError(f"{saved.path}: its classes are not those of {run / FACTS}")
    try:
        built = network(experiment, facts).network
    except ConfigError as error:
        raise CheckpointError(f"{saved.path}: does not fit {run / CONFIG}: {error.lines[0]}") from None
    try:
        tensor_matching.exactly(built.state_dict(), given)
    except tensor_matching.Misfit as misfit:
        raise CheckpointError(*misfit.table(f"{saved.path}: does not fit {run / CONFIG}")) from None
    made = materialize(built, 0)
    made.load_state_dict(given)
    _ready(made, device)
    criterion = _criterion(experiment, facts, saved).to(device)
    step = State.from_json(saved.state.get("training"), str(saved.path)).step
    found = Trained(made, criterion, experiment.task, facts, experiment.data.image, run, step, device)
    return experiment, _calibrated(found) if calibrated else found


def config_of(run: Path) -> Experiment:
    """The config that a run was trained with. Raises CheckpointError where it cannot be read."""
    try:
        return load(run / CONFIG)
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
        raise CheckpointError(f"{saved.path}: the criterion's weights do not fit: {printable(line)}") from None
    return criterion


def _calibrated(given: Trained) -> Trained:
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


def usable(target: Path | None, root: Path, device: torch.device) -> Trained:
    """As `trained`, or the network of a weights file that says what it is for. Raises CheckpointError."""
    if target is None or target.suffix != ".safetensors":
        return trained(target, root, device)[1]
    given = read_weights(target)
    about, facts = given.about, given.facts
    if about is None or facts is None:
        raise CheckpointError(f"{target}: bare tensors; `cnnrun import --match name` writes what they are for")
    try:
        built = build(about.model.layers, about.task, facts).network
    except BuildError as error:
        raise CheckpointError(f"{target}: does not fit its own description: {error}") from None
    try:
        found = tensor_matching.by_name(built.state_dict(), given.tensors)
    except tensor_matching.Misfit as misfit:
        raise CheckpointError(*misfit.table(f"{target}: does not fit its own description")) from None
    made = materialize(built, 0)
    weights_file.start(made, given, found)
    return Trained(
        _ready(made, device), about.task.criterion(facts), about.task, facts, about.image, target.parent, 0, device
    )


def measured(
    target: Path | None, root: Path, device: torch.device, split: str | None
) -> tuple[Experiment, Trained, str, Examples, Measured]:
    """A run's network on a split: with the split's name and samples, and what its task's meter says of them.

    Raises CheckpointError, DataError.
    """
    experiment, given = trained(target, root, device)
    name, data = eval_data(experiment, given, split)
    examples, criterion = data.splits[name], None if given.task.open_set else given.criterion
    batch = experiment.train.batch
    found = evaluate(given.network, criterion, given.task, given.facts, examples, batch, device)
    return experiment, given, name, examples, found


def _ready(made: Network, device: torch.device) -> Network:
    return made.to(device).to(memory_format=torch.channels_last).eval()


def eval_data(experiment: Experiment, given: Trained, split: str | None, at_least: int = 0) -> tuple[str, Dataset]:
    """The split to report (test where there is one, else val), decoded; its classes must be the network's.

    Where it has less than `at_least` pictures, the training split is decoded as well.
    """
    indexed = index(experiment.data)
    name = split or ("test" if "test" in indexed.splits else "val")
    if name not in indexed.splits:
        raise DataError(f"no split {name!r}; the data has {', '.join(indexed.splits)}")
    data = dataset(experiment, indexed, [name] if indexed.counts[name] >= at_least else [name, "train"])
    if name in indexed.held_out and data.facts.fingerprint != given.facts.fingerprint:
        say(f"the data changed since the training: pictures of the held-out {name} split may have been trained on")
    if problem := experiment.task.unmeasurable(data.splits[name].all_targets()):
        raise DataError(f"the {name} split: {problem}")
    if [each.name for each in data.facts.numbers] != [each.name for each in given.facts.numbers]:
        raise DataError("the data's numbers are not those that the network learned")
    if data.facts.classes != given.facts.classes:
        raise DataError(f"the data's classes {data.facts.classes} are not the network's {given.facts.classes}")
    return name, replace(data, facts=given.facts)
