"""`cnnrun sweep`: search for settings with Optuna, one training per trial; several processes may share a study."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import make_folder, write_text
from cnnrun.base.device import is_out_of_memory
from cnnrun.base.error_lines import truncate_lines
from cnnrun.base.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    ResourceError,
    StorageError,
    UserError,
    escape,
    first_line,
)
from cnnrun.base.extras import require_package
from cnnrun.base.locks import LockHeldError, hold_lock
from cnnrun.base.progress import say
from cnnrun.base.randomness import derive_key
from cnnrun.data.index import index_source
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.schema import Experiment
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.settings import monitorable_metrics

STUDY_FILE = "study.log"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
# Trials are comparable only if they share these.
_COMPARISON_SETTINGS = ("name", "seed", "train.monitor", "data.source", "data.split")
_RETRY_SECONDS = 0.5
_WARMUP_SHARE = 0.2  # no trial is pruned before this share of its epochs
_RESUMED_TRIAL = "again"  # attribute of a trial: number of the killed trial that it resumes


@dataclass(frozen=True)
class Range:
    """Values between two ends, on a linear or logarithmic scale; integers if both ends are written as integers."""

    low: float
    high: float
    log: bool
    whole: bool

    def boundary_values(self) -> list[Any]:
        """Return the values at both ends."""
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def suggest(self, trial: Any, name: str) -> Any:
        """Let Optuna choose a value for a trial."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """Several values to choose from, as text in YAML."""

    values: tuple[str, ...]

    def boundary_values(self) -> list[Any]:
        """Return all values."""
        return list(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        """Let Optuna choose a value for a trial."""
        return trial.suggest_categorical(name, list(self.values))


SearchSpace = dict[str, Range | Choice]


def parse_search_space(settings: Sequence[str]) -> tuple[SearchSpace, list[str]]:
    """Parse command-line settings into a search space and plain overrides. Raises ConfigError."""
    space, overrides = SearchSpace(), []
    for setting in settings:
        name, _, text = setting.partition("=")
        if name in space:
            raise ConfigError(f"argument {setting!r}: {name} is already searched; give one range or list for it")
        if name.startswith(_COMPARISON_SETTINGS) and ("|" in text or _RANGE.fullmatch(text)):
            raise ConfigError(f"argument {setting!r}: all trials need the same {name} to be compared; give one value")
        if match := _RANGE.fullmatch(text):
            space[name] = _parse_range(setting, *match.groups())
        elif "|" in text:
            values = tuple(value.strip() for value in text.split("|"))
            if len(set(values)) < len(values) or "" in values:
                raise ConfigError(f"argument {setting!r}: give different values, separated by |")
            space[name] = Choice(values)
        else:
            overrides.append(setting)
    if not space:
        raise ConfigError(
            "nothing to search: give a range, such as train.optimizer.sgd.lr=log:0.001..0.3, or values, such as "
            "train.batch=32|64"
        )
    return space, overrides


def _parse_range(setting: str, log: str | None, low: str, high: str) -> Range:
    search_range = Range(float(low), float(high), bool(log), all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high)))
    if search_range.low >= search_range.high:
        raise ConfigError(f"argument {setting!r}: the first end must be below the second")
    if search_range.log and search_range.low <= 0:
        raise ConfigError(f"argument {setting!r}: a logarithmic range must be above 0")
    return search_range


def run_sweep(
    config: Path, settings: Sequence[str], trials: int, runs: Path, device: torch.device, storage: str | None
) -> dict[str, Any]:
    """Run trials until the study has `trials`, counting those of other processes; write the best config.

    Trials of killed processes are resumed. Returns all trials and the best one. Raises ConfigError for a range with an
    invalid end.
    """
    require_package("optuna", "sweep", "sweep")
    space, overrides = parse_search_space(settings)
    experiment = _check_range_ends(config, overrides, space)
    index_source(experiment.data)  # errors in the data end the sweep, not a trial
    folder = runs / f"{experiment.name}-sweep"
    make_folder(folder)
    with hold_lock(folder / "study.lock", _wait_silently):  # one of several processes creates the study
        try:
            study = _open_study(experiment, folder, storage, space)
        except StorageError:  # another process may be writing to the journal: read it once more
            time.sleep(_RETRY_SECONDS)
            study = _open_study(experiment, folder, storage, space)
    while (trial := _next_trial(study, folder, trials, experiment)) is not None:
        with trial.lock:
            _run_trial(study, trial.trial, space, (config, overrides, folder), device)
            _trial_lock_path(folder, trial.trial.number).unlink(missing_ok=True)
    return _summarize_study(study, experiment, config, overrides, folder)


def _check_range_ends(config: Path, overrides: Sequence[str], space: SearchSpace) -> Experiment:
    """Check the config with every choice and both ends of every range; returns the config without them.

    Raises ConfigError for a value that the config does not allow.
    """
    experiment = read_config(config, overrides)
    for index in range(max(len(dimension.boundary_values()) for dimension in space.values())):
        values = {
            name: dimension.boundary_values()[min(index, len(dimension.boundary_values()) - 1)]
            for name, dimension in space.items()
        }
        read_config(config, [*overrides, *_overrides(values)])
    return experiment


def _overrides(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _open_study(experiment: Experiment, folder: Path, storage: str | None, space: SearchSpace) -> Any:
    """Open or create the study of this name in the storage. Raises StorageError, or ConfigError for another study."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    location = str(storage or folder / STUDY_FILE)
    direction = {"max": "maximize", "min": "minimize"}[monitorable_metrics(experiment.task)[experiment.train.monitor]]
    warmup = max(1, round(_WARMUP_SHARE * experiment.train.epochs))
    try:
        backend: Any = location if "://" in location else optuna.storages.JournalStorage(JournalFileBackend(location))
        study = optuna.create_study(
            storage=backend,
            study_name=experiment.name,
            direction=direction,  # type: ignore[arg-type]
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup),
        )
    except Exception as error:  # journal, SQLAlchemy and drivers share no base class
        reason = first_line(error)
        problem = f"a study cannot be stored there ({reason})"
        raise StorageError(f"{escape(location)}: {problem}; give another --storage") from None
    attributes = {"space": repr(sorted(space.items())), "config": experiment.to_yaml()}
    for name, value in attributes.items():
        if study.user_attrs.setdefault(name, value) != value:
            raise ConfigError(
                f"{folder}: holds a study with another {name}; remove it, or give --storage or another name=..."
            )
        study.set_user_attr(name, value)
    return study


