"""From a checked experiment to the objects that work: data, network, job; and back from a run folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnnrun.base.atomic_files import Folder, json_bytes
from cnnrun.base.errors import CheckpointError, ConfigError, DataError, printable
from cnnrun.base.progress import bar, say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.layer import Facts
from cnnrun.contracts.task import Measured
from cnnrun.data.dataset import Dataset, Examples, Index, index
from cnnrun.data.prepare import prepare
from cnnrun.experiment.config_differences import check_config_fits_run
from cnnrun.experiment.schema import Experiment, load
from cnnrun.experiment.weights_source import read_weights, weights_of_checkpoint
from cnnrun.model import weights_file
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Built, Network, build, materialize
from cnnrun.model.trained import Trained
from cnnrun.model.weights_file import Weights
from cnnrun.tasks.temperature import TEMPERATURE
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.evaluate import evaluate
from cnnrun.training.frozen_layers import held
from cnnrun.training.learner import Job
from cnnrun.training.loss_monitor import State
from cnnrun.training.run_records import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    FILES,
    RESULT,
    WEIGHTS,
    read_calibration,
    read_facts,
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
    except weights_file.Misfit as misfit:
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
        weights_file.exactly(built.state_dict(), given)
    except weights_file.Misfit as misfit:
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
        found = weights_file.by_name(built.state_dict(), given.tensors)
    except weights_file.Misfit as misfit:
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
