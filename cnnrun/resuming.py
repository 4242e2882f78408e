"""Going on with a run that was stopped: which one, whether it is the same, and from which checkpoint."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

from cnnrun import checkpoint, runs
from cnnrun.contracts import Facts
from cnnrun.dataset import Dataset
from cnnrun.errors import CheckpointError, ConfigError, printable
from cnnrun.experiment import Experiment, load
from cnnrun.progress import say
from cnnrun.ranks import Ranks
from cnnrun.weights import Weights

# What changes no bit of the result: where pictures are kept, how they are read (tests/test_same_bits.py), when to save.
_NO_MATTER = {
    *("data.cache", "data.cache_dir", "data.disk_gib", "data.workers", "data.prefetch"),
    *("data.timeout", "train.timeout", "train.keep", "train.save_every"),
}
# Settings that are no reason for a difference, and the statistics that a run writes into its config.
_ASIDE = ("name", "seed", "data.image.mean", "data.image.std")


def unfinished(experiment: Experiment, root: Path, resume: bool, strict: bool = False) -> Path | None:
    """The newest unfinished run of the same config, when resuming; otherwise says that there is one.

    `strict`: where there are only runs of other settings, raises CheckpointError that names them.
    """
    left = runs.unfinished(root, experiment.name)
    if not resume:
        if left:
            say(f"{left[0]} is unfinished; --resume would go on with it")
        return None
    others = []
    for run in left:
        try:
            other = load(run / runs.CONFIG)
        except ConfigError as error:
            others.append(f"{run} is unfinished, but its config cannot be read: {error.lines[0]}")
            continue
        if not (differ := differences(other, experiment.with_statistics_of(other))):
            for line in others:
                say(line)
            say(f"going on with {run}")
            return run
        others += [f"{run} is unfinished, but of other settings: {line}" for line in differ]
    if others and strict:
        raise CheckpointError(*others, "--strict-resume goes on with nothing but the same; --resume would start anew")
    for line in others:
        say(line)
    return None


def unchanged(run: Path, environment: dict[str, Any], strict: bool) -> None:
    """Say what of the machine is not as it was; `strict`: raises CheckpointError that names it."""
    before = runs.environments(run)
    if strict and (lines := [line for each in before for line in runs.changes(each, environment)]):
        lines = [f"{run}: {line}" for line in dict.fromkeys(lines)]
        raise CheckpointError(*lines, "--resume would go on all the same")
    for line in runs.changes(before[-1], environment) if before else ():
        say(f"{line}: the result may differ in its last bits from an uninterrupted run's")
    if environment not in before:
        first, *later = [*before, environment]
        runs.write_json(run / runs.ENVIRONMENT, first | ({"later": later} if later else {}))


def same_weights(run: Path, given: Weights) -> None:
    """Raises CheckpointError when a run without a checkpoint would begin again from other weights."""
    try:
        before = json.loads((run / runs.WEIGHTS).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not started yet
    if before != given.digest:
        raise CheckpointError(f"{run}: the weights it began with changed since; train anew without --resume")


def saved_in(run: Path, data: Dataset, ranks: Ranks) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, if the run has one: as rank 0 has it. Raises CheckpointError for other data."""
    found: list[checkpoint.Checkpoint] = []

    def load_it() -> Any:
        found.extend(each for each in [_saved_in(run, data)] if each)
        return [[str(each.path), list(each.parts), each.state] for each in found]

    about = ranks.from_first(load_it)
    if not about:
        return None
    path, names, state = about[0]
    flat = {f"{part}/{name}": value for each in found for part, of in each.parts.items() for name, value in of.items()}
    sent = ranks.tensors_from_first(flat if found else None)
    parts: checkpoint.Parts = {name: {} for name in names}
    for key, value in sent.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return checkpoint.Checkpoint(Path(path), parts, state)


def _saved_in(run: Path, data: Dataset) -> checkpoint.Checkpoint | None:
    checkpoint.sweep(run / "checkpoints")
    saved = checkpoint.load_newest(run / "checkpoints", "latest", say)
    known = saved.state["facts"] if saved else _began_with(run)
    if known is None:
        return saved
    before, facts = Facts.from_json(known), data.facts
    if before.fingerprint != facts.fingerprint:
        what = f"{sum(before.counts.values())} pictures in {len(before.classes)} classes then, "
        what += f"{sum(facts.counts.values())} in {len(facts.classes)} now{_first_difference(run / runs.FILES, data)}"
        if before.classes != facts.classes:
            what += f"; classes were {', '.join(before.classes)}, are {', '.join(facts.classes)}"
        raise CheckpointError(f"{run}: the data changed since it was started ({what}); train anew without --resume")
    return saved


def _began_with(run: Path) -> Any:
    try:
        return json.loads((run / runs.FACTS).read_text())
    except (OSError, ValueError):
        return None


def _first_difference(listing: Path, data: Dataset) -> str:
    """The first file that is not as a run's listing has it; nothing where that cannot be told."""
    try:
        before = gzip.decompress(listing.read_bytes()).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
    now = list(data.lines())
    for old, new in itertools.zip_longest(before, now, fillvalue=""):
        if old != new:
            paths = [line.split("\t")[1] if line else "" for line in (old, new)]
            if paths[0] == paths[1]:
                return f"; {paths[0]} changed"
            is_new = paths[1] and all(line.split("\t")[1] != paths[1] for line in before)
            return f"; {paths[1]} is new" if is_new else f"; {paths[0]} is gone"
    return ""


def finished(experiment: Experiment, root: Path) -> Path | None:
    """The newest finished run of the same config."""
    for run in runs.finished(root, experiment.name):
        try:
            other = load(run / runs.CONFIG)
        except ConfigError:
            continue
        if not differences(other, experiment.with_statistics_of(other)):
            return run
    return None


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """A line for each setting that differs, but for those that change no bit of the result."""
    return [f"{key} was {mine}, is {other}" for key, mine, other in changed(ours, theirs)]


def told_apart(ours: Experiment, theirs: Experiment, our_name: str, their_name: str) -> list[str]:
    """What two experiments that were trained differ in, a line a setting; names, seeds, measured statistics aside."""
    return [
        f"{key}: {_word(mine)} in {our_name}, {_word(others)} in {their_name}"
        for key, mine, others in changed(ours, theirs)
        if not key.startswith(_ASIDE)
    ]


def _word(value: object) -> str:
    return "left out" if value is None else printable(str(value))


def changed(ours: Experiment, theirs: Experiment) -> list[tuple[str, object, object]]:
    """So as (setting, ours, theirs)."""

    def flat(value: object, path: str) -> dict[str, object]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()
            }
        if isinstance(value, list):
            return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}[{i}]").items()}
        return {path: value}

    a, b = (flat(each.model_dump(mode="json", by_alias=True), "") for each in (ours, theirs))
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in _NO_MATTER)
    return [(key, a.get(key, "not there"), b.get(key, "not there")) for key in keys]