@dataclass(frozen=True)
class LockedTrial:
    """A trial and the lock by which this process owns it."""

    trial: Any
    lock: contextlib.ExitStack


def _next_trial(study: Any, folder: Path, trials: int, experiment: Experiment) -> LockedTrial | None:
    """Start the next trial and lock it for this process; None if the study has enough.

    The sampler's seed depends on the config's seed and the number of trials so far.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    with hold_lock(folder / "study.lock", _wait_silently):
        _requeue_orphans(study, folder)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        started = [trial for trial in study.get_trials(deepcopy=False) if not _was_killed(trial)]
        if not waiting and len(started) >= trials:
            return None
        study.sampler = TPESampler(seed=derive_key(experiment.seed, len(started)) % 2**32, constant_liar=True)
        trial = study.ask()
        lock = contextlib.ExitStack()
        lock.enter_context(hold_lock(_trial_lock_path(folder, trial.number)))
        return LockedTrial(trial, lock)


def _was_killed(trial: Any) -> bool:
    """Return whether the trial's process was killed; a trial that failed by itself has the attribute `why`."""
    from optuna.trial import TrialState

    return trial.state == TrialState.FAIL and "why" not in trial.user_attrs


def _requeue_orphans(study: Any, folder: Path) -> None:
    """Queue again, with the same settings, the trials marked as running that no process has locked."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with hold_lock(_trial_lock_path(folder, trial.number)):
                _trial_lock_path(folder, trial.number).unlink(missing_ok=True)
                states = {current.number: current.state for current in study.get_trials(deepcopy=False)}
                if states[trial.number] != TrialState.RUNNING:
                    continue  # it ended just before this process got the lock
                study.tell(trial.number, state=TrialState.FAIL)
                first_number = trial.user_attrs.get(_RESUMED_TRIAL, trial.number)
                study.enqueue_trial(trial.params, user_attrs={_RESUMED_TRIAL: first_number})
        except LockHeldError:
            continue


def _trial_lock_path(folder: Path, number: int) -> Path:
    return folder / f"trial-{number}.lock"


def _wait_silently() -> None:
    """Wait for the study's lock without printing a line, since it is only held briefly."""


def _run_trial(
    study: Any, trial: Any, space: SearchSpace, fixed: tuple[Path, Sequence[str], Path], device: torch.device
) -> None:
    """Train with a trial's settings and tell the study the result or the failure."""
    from optuna.trial import TrialState

    config, overrides, folder = fixed
    values = {name: dimension.suggest(trial, name) for name, dimension in space.items()}
    say(f"trial {trial.number}: {'  '.join(_overrides(values))}")
    pruned: list[int] = []

    def should_stop(epoch: int, value: float) -> bool:
        trial.report(value, epoch)
        if trial.should_prune():
            pruned.append(epoch)
        return bool(pruned)

    try:
        first_number = trial.user_attrs.get(_RESUMED_TRIAL, trial.number)
        experiment = read_config(config, [*overrides, *_overrides(values)])
        experiment = experiment.model_copy(update={"name": f"trial-{first_number}"})
        result = train_run(experiment, folder, device, resume=first_number != trial.number, should_stop=should_stop)
    except (UserError, RuntimeError, MemoryError) as error:
        if (failure := _trial_failure(error)) is None:
            raise
        say(f"trial {trial.number} failed: {failure}")
        trial.set_user_attr("why", failure)
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("run", result["run"])
    if pruned:
        say(f"trial {trial.number} stopped after epoch {pruned[0]}: worse than the median of earlier trials")
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, next(iter(result["best"].values())))


def _trial_failure(error: Exception) -> str | None:
    """Reason that a trial cannot be trained with its settings, or None for an error that stops the sweep."""
    if isinstance(error, ConfigError | DataError | NonFiniteError):
        return error.lines[0]
    return "memory ran out" if type(error) is ResourceError or is_out_of_memory(error) else None


def _summarize_study(
    study: Any, experiment: Experiment, config: Path, overrides: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Summarize the trials and write the config of the best one. Raises ConfigError if no trial finished."""
    from optuna.trial import TrialState

    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "settings": trial.params,
            "run": trial.user_attrs.get("run"),
            "why": trial.user_attrs.get("why"),
        }
        for trial in study.get_trials(deepcopy=False)
        if not _was_killed(trial)
    ]
    summary: dict[str, Any] = {"name": experiment.name, "monitor": experiment.train.monitor, "trials": rows}
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise ConfigError(
            "no trial finished",
            *truncate_lines([f"trial {row['trial']}: {row['why'] or row['state']}" for row in rows], "trials"),
        )
    best = study.best_trial
    path = folder / "best.yaml"
    header = f"# The best of {len(rows)} trials of `cnnrun sweep`: {experiment.train.monitor} {best.value:.6g}\n"
    write_text(path, header + read_config(config, [*overrides, *_overrides(best.params)]).to_yaml())
    return {
        **summary,
        "best": {"trial": best.number, "value": best.value, "settings": best.params, "config": str(path)},
    }
