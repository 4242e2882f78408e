"""Train an experiment in a run folder: start a new run, resume one, or return the result of a finished one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import Folder
from cnnrun.base.bounded_files import read_text
from cnnrun.base.device import reset_peak_memory
from cnnrun.base.errors import CheckpointError
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks, join_ranks
from cnnrun.data.index import index_source
from cnnrun.data.prepare import data_fingerprint
from cnnrun.experiment.assemble import create_run, load_initial_weights
from cnnrun.experiment.config_file import parse_config, read_config
from cnnrun.experiment.extensions import create_extension, extends, find_extended_run
from cnnrun.experiment.preparation import PreparedTraining, prepare_training
from cnnrun.experiment.resume import (
    check_repeatable,
    check_run_environment,
    check_unchanged_data,
    check_unchanged_weights,
    find_resumable,
    load_resume_checkpoint,
    restore_thread_count,
)
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_same_data, class_notes, step_notes
from cnnrun.training import run_folder
from cnnrun.training.checkpoint_pointers import LATEST
from cnnrun.training.hooks import TrainingHooks
from cnnrun.training.loop import fit
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, read_environments, read_result

Result = dict[str, Any]


@dataclass(frozen=True)
class RunHooks(TrainingHooks):
    """Functions that a caller adds to a training in a run folder."""

    record: Callable[[Experiment, Folder, dict[str, Any], Result], None] | None = None
    """Called with the config, the run folder, its environment and the result after a training that was not resumed."""


_NO_HOOKS = RunHooks()


Resume = bool | Literal["strict"]


def train(
    experiment: Experiment,
    runs: Path,
    device: torch.device,
    resume: Resume = False,
    hooks: RunHooks = _NO_HOOKS,
    extend: Path | None = None,
) -> Result:
    """Train to the end in a run folder in `runs`; return the result, with the folder as `run`.

    `resume` continues the newest unfinished run of the config; if it is already finished, nothing is trained. If it is
    "strict", CheckpointError is raised if the result could differ from an uninterrupted run's. `extend` is a finished
    run that the new one goes on from. Every rank must call this; only the first one writes.
    """
    strict = resume == "strict"
    reset_peak_memory(device)
    if strict:
        check_repeatable(experiment, device)
    if torchrun.is_restarted() and not resume:
        say("restarted by torchrun: resuming as with --resume")
        resume = True
    with join_ranks(device, experiment.train.timeout) as ranks:
        earlier = ranks.broadcast(lambda: _find_earlier_run(experiment, runs, extend, bool(resume), strict))
        if earlier and "finished" in earlier:
            return {"run": earlier["run"], "already_finished": True, **earlier["finished"]}
        training = _prepare_run(experiment, earlier, device, ranks)
        run = ranks.broadcast(lambda: _open_folder(training, earlier, runs))
        return _train_in_folder(training, _Start(Path(run), device, ranks, earlier is not None, strict), hooks)


@dataclass(frozen=True)
class _Start:
    """Start of a training: its folder, its device and ranks, and whether it resumes."""

    run: Path
    device: torch.device
    ranks: Ranks
    resume: bool
    strict: bool


def _train_in_folder(training: PreparedTraining, start: _Start, hooks: RunHooks) -> Result:
    """Train while the first rank locks the run folder, so that no other process can write to it."""
    experiment, run, device, ranks = training.experiment, start.run, start.device, start.ranks
    folders: list[Folder] = []  # the locked folder, on the first rank only
    with ExitStack() as stack:
        ranks.broadcast(lambda: folders.append(stack.enter_context(run_folder.hold_run(run))))
        if earlier_result := ranks.broadcast(lambda: read_result(run)):
            say(f"{run} was finished by another process meanwhile")
            return {"run": str(run), "already_finished": True, **earlier_result}
        folder = folders[0] if folders else None
        checkpoint = load_resume_checkpoint(folder, training.data, ranks) if start.resume else None
        if start.resume and device.type == "cpu":
            restore_thread_count(ranks.broadcast(lambda: read_environments(run)))
        environment = run_folder.describe_environment(device, ranks.world_size)
        ranks.broadcast(lambda: check_run_environment(folders[0], environment, start.strict))
        result = fit(training.build_setup(device, folder, ranks), checkpoint, hooks)
        if folder and checkpoint is None and hooks.record:  # the total time of a resumed run is not known
            hooks.record(experiment, folder, environment, result)
        return {"run": str(run), **result}


def _open_folder(training: PreparedTraining, earlier: dict[str, Any] | None, runs: Path) -> str:
    """The folder to train in: that of the run to resume, or a new one."""
    if earlier is None:
        return str(create_run(training.experiment, training.data, training.weights, runs))
    return create_extension(training, Path(earlier["run"]), runs) if earlier["is_extended"] else str(earlier["run"])


def _prepare_run(
    experiment: Experiment, earlier: dict[str, Any] | None, device: torch.device, ranks: Ranks
) -> PreparedTraining:
    """Prepare to continue the run `earlier`, or a new one; nothing is written before all checks have passed."""
    # A run that has a checkpoint no longer needs the weights it began with.
    weights = None if earlier and earlier["has_checkpoint"] else load_initial_weights(experiment)
    if earlier:
        experiment = experiment.with_measured_settings_of(
            parse_config(earlier["config"], str(Path(earlier["run"]) / CONFIG))
        )
    if earlier and weights:
        check_unchanged_weights(Path(earlier["run"]), weights)
    training = prepare_training(experiment, weights, device, ranks)
    for note in [*training.data.notes, *class_notes(training.experiment, training.data)]:
        say(f"data: {note}")
    for note in step_notes(training.experiment, training.data.facts):
        say(note)
    ranks.barrier(long_timeout=True)
    check_same_data(training.data, ranks)
    return training


def _find_earlier_run(
    experiment: Experiment, runs: Path, extend: Path | None, resume: bool, strict: bool
) -> dict[str, Any] | None:
    """Find the run to resume or to extend, or the finished run and its result, as plain data to send to other ranks."""
    extended = find_extended_run(experiment, extend, runs) if extend else None
    if extended is not None:
        experiment = experiment.with_measured_settings_of(read_config(extended / CONFIG))
    resumable = find_resumable(experiment, runs, resume, strict)
    if extended is not None and (resumable is None or not extends(resumable.run, extended)):
        return _describe_run(extended, is_extended=True)
    if resumable is None:
        return None
    if resumable.is_finished:
        return {"run": str(resumable.run), "finished": _read_finished(experiment, resumable.run)}
    return _describe_run(resumable.run, is_extended=False)


def _describe_run(run: Path, is_extended: bool) -> dict[str, Any]:
    has_checkpoint = (run / CHECKPOINTS / LATEST).exists()
    config = read_text(run / CONFIG, CheckpointError, folder=Folder(run))
    return {"run": str(run), "config": config, "has_checkpoint": has_checkpoint, "is_extended": is_extended}


def _read_finished(experiment: Experiment, run: Path) -> Result:
    """Read the result of a finished run. Raises CheckpointError if its data or initial weights have changed since."""
    if weights := load_initial_weights(experiment):
        check_unchanged_weights(run, weights)
    check_unchanged_data(run, data_fingerprint(experiment.data, index_source(experiment.data)))
    try:
        result = read_result(run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; remove this file and run the command again with --resume") from None
    assert result is not None
    return result
