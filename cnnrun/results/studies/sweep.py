"""`cnnrun sweep`: settings looked for by Optuna, a training each; any number of processes may share one study."""

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
from cnnrun.results.train_run import train_run
from cnnrun.training.settings import monitorable_metrics

STUDY_FILE = "study.log"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_MEASURE = ("name", "seed", "train.monitor", "data.source", "data.split")  # what trials must have in common
_MOMENT = 0.5  # seconds
_WARMUP = 0.2  # of the epochs, before which nothing is pruned
_AGAIN = "again"  # the number of the trial with which this one goes on, whose process was killed


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, on a logarithmic scale or not, whole where both ends are written so."""

    low: float
    high: float
    log: bool
    whole: bool

    def boundary_values(self) -> list[Any]:
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]

    def suggest(self, trial: Any, name: str) -> Any:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of several values, as they are written in YAML."""

    values: tuple[str, ...]

    def boundary_values(self) -> list[Any]:
        return list(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, list(self.values))


SearchSpace = dict[str, Range | Choice]


def parse_search_space(words: Sequence[str]) -> tuple[SearchSpace, list[str]]:
    """What is looked for, by setting, and the plain overrides. Raises ConfigError."""
    space, plain = SearchSpace(), []
    for word in words:
        name, _, written = word.partition("=")
        if name in space:
            raise ConfigError(f"argument {word!r}: {name} is looked for already")
        if name.startswith(_MEASURE) and ("|" in written or _RANGE.fullmatch(written)):
            raise ConfigError(f"argument {word!r}: trials are compared by it or under it; it cannot be looked for")
        if found := _RANGE.fullmatch(written):
            space[name] = _range(word, *found.groups())
        elif "|" in written:
            values = tuple(value.strip() for value in written.split("|"))
            if len(set(values)) < len(values) or "" in values:
                raise ConfigError(f"argument {word!r}: give different values, with | between them")
            space[name] = Choice(values)
        else:
            plain.append(word)
    if not space:
        raise ConfigError("nothing to look for: give ranges, such as train.optimizer.sgd.lr=log:0.001..0.3, or a|b|c")
    return space, plain


def _range(word: str, log: str | None, low: str, high: str) -> Range:
    made = Range(float(low), float(high), bool(log), all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high)))
    if made.low >= made.high:
        raise ConfigError(f"argument {word!r}: the first end is not below the second")
    if made.log and made.low <= 0:
        raise ConfigError(f"argument {word!r}: a logarithmic range is above 0")
    return made


def run_sweep(
    config: Path, words: Sequence[str], trials: int, root: Path, device: torch.device, storage: str | None
) -> dict[str, Any]:
    """Trials until the study has so many, those of other processes included; returns all, and writes the best config.

    What was begun by processes that were killed is gone on with. Raises ConfigError where an end of a range is wrong.
    """
    require_package("optuna", "sweep", "sweep")
    space, plain = parse_search_space(words)
    base = _checked(config, plain, space)
    index_source(base.data)  # what is wrong with the data is no trial's fault
    folder = root / f"{base.name}-sweep"
    make_folder(folder)
    with hold_lock(folder / "study.lock", _patiently):  # of processes that start at once the first makes it
        try:
            study = _study(base, folder, storage, space)
        except StorageError:  # seen once: a journal read while another process wrote to it
            time.sleep(_MOMENT)
            study = _study(base, folder, storage, space)
    while (trial := _next(study, folder, trials, base)) is not None:
        with trial.lock:
            _run(study, trial.trial, space, (config, plain, folder), device)
            _lock_of(folder, trial.trial.number).unlink(missing_ok=True)
    return _told(study, base, config, plain, folder)


def _checked(config: Path, plain: Sequence[str], space: SearchSpace) -> Experiment:
    """The config, once both ends of every range and every choice can be trained as far as the file can tell."""
    base = read_config(config, plain)
    for place in range(max(len(each.boundary_values()) for each in space.values())):
        ends = {
            name: each.boundary_values()[min(place, len(each.boundary_values()) - 1)] for name, each in space.items()
        }
        read_config(config, [*plain, *_overrides(ends)])
    return base


