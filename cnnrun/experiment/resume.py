"""Going on with a run that was stopped: which one, whether it is the same, and from which checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.base.bounded_files import open_gzip
from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import Facts
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.config_differences import describe_changes
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.schema import Experiment
from cnnrun.model.weights_file import Weights
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.run_records import (
    CHECKPOINTS,
    CONFIG,
    DATA_LIST,
    ENVIRONMENT,
    Environment,
    parse_facts,
    read_environments,
    read_facts,
    read_initial_weights,
)


@dataclass(frozen=True)
class ResumableRun:
    """A run of the same config that `--resume` takes up; of a finished one nothing is left to train."""

    run: Path
    is_finished: bool


def find_resumable(experiment: Experiment, root: Path, resume: bool, strict: bool = False) -> ResumableRun | None:
    """The newest unfinished run of the same config, else the newest finished one; None where there is none.

    Without `resume` says that there is an unfinished one. `strict`: where there are only unfinished runs of other
    settings, raises CheckpointError that names them.
    """
    left = run_folder.unfinished_runs(root, experiment.name)
    if not resume:
        if left:
            say(f"{left[0]} is unfinished; --resume would go on with it")
        return None
    run, others = _same_config(experiment, left)
    if run is None and (done := find_finished_run(experiment, root)):
        say(f"{done} of this config is finished: there is nothing left to train")
        return ResumableRun(done, is_finished=True)
    if run is None and others and strict:
        raise CheckpointError(*others, "--strict-resume goes on with nothing but the same; --resume would start anew")
    for line in others:
        say(line)
    if run is None:
        return None
    say(f"going on with {run}")
    return ResumableRun(run, is_finished=False)


def _same_config(experiment: Experiment, left: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The first run of the same config, and why those before it are not."""
    others: list[str] = []
    for run in left:
        run_folder.refuse_links(run)
        try:
            other = read_config(run / CONFIG)
        except ConfigError as error:
            others.append(f"{run} is unfinished, but its config cannot be read: {error.lines[0]}")
            continue
        if not (differ := describe_changes(other, experiment.with_statistics_of(other))):
            return run, others
        others += [f"{run} is unfinished, but of other settings: {line}" for line in differ]
    return None, others


def refuse_changed_data(run: Path, fingerprint: str) -> None:
    """Raises CheckpointError where a finished run learned from other data than there is now."""
    before = read_facts(run)
    if before is not None and before.fingerprint != fingerprint:
        raise CheckpointError(f"{run} is finished, but the data changed since; train anew without --resume")


def refuse_unrepeatable(experiment: Experiment, device: torch.device) -> None:
    """Raises CheckpointError where a resumed training could differ from an uninterrupted one on any machine."""
    if device.type == "cuda" and not experiment.train.deterministic:
        line = "--strict-resume: train.deterministic is false, so nothing repeats to the bit on a GPU"
        raise CheckpointError(f"{line}; --resume would go on all the same")


def check_run_environment(run: Folder, environment: Environment, strict: bool) -> None:
    """Say what of the machine is not as it was; `strict`: raises CheckpointError that names it."""
    before = read_environments(run.path)
    if strict and (lines := [line for each in before for line in run_folder.environment_changes(each, environment)]):
        lines = [f"{run.path}: {line}" for line in dict.fromkeys(lines)]
        raise CheckpointError(*lines, "--resume would go on all the same")
    for line in run_folder.environment_changes(before[-1], environment) if before else ():
        say(f"{line}: the result may differ in its last bits from an uninterrupted run's")
    if environment not in before:
        first, *later = [*before, environment]
        data = json_bytes(first | ({"later": later} if later else {}))
        with storage_errors(run.path / ENVIRONMENT, len(data)):
            run.replace(ENVIRONMENT, data)


def refuse_changed_weights(run: Path, given: Weights) -> None:
    """Raises CheckpointError when a run without a checkpoint would begin again from other weights."""
    before = read_initial_weights(run)
    if before and before.sha256 != given.digest:
        raise CheckpointError(f"{run}: the weights it began with changed since; train anew without --resume")


def load_resume_checkpoint(run: Folder | None, data: Dataset, ranks: Ranks) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, if the run has one: as rank 0, which has the `run`, has it.

    Raises CheckpointError for other data.
    """
    found: list[checkpoints.Checkpoint] = []

    def load_it() -> Any:
        assert run is not None
        found.extend(each for each in [_saved_in(run, data)] if each)
        return [[str(each.path), list(each.parts), each.state] for each in found]

    about = ranks.broadcast(load_it)
    if not about:
        return None
    path, names, state = about[0]
    flat = {f"{part}/{name}": value for each in found for part, of in each.parts.items() for name, value in of.items()}
    sent = ranks.broadcast_tensors(flat if found else None)
    parts: checkpoints.CheckpointParts = {name: {} for name in names}
    for key, value in sent.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return checkpoints.Checkpoint(Path(path), parts, state)


def _saved_in(run: Folder, data: Dataset) -> checkpoints.Checkpoint | None:
    with storage_errors(run.path / CHECKPOINTS, 0):
        folder = run.open_child(CHECKPOINTS, create=True)
        checkpoints.repair_killed_save(folder)
    saved = checkpoints.load_newest(folder.path, "latest", say)
    before = parse_facts(saved.state.get("facts"), str(saved.path)) if saved else read_facts(run.path)
    if before is not None:
        _refuse_other_data(run.path, before, data)
    return saved


def _refuse_other_data(run: Path, before: Facts, data: Dataset) -> None:
    """Raises CheckpointError where the data is not what the run began with."""
    facts = data.facts
    if before.fingerprint != facts.fingerprint:
        what = f"{sum(before.counts.values())} pictures in {len(before.classes)} classes then, "
        what += f"{sum(facts.counts.values())} in {len(facts.classes)} now{_first_difference(run, data)}"
        if before.classes != facts.classes:
            what += f"; classes were {', '.join(before.classes)}, are {', '.join(facts.classes)}"
        raise CheckpointError(f"{run}: the data changed since it was started ({what}); train anew without --resume")


def _first_difference(run: Path, data: Dataset) -> str:
    """The first file that is not as a run's listing has it; nothing where that cannot be told."""
    try:
        with open_gzip(run / DATA_LIST, CheckpointError) as listing:
            before = listing.read().decode(errors="replace").split("\n")
    except CheckpointError:
        return ""
    for old, new in itertools.zip_longest(before, data.listing_lines(), fillvalue=""):
        if old != new:
            paths = [_listed_path(line) for line in (old, new)]
            if paths[0] == paths[1]:
                return f"; {paths[0]} changed"
            is_new = paths[1] and all(_listed_path(line) != paths[1] for line in before)
            return f"; {paths[1]} is new" if is_new else f"; {paths[0]} is gone"
    return ""


def _listed_path(line: str) -> str:
    """The path in a line of a run's listing; nothing where the line is none."""
    cells = line.split("\t")
    return escape(cells[1]) if len(cells) > 1 else ""


def find_finished_run(experiment: Experiment, root: Path) -> Path | None:
    """The newest finished run of the same config."""
    for run in run_folder.finished_runs(root, experiment.name):
        run_folder.refuse_links(run)
        try:
            other = read_config(run / CONFIG)
        except ConfigError:
            continue
        if not describe_changes(other, experiment.with_statistics_of(other)):
            return run
    return None
