"""Differences between two configs: settings that change a result, and those that change none."""

from __future__ import annotations

from pathlib import Path

from cnnrun.base.error_lines import truncate_lines
from cnnrun.base.errors import ConfigError, escape
from cnnrun.base.progress import say
from cnnrun.experiment.schema import Experiment

# What changes no bit of the result: where pictures are kept, how they are read (tests/test_same_bits.py), when to save.
_NO_MATTER = {
    *("data.cache", "data.cache_dir", "data.disk_gib", "data.workers", "data.prefetch"),
    *("data.timeout", "train.timeout", "train.keep", "train.save_every"),
}
# Settings that are no reason for a difference, and the statistics that a run writes into its config.
_ASIDE = ("name", "seed", "data.image.mean", "data.image.std")

# Sections and settings that decide what a trained network is measured on, or what network it is.
_MEASURED_BY = ("task", "data", "model")
_TRAINED_BY = ("data.augment", "model.weights", "model.until")  # of these: those that only the training goes by


def check_config_fits_run(config: Path, given: Experiment, run: Path, trained: Experiment) -> None:
    """Say which settings of a config are not its newest run's. Raises ConfigError where they change the answer.

    Whatever differs in the training alone is only said: the run is there to be measured as it was trained.
    """
    found = list_differences(trained, given.with_statistics_of(trained))
    lines = {
        key: f"{escape(str(config))}: {key} is {_word(now)}, but {run} was trained with {_word(before)}"
        for key, before, now in found
        if key != "name"
    }
    if other := [
        line for key, line in lines.items() if key.startswith(_MEASURED_BY) and not key.startswith(_TRAINED_BY)
    ]:
        raise ConfigError(*truncate_lines(other, "settings"), f"train it, or name the run instead of the config: {run}")
    for line in lines.values():
        say(f"{line}; what that run learned is used")


def describe_changes(ours: Experiment, theirs: Experiment) -> list[str]:
    """A line for each setting that differs, but for those that change no bit of the result."""
    return [f"{key} was {mine}, is {other}" for key, mine, other in list_differences(ours, theirs)]


def describe_differences(ours: Experiment, theirs: Experiment, our_name: str, their_name: str) -> list[str]:
    """A line for each setting that two trained experiments differ in; names, seeds, measured statistics aside."""
    return [
        f"{key}: {_word(mine)} in {our_name}, {_word(others)} in {their_name}"
        for key, mine, others in list_differences(ours, theirs)
        if not key.startswith(_ASIDE)
    ]


def _word(value: object) -> str:
    return "left out" if value is None else escape(str(value))


def list_differences(ours: Experiment, theirs: Experiment) -> list[tuple[str, object, object]]:
    """Every setting that differs and changes a bit of the result, as (setting, ours, theirs)."""

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
