"""Resume a stopped run: find it, check that config, data, weights and machine are the same, load its checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.base.bounded_files import open_gzip
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.facts import DataFacts
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
class EarlierRun:
    """The run of the same config that `--resume` continues, or whose result it returns if it is finished."""

    run: Path
    is_finished: bool


def find_resumable(experiment: Experiment, runs: Path, resume: bool, strict: bool = False) -> EarlierRun | None:
    """Find the newest unfinished run of the same config, or else the newest finished one; None if there is neither.

    Without `resume`, only log that an unfinished run exists. With `strict`, raise CheckpointError if all unfinished
    runs have other settings.
    """
    unfinished = run_folder.unfinished_runs(runs, experiment.name)
    if not resume:
        if unfinished:
            say(f"{unfinished[0]} is unfinished; use --resume to continue it")
        return None
    run, differences = _find_same_config(experiment, unfinished)
    if run is None and (finished := find_finished_run(experiment, runs)):
        say(f"{finished} of this config is finished: there is nothing left to train")
        return EarlierRun(finished, is_finished=True)
    if run is None and differences and strict:
        advice = "--strict-resume needs an unfinished run with the same settings; use --resume to start a new run"
        raise CheckpointError(*differences, advice)
    for line in differences:
        say(line)
    if run is None:
        return None
    say(f"resuming {run}")
    return EarlierRun(run, is_finished=False)


def _find_same_config(experiment: Experiment, runs: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Find the first run of the same config; also return a line for each difference of the runs before it."""
    lines: list[str] = []
    for run in runs:
        run_folder.refuse_links(run)
        try:
            earlier = read_config(run / CONFIG)
        except ConfigError as error:
            lines.append(f"{run} is unfinished, but its config cannot be read: {error.lines[0]}")
            continue
        if not (changes := describe_changes(earlier, experiment.with_measured_settings_of(earlier))):
            return run, lines
        lines += [f"{run} is unfinished, but {change} now" for change in changes]
    return None, lines


def check_unchanged_data(run: Path, fingerprint: str) -> None:
    """Raise CheckpointError if the data has changed since a finished run was trained."""
    facts_at_start = read_facts(run)
    if facts_at_start is not None and facts_at_start.fingerprint != fingerprint:
        raise CheckpointError(f"{run} is finished, but the data has changed since then; train again without --resume")


def check_repeatable(experiment: Experiment, device: torch.device) -> None:
    """Raise CheckpointError if the training is not deterministic, so a resumed one could differ on the same machine."""
    if device.type == "cuda" and not experiment.train.deterministic:
        line = "--strict-resume: train.deterministic is false, so results on a GPU do not repeat to the bit"
        raise CheckpointError(f"{line}; use --resume to continue anyway")


def check_run_environment(run: Folder, environment: Environment, strict: bool) -> None:
    """Log how the machine and the versions differ from the run's, and record them.

    With `strict`, raise CheckpointError if there is a difference.
    """
    earlier = read_environments(run.path)
    if strict and (lines := [line for past in earlier for line in run_folder.environment_changes(past, environment)]):
        lines = [f"{run.path}: {line}" for line in dict.fromkeys(lines)]
        raise CheckpointError(*lines, "use --resume to continue anyway")
    for line in run_folder.environment_changes(earlier[-1], environment) if earlier else ():
        say(f"{line}: the result may differ in its last bits from an uninterrupted run's")
    if environment not in earlier:
        # The file holds the first environment and, under `later`, those of resumes.
        first, *later = [*earlier, environment]
        data = json_bytes(first | ({"later": later} if later else {}))
        with storage_errors(run.path / ENVIRONMENT, len(data)):
            run.replace(ENVIRONMENT, data)


def restore_thread_count(environments: Sequence[Environment]) -> None:
    """Compute in as many threads as when the run began, because sums depend on it, if there are as many processors.

    OMP_NUM_THREADS wins; `check_run_environment` then logs the difference.
    """
    threads = environments[0].get("threads") if environments else None
    if not isinstance(threads, int) or "OMP_NUM_THREADS" in os.environ or threads == torch.get_num_threads():
        return
    if 0 < threads <= processor_count():
        torch.set_num_threads(threads)
        say(f"computing in {format_count(threads, 'thread')}, as when the run began")


