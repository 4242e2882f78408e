"""From a checked experiment to the objects that work: data, network, job; and back from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cnnrun import checkpoint, runs
from cnnrun.contracts import Facts
from cnnrun.dataset import Dataset, Index, index, prepare
from cnnrun.errors import CheckpointError, ConfigError, DataError
from cnnrun.experiment import Experiment, load
from cnnrun.learner import Job
from cnnrun.network import BuildError, Built, build, materialize
from cnnrun.progress import bar, say
from cnnrun.trained import Trained


def dataset(experiment: Experiment, indexed: Index | None = None, only: Sequence[str] | None = None) -> Dataset:
    """The experiment's data, decoded (`only` those splits). Raises DataError; ConfigError where it does not serve."""
    made = prepare(experiment.data, indexed or index(experiment.data), bar, only)
    if problem := experiment.task.problem(made.facts):
        raise ConfigError(f"task: {problem}")
    return made


def network(experiment: Experiment, facts: Facts) -> Built:
    """The network for this data, without memory."""
    try:
        return build(experiment.model, experiment.task, facts)
    except BuildError as error:
        raise ConfigError(*(problem.message for problem in error.problems)) from None


def job(experiment: Experiment, data: Dataset, run: Path, device: torch.device) -> Job:
    """What the training loop works on."""
    for split in ("train", "val"):
        if split not in data.splits:
            raise DataError(f"the data has no {split} split; give data.split.{split} a part of the training pictures")
    return Job(
        spec=experiment.train,
        network=materialize(network(experiment, data.facts).network, experiment.seed),
        task=experiment.task,
        dataset=data,
        augment=experiment.data.augment,
        seed=experiment.seed,
        device=device,
        run=run,
    )


def start(experiment: Experiment, root: Path, resume: bool) -> tuple[Path, checkpoint.Checkpoint | None]:
    """The run folder to train in: the newest unfinished one of the same config when resuming, else a fresh one."""
    left = runs.unfinished(root, experiment.name)
    if resume:
        for run in left:
            try:
                other = load(run / runs.CONFIG)
            except ConfigError as error:
                say(f"{run} is unfinished, but its config cannot be read: {error.lines[0]}")
                continue
            if other == experiment:
                say(f"going on with {run}")
                return run, checkpoint.load_newest(run / "checkpoints", "latest", say)
            say(f"{run} is unfinished, but of other settings ({', '.join(differences(other, experiment))})")
    elif left:
        say(f"{left[0]} is unfinished; --resume would go on with it")
    run = runs.create(root, experiment.name)
    runs.write_text(run / runs.CONFIG, experiment.to_yaml())
    return run, None


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """The paths of the settings that differ."""

    def flat(value: object, path: str) -> dict[str, object]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()
            }
        if isinstance(value, list):
            return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}[{i}]").items()}
        return {path: value}

    a, b = (flat(each.model_dump(mode="json", by_alias=True), "") for each in (ours, theirs))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def find_run(target: Path | None, root: Path) -> tuple[Path, Path | None]:
    """The run folder that `target` means (a run, a checkpoint, a config, or none: the newest), and the checkpoint."""
    if target is None:
        return runs.newest(root), None
    if target.is_file() and target.suffix in (".yaml", ".yml") and target.name != runs.CONFIG:
        return runs.newest(root, load(target).name), None
    if (target / "manifest.json").exists():
        return target.resolve().parent.parent, target
    if (target / runs.CONFIG).exists():
        return target, None
    if target.name == runs.CONFIG and target.is_file():
        return target.parent, None
    raise CheckpointError(f"{target}: neither a run folder, a checkpoint nor a config")


def trained(target: Path | None, root: Path, device: torch.device) -> tuple[Experiment, Trained]:
    """The network that a run chose (its best checkpoint), or that of a given checkpoint. Raises CheckpointError."""
    run, path = find_run(target, root)
    experiment = load(run / runs.CONFIG)
    saved = checkpoint.load(path) if path else checkpoint.load_newest(run / "checkpoints", "best", say)
    if saved is None:
        raise CheckpointError(f"{run}: no checkpoint yet")
    facts = Facts.from_json(saved.state["facts"])
    built = network(experiment, facts).network
    weights = saved.parts.get("ema", saved.parts["model"])
    expected = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != given:
        names = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise CheckpointError(f"{saved.path}: does not fit {run / runs.CONFIG}: {', '.join(names[:10])}")
    made = materialize(built, 0)
    made.load_state_dict(weights)
    made.to(device).to(memory_format=torch.channels_last).eval()
    step = int(saved.state["training"]["step"])
    return experiment, Trained(made, experiment.task, facts, experiment.data.image, run, step, device)


def eval_data(experiment: Experiment, given: Trained, split: str | None) -> tuple[str, Dataset]:
    """The split to report (test where there is one, else val), decoded; its classes must be the network's."""
    indexed = index(experiment.data)
    name = split or ("test" if "test" in indexed.splits else "val")
    if name not in indexed.splits:
        raise DataError(f"no split {name!r}; the data has {', '.join(indexed.splits)}")
    data = dataset(experiment, indexed, [name])
    if name in indexed.held_out and data.facts.fingerprint != given.facts.fingerprint:
        say(f"the data changed since the training: pictures of the held-out {name} split may have been trained on")
    if data.facts.classes != given.facts.classes:
        raise DataError(f"the data's classes {data.facts.classes} are not the network's {given.facts.classes}")
    return name, replace(data, facts=given.facts)
