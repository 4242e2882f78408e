"""Extend a finished run: a new run that goes on from its checkpoint, with more epochs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from cnnrun.base.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import truncate_lines
from cnnrun.base.errors import CheckpointError, ConfigError, UserError
from cnnrun.base.progress import say
from cnnrun.experiment.assemble import create_run
from cnnrun.experiment.config_differences import describe_changes, list_differences
from cnnrun.experiment.open_run import find_run, read_run_config
from cnnrun.experiment.preparation import PreparedTraining
from cnnrun.experiment.schema import Experiment
from cnnrun.model.weights_file import file_digest
from cnnrun.training import checkpoints
from cnnrun.training.checkpoint_pointers import BEFORE_DECAY, BEST, LATEST, name_of_step, read_pointer
from cnnrun.training.run_records import (
    CHECKPOINTS,
    ENVIRONMENT,
    EXTENDED,
    EXTENSIONS,
    FACTS,
    INITIAL_WEIGHTS,
    MAX_METRICS_BYTES,
    METRICS,
    RESULT,
    read_extension,
    read_extensions,
    read_facts,
    read_result,
)
from cnnrun.training.state import TrainingState

# Settings that say what the checkpoint's tensors, steps and best metric mean: an extension cannot change them.
_FIXED = (
    *("task", "data", "model", "seed", "train.batch", "train.accumulate", "train.drop_last", "train.sampler"),
    *("train.freeze", "train.freeze_epochs", "train.ema", "train.monitor"),
)
_NOT_FIXED = ("data.augment",)
# An optimizer's settings that change no tensor of its state.
_FREE_OPTIMIZER_SETTINGS = re.compile(r"train\.optimizer\.\w+\.(lr|weight_decay|betas|eps)(\[\d\])?")
_MAX_FILE_BYTES = 16 << 30


def find_extended_run(experiment: Experiment, run: Path, runs: Path) -> Path:
    """Find the finished run that `experiment` extends, and log how the settings differ.

    Raises CheckpointError if it is unfinished, and ConfigError if settings differ that an extension cannot change.
    """
    folder, checkpoint = find_run(run, runs)
    if checkpoint:
        raise ConfigError(f"--extend {run}: give the run, {folder}, not one of its checkpoints")
    if not (folder / RESULT).exists():
        raise CheckpointError(f"{folder} is unfinished; finish it with --resume before it is extended")
    before = read_run_config(folder)
    now = experiment.with_measured_settings_of(before)
    fixed = [
        f"{folder}: {line}"
        for (key, _, _), line in zip(list_differences(before, now), describe_changes(before, now), strict=True)
        if _is_fixed(key)
    ]
    if fixed:
        advice = (
            f"--extend cannot change this; to start from its weights: `model: {{layers: [...], weights: {folder}}}`"
        )
        raise ConfigError(*truncate_lines(fixed, "settings"), advice)
    for change in describe_changes(before, now):
        say(f"extending {folder}: {change}")
    return folder


def _is_fixed(key: str) -> bool:
    if key.startswith("train.optimizer"):
        return not _FREE_OPTIMIZER_SETTINGS.fullmatch(key)
    return key.startswith(_FIXED) and not key.startswith(_NOT_FIXED)


def extends(run: Path, extended: Path) -> bool:
    """Return whether a run goes on from `extended`. Raises CheckpointError if its record is damaged."""
    record = read_extension(run)
    return record is not None and Path(record.run).resolve() == extended.resolve()


def create_extension(training: PreparedTraining, extended: Path, runs: Path) -> str:
    """Create the run that goes on from `extended`, with its checkpoint and its log until then; returns its folder.

    Raises ConfigError if nothing is left to train, and CheckpointError if the data or the checkpoint changed.
    """
    _refuse_other_data(training, extended)
    folder = extended / CHECKPOINTS
    pointer = BEFORE_DECAY if read_pointer(folder, BEFORE_DECAY) else LATEST
    name = read_pointer(folder, pointer)
    if name is None:
        raise CheckpointError(f"{folder}: no {pointer} checkpoint; the run cannot be extended")
    checkpoint = checkpoints.load(folder / name)
    state = TrainingState.from_json(checkpoint.state.get("training"), str(checkpoint.path))
    epochs = read_run_config(extended).train.epochs
    _refuse_finished(training, state, extended)
    _describe_start(training, state, extended, epochs)
    files = {f"{CHECKPOINTS}/{path}": data for path, data in _checkpoint_files(folder, name, state)}
    files[METRICS] = read_bytes(extended / METRICS, CheckpointError, MAX_METRICS_BYTES)
    if len(files[METRICS]) < state.metrics_offset:
        raise CheckpointError(f"{extended / METRICS}: its last bytes are missing, so the run cannot be extended")
    for record in (ENVIRONMENT, INITIAL_WEIGHTS):
        if (extended / record).exists():
            files[record] = read_bytes(extended / record, CheckpointError, checkpoints.MAX_JSON_BYTES, Folder(extended))
    files[EXTENDED] = json_bytes(
        {
            "run": str(extended),
            "epochs": epochs,
            "step": state.step,
            "sha256": file_digest(checkpoint.path / checkpoints.MANIFEST),
        }
    )
    run = create_run(training.experiment, training.data, None, runs, files)
    _record_extension(extended, run)
    return str(run)


def _refuse_other_data(training: PreparedTraining, extended: Path) -> None:
    facts = read_facts(extended)
    if facts is None:
        raise CheckpointError(f"{extended}: has no {FACTS}, so it is not known which data it was trained on")
    if facts.fingerprint != training.data.facts.fingerprint:
        problem = "the data has changed since it was trained, so it cannot be extended"
        advice = f"to start from its weights: `model: {{layers: [...], weights: {extended}}}`"
        raise CheckpointError(f"{extended}: {problem}; {advice}")


def _refuse_finished(training: PreparedTraining, state: TrainingState, extended: Path) -> None:
    """Raise ConfigError if the extended training would end at its start."""
    spec = training.experiment.train
    reached = -(-_last_step(extended) // _steps_per_epoch(training))
    if spec.epochs <= reached:
        more = f"give more than its {reached}, such as train.epochs={2 * reached}"
        raise ConfigError(f"train.epochs: {extended} has {format_count(reached, 'epoch')} already; {more}")
    if spec.should_stop_early(state.evaluations_without_improvement):
        evaluations = format_count(state.evaluations_without_improvement, "evaluation")
        advice = "raise train.early_stop.patience, or remove it"
        raise ConfigError(f"{extended} stopped early, after {evaluations} without improvement; {advice}")


def _last_step(run: Path) -> int:
    result = read_result(run)
    assert result is not None, "only finished runs are extended"
    return int(result["steps"])


def _describe_start(training: PreparedTraining, state: TrainingState, extended: Path, epochs: int) -> None:
    """Log where the extension starts, and whether it will equal a single training of as many epochs."""
    spec, per_epoch = training.experiment.train, _steps_per_epoch(training)
    say(f"extending {extended} from step {state.step:,}, in epoch {-(-state.step // per_epoch)} of {epochs}")
    before = read_run_config(extended)
    totals = epochs * per_epoch, spec.epochs * per_epoch
    reasons = [f"{key} differs" for key, _, _ in _other_differences(before, training.experiment)]
    factors = [
        [train.schedule.factor(step, total) for step in range(state.step)]
        for train, total in zip((before.train, spec), totals, strict=True)
    ]
    if factors[0] != factors[1]:
        kind = spec.schedule.kind
        reasons.append(f"its learning rates would have been others (`schedule: {kind}` depends on the epochs)")
    if training.experiment.task.bind(training.data.facts).learning.build_criterion().depends_on_progress:
        reasons.append("its loss depends on the part of the training that is done")
    if reasons:
        say(f"a single training of {spec.epochs} epochs would end differently: {'; '.join(reasons)}")
    else:
        same = "in the same environment the result will have the same bits as"
        say(f"{same} a single training of {spec.epochs} epochs")


def _other_differences(before: Experiment, now: Experiment) -> list[tuple[str, object, object]]:
    return [row for row in list_differences(before, now) if row[0] not in ("train.epochs", "name")]


def _steps_per_epoch(training: PreparedTraining) -> int:
    return training.experiment.train.steps_per_epoch(training.data.facts.counts["train"])


def _checkpoint_files(folder: Path, name: str, state: TrainingState) -> Iterable[tuple[str, bytes]]:
    """Paths and contents of the files of the checkpoint `name`, of the best until then, and of their pointers."""
    best = name_of_step(state.best_step) if state.best_step else None
    for directory in dict.fromkeys([name, best or name]):
        checkpoints.load(folder / directory)  # a damaged checkpoint is named here, not at the end
        for path in sorted((folder / directory).iterdir()):
            yield f"{directory}/{path.name}", read_bytes(path, CheckpointError, _MAX_FILE_BYTES, Folder(path.parent))
    yield LATEST, name.encode()
    if best:
        yield BEST, best.encode()


def _record_extension(extended: Path, run: Path) -> None:
    """Add the extension to the list in the run that it extends."""
    line = json.dumps({"run": str(run)}).encode() + b"\n"
    try:
        with storage_errors(extended / EXTENSIONS, len(line)), Folder(extended).open_for_append(EXTENSIONS) as file:
            file.write(line)
    except UserError as error:  # the extension itself is complete and names the run
        say(f"{error.lines[0]}; {extended} does not name its extension")


def describe_lineage(run: Path) -> list[str]:
    """A sentence for the run that this one extends, and one for each run that extends it. Raises CheckpointError."""
    record = read_extension(run)
    lines = []
    if record:
        lines.append(f"Extends {record.run} ({format_count(record.epochs, 'epoch')}) from its step {record.step:,}.")
    return lines + [f"Extended by {extension}." for extension in read_extensions(run)]