def _overrides(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _study(base: Experiment, folder: Path, storage: str | None, space: SearchSpace) -> Any:
    """The study of this name in the storage; its sampler is seeded by the config's seed and how far the study is."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = str(storage or folder / STUDY_FILE)
    direction = {"max": "maximize", "min": "minimize"}[monitorable_metrics(base.task)[base.train.monitor]]
    warmup = max(1, round(_WARMUP * base.train.epochs))
    try:
        there: Any = place if "://" in place else optuna.storages.JournalStorage(JournalFileBackend(place))
        study = optuna.create_study(
            storage=there,
            study_name=base.name,
            direction=direction,  # type: ignore[arg-type]
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup),
        )
    except Exception as error:  # a journal's, SQLAlchemy's or a database driver's own, which share no base class
        why = first_line(error)
        raise StorageError(f"{escape(place)}: no study can be kept there ({why}); give another --storage") from None
    about = {"space": repr(sorted(space.items())), "config": base.to_yaml()}
    for name, value in about.items():
        if study.user_attrs.setdefault(name, value) != value:
            raise ConfigError(
                f"{folder}: holds a study of another {name}; remove it, give --storage, or another name=..."
            )
        study.set_user_attr(name, value)
    return study


@dataclass(frozen=True)
class LockedTrial:
    """A trial and this process's hold on it."""

    trial: Any
    lock: contextlib.ExitStack


def _next(study: Any, folder: Path, trials: int, base: Experiment) -> LockedTrial | None:
    """The next trial, held by this process; None where the study has as many as wanted."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    with hold_lock(folder / "study.lock", _patiently):
        _put_back(study, folder)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        begun = [each for each in study.get_trials(deepcopy=False) if not _given_up(each)]
        if not waiting and len(begun) >= trials:
            return None
        study.sampler = TPESampler(seed=derive_key(base.seed, len(begun)) % 2**32, constant_liar=True)
        trial = study.ask()
        held = contextlib.ExitStack()
        held.enter_context(hold_lock(_lock_of(folder, trial.number)))
        return LockedTrial(trial, held)


def _given_up(trial: Any) -> bool:
    """Whether its process was killed, so that another trial stands for it: what failed by itself says why."""
    from optuna.trial import TrialState

    return trial.state == TrialState.FAIL and "why" not in trial.user_attrs


def _put_back(study: Any, folder: Path) -> None:
    """Trials that run and that no process holds are put in line again, with the settings they had."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with hold_lock(_lock_of(folder, trial.number)):
                _lock_of(folder, trial.number).unlink(missing_ok=True)
                now = {each.number: each.state for each in study.get_trials(deepcopy=False)}
                if now[trial.number] != TrialState.RUNNING:
                    continue  # its process came to its end before this one held it
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params, user_attrs={_AGAIN: trial.user_attrs.get(_AGAIN, trial.number)})
        except LockHeldError:
            continue


def _lock_of(folder: Path, number: int) -> Path:
    return folder / f"trial-{number}.lock"


def _patiently() -> None:
    """Wait for the study's lock without a word: it is held for moments."""


def _run(
    study: Any, trial: Any, space: SearchSpace, base: tuple[Path, Sequence[str], Path], device: torch.device
) -> None:
    """Train with a trial's settings and tell the study; what cannot be trained so is told as that."""
    from optuna.trial import TrialState

    config, plain, folder = base
    values = {name: each.suggest(trial, name) for name, each in space.items()}
    say(f"trial {trial.number}: {'  '.join(_overrides(values))}")
    pruned: list[int] = []

    def enough(epoch: int, value: float) -> bool:
        trial.report(value, epoch)
        if trial.should_prune():
            pruned.append(epoch)
        return bool(pruned)

    try:
        first = trial.user_attrs.get(_AGAIN, trial.number)
        experiment = read_config(config, [*plain, *_overrides(values)]).model_copy(update={"name": f"trial-{first}"})
        result = train_run(experiment, folder, device, resume=first != trial.number, should_stop=enough)
    except (UserError, RuntimeError, MemoryError) as error:
        if (why := _its_own_fault(error)) is None:
            raise
        say(f"trial {trial.number} failed: {why}")
        trial.set_user_attr("why", why)
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("run", result["run"])
    if pruned:
        say(f"trial {trial.number} ended after epoch {pruned[0]}: worse than the median of those before")
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, next(iter(result["best"].values())))


def _its_own_fault(error: Exception) -> str | None:
    """Why a trial cannot be trained with its settings; None for what stops the sweep."""
    if isinstance(error, ConfigError | DataError | NonFiniteError):
        return error.lines[0]
    return "memory ran out" if type(error) is ResourceError or is_out_of_memory(error) else None


def _told(study: Any, base: Experiment, config: Path, plain: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every trial, and the best, whose config is written."""
    from optuna.trial import TrialState

    rows = [
        {
            "trial": each.number,
            "state": each.state.name.lower(),
            "value": each.value,
            "settings": each.params,
            "run": each.user_attrs.get("run"),
            "why": each.user_attrs.get("why"),
        }
        for each in study.get_trials(deepcopy=False)
        if not _given_up(each)
    ]
    made: dict[str, Any] = {"name": base.name, "monitor": base.train.monitor, "trials": rows}
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise ConfigError(
            "no trial came to its end",
            *truncate_lines([f"trial {row['trial']}: {row['why']}" for row in rows], "trials"),
        )
    best = study.best_trial
    path = folder / "best.yaml"
    header = f"# The best of {len(rows)} trials of `cnnrun sweep`: {base.train.monitor} {best.value:.6g}\n"
    write_text(path, header + read_config(config, [*plain, *_overrides(best.params)]).to_yaml())
    return {**made, "best": {"trial": best.number, "value": best.value, "settings": best.params, "config": str(path)}}
