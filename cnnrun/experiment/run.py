"""Train an experiment in a run folder: start a new run, resume one, or return the result of a finished one."""

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
    """Functions that a caller adds to a training."""

    should_stop: Callable[[int, float], bool] | None = None
    """Called after each epoch; if it returns true the training ends there: see `Job`."""
    draw: DrawFunction | None = None
    """Draws images with their targets and predictions for TensorBoard."""
    record: Callable[[Experiment, Folder, dict[str, Any], Result], None] | None = None
    """Called with the config, the run folder, its environment and the result after a training that was not resumed."""


_NO_HOOKS = Hooks()


def train(
    experiment: Experiment,
    runs: Path,
    device: torch.device,
    resume: bool = False,
    strict: bool = False,
    hooks: Hooks = _NO_HOOKS,
) -> Result:
    """Train to the end in a run folder in `runs`; return the result, with the folder as `run`.

    `resume` continues the newest unfinished run of the config; if it is already finished, nothing is trained. `strict`
    raises CheckpointError if the result could differ from an uninterrupted run's. Every rank must call this; only the
    first one writes.
    """
    reset_peak_memory(device)
    if strict:
        refuse_unrepeatable(experiment, device)
    if torchrun.was_restarted() and not resume:
        say("restarted by torchrun: resuming as with --resume")
        resume = True
    with join_ranks(device, experiment.train.timeout) as ranks:
        earlier = ranks.broadcast(lambda: _find_earlier_run(experiment, runs, resume, strict))
        if earlier and "finished" in earlier:
            return {"run": earlier["run"], "already_finished": True, **earlier["finished"]}
        prepared = _prepare_run(experiment, runs, earlier, device, ranks)
        return _train_in_folder(prepared, ranks, resume, strict, hooks)


@dataclass(frozen=True)
class _PreparedRun:
    """A run that is ready to train: its folder exists, and its config, initial weights and data are loaded."""

    experiment: Experiment
    weights: Weights | None
    data: Dataset
    run: Path
    device: torch.device


def _train_in_folder(prepared: _PreparedRun, ranks: Ranks, resume: bool, strict: bool, hooks: Hooks) -> Result:
    """Train while the first rank locks the run folder, so that no other process can write to it."""
    experiment, run, device = prepared.experiment, prepared.run, prepared.device
    folders: list[Folder] = []  # the locked folder, on the first rank only
    with ExitStack() as stack:
        ranks.broadcast(lambda: folders.append(stack.enter_context(run_folder.hold_run(run))))
        if earlier_result := ranks.broadcast(lambda: read_result(run)):
            say(f"{run} was finished by another process meanwhile")
            return {"run": str(run), "already_finished": True, **earlier_result}
        folder = folders[0] if folders else None
        checkpoint = load_resume_checkpoint(folder, prepared.data, ranks) if resume else None
        environment = run_folder.describe_environment(device, ranks.world_size)
        ranks.broadcast(lambda: check_run_environment(folders[0], environment, strict))
        job = assemble_job(experiment, prepared.data, prepared.weights, folder, device, ranks, hooks.should_stop)
        result = fit(replace(job, draw=hooks.draw), checkpoint)
        if folder and checkpoint is None and hooks.record:  # the total time of a resumed run is not known
            hooks.record(experiment, folder, environment, result)
        return {"run": str(run), **result}


def _prepare_run(
    experiment: Experiment, runs: Path, earlier: dict[str, Any] | None, device: torch.device, ranks: Ranks
) -> _PreparedRun:
    """Prepare the unfinished run `earlier`, or create a new one after all checks."""
    # A run that has a checkpoint no longer needs its initial weights.
    weights = None if earlier and earlier["has_checkpoint"] else load_initial_weights(experiment)
    if earlier:
        experiment = experiment.with_statistics_of(parse_config(earlier["config"], str(Path(earlier["run"]) / CONFIG)))
    if earlier and weights:
        refuse_changed_weights(Path(earlier["run"]), weights)
    experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
    data = _prepare_data(experiment, weights, ranks)
    run = earlier["run"] if earlier else ranks.broadcast(lambda: str(create_run(experiment, data, weights, runs)))
    return _PreparedRun(experiment, weights, data, Path(run), device)


def _prepare_data(experiment: Experiment, weights: Weights | None, ranks: Ranks) -> Dataset:
    """Decode the data and check that the experiment can train on it, before anything is written to disk."""
    data = prepare_dataset(experiment)
    for note in data.notes:
        say(f"data: {note}")
    refuse_unlearnable(experiment, data, weights, ranks.world_size)
    for note in notes_on_classes(experiment, data):
        say(f"data: {note}")
    ranks.barrier(long_timeout=True)
    check_same_data(data, ranks)
    return data


def _find_earlier_run(experiment: Experiment, runs: Path, resume: bool, strict: bool) -> dict[str, Any] | None:
    """Find the run to resume, or the finished run and its result, as plain data that can be sent to other ranks."""
    resumable = find_resumable(experiment, runs, resume, strict)
    if resumable is None:
        return None
    run = resumable.run
    if resumable.is_finished:
        return {"run": str(run), "finished": _read_finished(experiment, run)}
    has_checkpoint = (run / CHECKPOINTS / "latest").exists()
    config = read_text(run / CONFIG, CheckpointError, folder=Folder(run))
    return {"run": str(run), "config": config, "has_checkpoint": has_checkpoint}


def _read_finished(experiment: Experiment, run: Path) -> Result:
    """Read the result of a finished run. Raises CheckpointError if its data or initial weights have changed since."""
    if weights := load_initial_weights(experiment):
        refuse_changed_weights(run, weights)
    refuse_changed_data(run, data_fingerprint(experiment.data, index_source(experiment.data)))
    try:
        result = read_result(run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; remove this file and run the command again with --resume") from None
    assert result is not None
    return result
