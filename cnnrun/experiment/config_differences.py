"""Differences between two configs in the settings that affect the result."""

from __future__ import annotations

import re
from pathlib import Path

from cnnrun.base.error_lines import truncate_lines
from cnnrun.base.errors import ConfigError, escape
from cnnrun.base.progress import say
from cnnrun.experiment.schema import Experiment

# Settings that change no bit of the result: caching, reading (tests/system/test_same_bits.py), timeouts, when to save.
_WITHOUT_EFFECT = {
    *("data.cache", "data.cache_dir", "data.disk_gib", "data.workers", "data.prefetch"),
    *("data.timeout", "train.timeout", "train.keep", "train.save_every"),
}
# A comparison of two runs does not list names, seeds, and the statistics that a run measures.
_NOT_COMPARED = ("name", "seed", "data.image.mean", "data.image.std")

# These sections describe the network and the data that it is measured on, except for the settings of training alone.
_MEASUREMENT_SECTIONS = ("task", "data", "model")
_TRAINING_ONLY = ("data.augment", "model.weights", "model.until")


def check_config_fits_run(config: Path, experiment: Experiment, run: Path, run_experiment: Experiment) -> None:
    """Raise ConfigError if `experiment`, read from `config`, now differs from its newest run in task, data or network.

    `run_experiment` is the run's experiment. Settings that differ but affect only the training are logged.
    """
    lines = {
        key: f"{escape(str(config))}: {key} is {_format_value(now)}, but {_format_value(before)} in {run}"
        for key, before, now in list_differences(run_experiment, experiment.with_measured_settings_of(run_experiment))
        if key != "name"
    }
    if refused := [
        line
        for key, line in lines.items()
        if key.startswith(_MEASUREMENT_SECTIONS) and not key.startswith(_TRAINING_ONLY)
    ]:
        raise ConfigError(*truncate_lines(refused, "settings"), f"train this config, or give the run: {run}")
    for line in lines.values():
        say(f"{line}; the run's network is used as it was trained")


def describe_changes(before: Experiment, now: Experiment) -> list[str]:
    """A line for each changed setting, without those that change no bit of the result."""
    return [
        f"{key} was {_format_value(old)}, is {_format_value(new)}" for key, old, new in list_differences(before, now)
    ]


def describe_differences(first: Experiment, second: Experiment, first_name: str, second_name: str) -> list[str]:
    """A line for each setting that differs between two trained experiments, without names, seeds and statistics."""
    return [
        f"{key}: {_format_value(first_value)} in {first_name}, {_format_value(second_value)} in {second_name}"
        for key, first_value, second_value in list_differences(first, second)
        if not key.startswith(_NOT_COMPARED)
    ]


def _format_value(value: object) -> str:
    """Format the value of a setting; None and a setting that is absent read the same, as do kinds without settings."""
    if value in ({}, []):
        return "given"
    return "not set" if value is None else escape(str(value))


def list_differences(first: Experiment, second: Experiment) -> list[tuple[str, object, object]]:
    """Every setting that differs and affects the result, as (setting, first value, second value), sorted.

    A setting that is absent from a config has the value None.
    """
    a, b = (_flatten(experiment.model_dump(mode="json", by_alias=True), "") for experiment in (first, second))
    # `model` is a list, or a mapping with the list and `weights`: a layer has one name in both.
    a, b = ({re.sub(r"^model\.layers\[", "model[", key): leaf for key, leaf in leaves.items()} for leaves in (a, b))
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in _WITHOUT_EFFECT)
    return [(key, a.get(key), b.get(key)) for key in keys]


def _flatten(value: object, path: str) -> dict[str, object]:
    """Every value inside `value`, by its path: `train.epochs`, `model[0].conv.out_channels`.

    Empty mappings and lists are values: `activation: {relu: {}}` differs from `activation: {gelu: {}}`.
    """
    if not value:
        return {path: value}
    if isinstance(value, dict):
        children = {f"{path}.{key}" if path else key: child for key, child in value.items()}
    elif isinstance(value, list):
        children = {f"{path}[{index}]": child for index, child in enumerate(value)}
    else:
        return {path: value}
    return {key: leaf for child_path, child in children.items() for key, leaf in _flatten(child, child_path).items()}
