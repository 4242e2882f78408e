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
from cnnrun.base.device import reset_peak_memory
from cnnrun.base.errors import CheckpointError
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks, join_ranks
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import index_source
from cnnrun.data.prepare import data_fingerprint
from cnnrun.experiment.assemble import assemble_job, create_run, load_initial_weights, prepare_dataset
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.resume import (
    check_run_environment,
    find_resumable,
    load_resume_checkpoint,
    refuse_changed_data,
    refuse_changed_weights,
    refuse_unrepeatable,
)
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_same_data, notes_on_classes, refuse_unlearnable
from cnnrun.model.weights_file import Weights
from cnnrun.training import run_folder
from cnnrun.training.learner import DrawFunction
from cnnrun.training.loop import fit
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, read_result

Result = dict[str, Any]


@dataclass(frozen=True)
class Hooks:
    """What a caller adds to a training."""

    should_stop: Callable[[int, float], bool] | None = None
    """Asked after each epoch whether the training may end there: see `Job`."""
    draw: DrawFunction | None = None
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
    reset_peak_memory(device)
    if strict:
        refuse_unrepeatable(experiment, device)
    if torchrun.was_restarted() and not resume:
        say("torchrun started this again: going on as with --resume")
        resume = True
    with join_ranks(device, experiment.train.timeout) as ranks:
        earlier = ranks.broadcast(lambda: _find_earlier(experiment, root, resume, strict))
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
        ranks.broadcast(lambda: opened.append(stack.enter_context(run_folder.hold_run(run))))
        if reached := ranks.broadcast(lambda: read_result(run)):
            say(f"{run} was finished by another process meanwhile")
            return {"run": str(run), "already_finished": True, **reached}
        folder = opened[0] if opened else None
        saved = load_resume_checkpoint(folder, prepared.data, ranks) if resume else None
        environment = run_folder.describe_environment(device, ranks.world_size)
        ranks.broadcast(lambda: check_run_environment(opened[0], environment, strict))
        training = assemble_job(experiment, prepared.data, prepared.weights, folder, device, ranks, hooks.should_stop)
        result = fit(replace(training, draw=hooks.draw), saved)
        if folder and saved is None and hooks.record:  # how long a resumed run took is not known
            hooks.record(experiment, folder, environment, result)
        return {"run": str(run), **result}


def _prepare(
    experiment: Experiment, root: Path, earlier: dict[str, Any] | None, device: torch.device, ranks: Ranks
) -> _Prepared:
    """Prepare the unfinished `earlier` run, or make a new one once everything is known to fit."""
    # A run that has a checkpoint no longer needs the weights it began with.
    weights = None if earlier and earlier["saved"] else load_initial_weights(experiment)
    if earlier:
        experiment = experiment.with_statistics_of(parse_config(earlier["config"], str(Path(earlier["run"]) / CONFIG)))
    if earlier and weights:
        refuse_changed_weights(Path(earlier["run"]), weights)
    experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
    data = _learnable_data(experiment, weights, ranks)
    run = earlier["run"] if earlier else ranks.broadcast(lambda: str(create_run(experiment, data, weights, root)))
    return _Prepared(experiment, weights, data, Path(run), device)


def _learnable_data(experiment: Experiment, weights: Weights | None, ranks: Ranks) -> Dataset:
    """The data, decoded, once everything is known to fit: nothing is made on the disk for what cannot be trained."""
    data = prepare_dataset(experiment)
    for note in data.notes:
        say(f"data: {note}")
    refuse_unlearnable(experiment, data, weights, ranks.world_size)
    for note in notes_on_classes(experiment, data):
        say(f"data: {note}")
    ranks.barrier(long_timeout=True)
    check_same_data(data, ranks)
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
    if weights := load_initial_weights(experiment):
        refuse_changed_weights(run, weights)
    refuse_changed_data(run, data_fingerprint(experiment.data, index_source(experiment.data)))
    try:
        reached = read_result(run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; remove it, and --resume writes it anew") from None
    assert reached is not None
    return reached