def check_unchanged_weights(run: Path, weights: Weights) -> None:
    """Raise CheckpointError if the weights are not the ones that the run started from."""
    recorded_weights = read_initial_weights(run)
    if recorded_weights and recorded_weights.sha256 != weights.digest:
        problem = "the initial weights have changed since the run was started"
        raise CheckpointError(f"{run}: {problem}; train again without --resume")


def load_resume_checkpoint(run: Folder | None, data: Dataset, ranks: Ranks) -> checkpoints.Checkpoint | None:
    """Load the checkpoint to resume from on rank 0, which has the folder `run`, and send it to every rank.

    None if the run has no checkpoint. Raises CheckpointError if the data has changed.
    """
    local_checkpoints: list[checkpoints.Checkpoint] = []  # at most one, on rank 0

    def load_header() -> Any:
        assert run is not None
        checkpoint = _load_checkpoint(run, data)
        if checkpoint is None:
            return None
        local_checkpoints.append(checkpoint)
        return [str(checkpoint.path), list(checkpoint.parts), checkpoint.state]

    header = ranks.broadcast(load_header)
    if not header:
        return None
    path, part_names, state = header
    tensors = {
        f"{part}/{name}": value
        for checkpoint in local_checkpoints
        for part, values in checkpoint.parts.items()
        for name, value in values.items()
    }
    received = ranks.broadcast_tensors(tensors if local_checkpoints else None)
    parts: checkpoints.CheckpointParts = {name: {} for name in part_names}
    for key, value in received.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return checkpoints.Checkpoint(Path(path), parts, state)


def _load_checkpoint(run: Folder, data: Dataset) -> checkpoints.Checkpoint | None:
    """Load the run's newest checkpoint, if it has one. Raises CheckpointError if the data has changed."""
    with storage_errors(run.path / CHECKPOINTS, 0):
        folder = run.open_child(CHECKPOINTS, create=True)
        checkpoints.repair_killed_save(folder)
    checkpoint = checkpoints.load_newest(folder.path, "latest", say)
    recorded_facts = parse_facts(checkpoint.state, str(checkpoint.path))[0] if checkpoint else read_facts(run.path)
    if recorded_facts is not None:
        _refuse_other_data(run.path, recorded_facts, data)
    return checkpoint


def _refuse_other_data(run: Path, recorded_facts: DataFacts, data: Dataset) -> None:
    """Raise CheckpointError, with what changed, if the data is not what the run was started with."""
    facts = data.facts
    if recorded_facts.fingerprint != facts.fingerprint:
        sizes = f"{_describe_size(recorded_facts)} then, {_describe_size(facts)} now"
        changes = f"{sizes}{_first_difference(run, data)}"
        if recorded_facts.classes != facts.classes:
            changes += f"; the classes were {join_names(recorded_facts.classes)}, and are {join_names(facts.classes)}"
        problem = f"the data has changed since the run was started ({changes})"
        raise CheckpointError(f"{run}: {problem}; train again without --resume")


def _describe_size(facts: DataFacts) -> str:
    images, classes = sum(facts.counts.values()), len(facts.classes)
    return f"{format_count(images, 'image')} in {format_count(classes, 'class', 'classes')}"


def _first_difference(run: Path, data: Dataset) -> str:
    """Describe the first file that differs from the run's listing; empty if the listing cannot be read."""
    try:
        with open_gzip(run / DATA_LIST, CheckpointError) as listing:
            recorded_lines = listing.read().decode(errors="replace").split("\n")
    except CheckpointError:
        return ""
    for old, new in itertools.zip_longest(recorded_lines, data.listing_lines(), fillvalue=""):
        if old != new:
            old_path, new_path = _listed_path(old), _listed_path(new)
            if old_path == new_path:
                return f"; {old_path} changed"
            is_new = new_path and all(_listed_path(line) != new_path for line in recorded_lines)
            return f"; {new_path} is new" if is_new else f"; {old_path} is gone"
    return ""


def _listed_path(line: str) -> str:
    """The path in a line of a run's listing; empty for an empty line."""
    cells = line.split("\t")
    return escape(cells[1]) if len(cells) > 1 else ""


def find_finished_run(experiment: Experiment, runs: Path) -> Path | None:
    """Find the newest finished run of the same config."""
    for run in run_folder.finished_runs(runs, experiment.name):
        run_folder.refuse_links(run)
        try:
            earlier = read_config(run / CONFIG)
        except ConfigError:
            continue
        if not describe_changes(earlier, experiment.with_measured_settings_of(earlier)):
            return run
    return None
