"""A training from its config to its result, in a run folder: new, resumed, or found finished."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import Folder
from cnnrun.base.bounded_files import read_text
from cnnrun.base.device import forget_peak_memory
from cnnrun.base.errors import CheckpointError
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks, joined
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import index
from cnnrun.data.prepare import fingerprint
from cnnrun.experiment.assemble import create, dataset, initial, job
from cnnrun.experiment.config_file import parse
from cnnrun.experiment.learnable import notes_on_classes, refuse_unlearnable, same_everywhere
from cnnrun.experiment.resume import (
    find_resumable,
    refuse_changed_data,
    refuse_unrepeatable,
    same_weights,
    saved_in,
    unchanged,
)
from cnnrun.experiment.schema import Experiment
from cnnrun.model.weights_file import Weights
from cnnrun.training import run_folder
from cnnrun.training.learner import Draw
from cnnrun.training.loop import fit
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, read_result

Result = dict[str, Any]


@dataclass(frozen=True)
class Hooks:
    """What a caller adds to a training."""

    enough: Callable[[int, float], bool] | None = None
    """Asked after each epoch whether the training may end there: see `Job`."""
    draw: Draw | None = None
    """Draws what is in images and what was found in them, for TensorBoard."""
    record: Callable[[Experiment, Folder, dict[str, Any], Result], None] | None = None
    """Takes the config, the run folder, its environment and the result of a training that was not resumed."""


_NO_HOOKS = Hooks()


def train(
    experiment: Experiment,
    root: Path,
    device: torch.device,
    resume: bool = False,
    strict: bool = False,
    hooks: Hooks = _NO_HOOKS,
) -> Result:
    """Train to the end in a run folder below `root`; returns what was reached, with the folder as `run`.

    With `resume` the newest unfinished run of the config goes on; a finished one trains nothing. `strict` refuses to
    resume where the result could differ from an uninterrupted run's. Every rank calls this; the first one writes.
    """
    forget_peak_memory(device)
    if strict:
        refuse_unrepeatable(experiment, device)
    if torchrun.restarted() and not resume:
        say("torchrun started this again: going on as with --resume")
        resume = True
    with joined(device, experiment.train.timeout) as ranks:
        earlier = ranks.from_first(lambda: _find_earlier(experiment, root, resume, strict))
        if earlier and "finished" in earlier:
            return {"run": earlier["run"], "already_finished": True, **earlier["finished"]}
        prepared = _prepare(experiment, root, earlier, device, ranks)
        return _train_in_folder(prepared, ranks, resume, strict, hooks)


@dataclass(frozen=True)
class _Prepared:
    """A run whose folder is there: its config, the weights it begins with if any are given, its data, its device."""

    experiment: Experiment
    weights: Weights | None
    data: Dataset
    run: Path
    device: torch.device


def _train_in_folder(prepared: _Prepared, ranks: Ranks, resume: bool, strict: bool, hooks: Hooks) -> Result:
    """Train while no other process may write to the run folder, which the first rank holds."""
    experiment, run, device, opened = prepared.experiment, prepared.run, prepared.device, list[Folder]()
    with ExitStack() as stack:
        ranks.from_first(lambda: opened.append(stack.enter_context(run_folder.held(run))))
        if reached := ranks.from_first(lambda: read_result(run)):
            say(f"{run} was finished by another process meanwhile")
            return {"run": str(run), "already_finished": True, **reached}
        folder = opened[0] if opened else None
        saved = saved_in(folder, prepared.data, ranks) if resume else None
        environment = run_folder.environment(device, ranks.size)
        ranks.from_first(lambda: unchanged(opened[0], environment, strict))
        training = job(experiment, prepared.data, prepared.weights, folder, device, ranks, hooks.enough)
        result = fit(replace(training, draw=hooks.draw), saved)
        if folder and saved is None and hooks.record:  # how long a resumed run took is not known
            hooks.record(experiment, folder, environment, result)
        return {"run": str(run), **result}


def _prepare(
    experiment: Experiment, root: Path, earlier: dict[str, Any] | None, device: torch.device, ranks: Ranks
) -> _Prepared:
    """Prepare the unfinished `earlier` run, or make a new one once everything is known to fit."""
    # A run that has a checkpoint no longer needs the weights it began with.
    weights = None if earlier and earlier["saved"] else initial(experiment)
    if earlier:
        experiment = experiment.with_statistics_of(parse(earlier["config"], str(Path(earlier["run"]) / CONFIG)))
    if earlier and weights:
        same_weights(Path(earlier["run"]), weights)
    experiment = experiment.with_weights_of(weights.facts if weights else None)
    data = _learnable_data(experiment, weights, ranks)
    run = earlier["run"] if earlier else ranks.from_first(lambda: str(create(experiment, data, weights, root)))
    return _Prepared(experiment, weights, data, Path(run), device)


def _learnable_data(experiment: Experiment, weights: Weights | None, ranks: Ranks) -> Dataset:
    """The data, decoded, once everything is known to fit: nothing is made on the disk for what cannot be trained."""
    data = dataset(experiment)
    for note in data.notes:
        say(f"data: {note}")
    refuse_unlearnable(experiment, data, weights, ranks.size)
    for note in notes_on_classes(experiment, data):
        say(f"data: {note}")
    ranks.wait(patiently=True)
    same_everywhere(data, ranks)
    return data


def _find_earlier(experiment: Experiment, root: Path, resume: bool, strict: bool) -> dict[str, Any] | None:
    """The run to go on with, or the finished one and what it reached, as data that ranks can send each other."""
    found = find_resumable(experiment, root, resume, strict)
    if found is None:
        return None
    if found.is_finished:
        return {"run": str(found.run), "finished": _reached(experiment, found.run)}
    saved = (found.run / CHECKPOINTS / "latest").exists()
    config = read_text(found.run / CONFIG, CheckpointError, folder=Folder(found.run))
    return {"run": str(found.run), "config": config, "saved": saved}


def _reached(experiment: Experiment, run: Path) -> Result:
    """Read what a finished run of this config reached. Raises CheckpointError where data or weights changed since."""
    if weights := initial(experiment):
        same_weights(run, weights)
    refuse_changed_data(run, fingerprint(experiment.data, index(experiment.data)))
    try:
        reached = read_result(run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; remove it, and --resume writes it anew") from None
    assert reached is not None
    return reached
