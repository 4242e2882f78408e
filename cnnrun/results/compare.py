"""`cnnrun compare`: settings, data and metrics in which trained networks differ, with tests of significance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.base.extras import require_package
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import Measurement
from cnnrun.contracts.source import Masks
from cnnrun.data.targets import target_codes
from cnnrun.experiment.config_differences import describe_differences
from cnnrun.experiment.open_run import MeasuredRun, find_run, measure_run, read_run_config
from cnnrun.explain.figures.png import write_plots
from cnnrun.tasks.intervals import bootstrap_interval, metric_bounds
from cnnrun.training import checkpoint_pointers
from cnnrun.training.run_records import CHECKPOINTS, read_facts, read_result

SIGNIFICANCE_LEVEL = 0.05  # chance that any metric of two equal networks is called different
_MAX_LISTED_KEYS = 30  # longer comparison keys, such as those of many classes, are shortened in messages


def compare_runs(
    run_paths: Sequence[Path],
    runs: Path,
    device: torch.device,
    split: str | None,
    plots: Path | None = None,
    unfinished: bool = False,
) -> dict[str, Any]:
    """Compare each network with the first, on the same images.

    Raises ConfigError for networks of different tasks. Raises CheckpointError for a run whose training is not
    finished, unless `unfinished` is true or a path names one of its checkpoints.
    """
    if len(run_paths) < 2:
        raise ConfigError("compare: give two or more runs")
    require_package("scipy", "stats", "compare")
    selected = [find_run(path, runs) for path in run_paths]
    if not unfinished:
        _refuse_unfinished(selected)
    first_run, *other_runs = [measure_run(path or run, runs, device, split) for run, path in selected]
    for other_run in other_runs:
        if other_run.trained.task.kind != first_run.trained.task.kind:
            kinds = f"{first_run.trained.task.kind} and {other_run.trained.task.kind}"
            raise ConfigError(f"{first_run.name} and {other_run.name} are for different tasks ({kinds})")
    pairs = [_compare_pair(first_run, other_run) for other_run in other_runs]
    result = {
        "split": first_run.split,
        "samples": len(first_run.examples),
        "runs": [_summarize_run(run_measurement) for run_measurement in (first_run, *other_runs)],
        "pairs": pairs,
    }
    if plots:
        result["plots"] = write_plots([_figure(first_run, pair) for pair in pairs if pair["tests"]], plots)
    return result


def _refuse_unfinished(selected_runs: Sequence[tuple[Path, Path | None]]) -> None:
    """Raise CheckpointError with a line for each unfinished run of which no checkpoint is named."""
    lines = []
    for run, checkpoint in selected_runs:
        if checkpoint is None and (progress := _unfinished_progress(run)):
            problem = f"{escape(str(run))}: unfinished (step {progress['step']:,} of {progress['steps']:,})"
            lines.append(f"{problem}; finish it with `cnnrun train CONFIG --resume`, or compare with --unfinished")
    if lines:
        raise CheckpointError(*lines)


def _unfinished_progress(run: Path) -> dict[str, int] | None:
    """Last saved step and planned steps of an unfinished run; None for a finished one, early stopping included."""
    if read_result(run) is not None:
        return None
    facts, experiment = read_facts(run), read_run_config(run)
    image_count = facts.counts.get("train", 0) if facts else 0
    latest = checkpoint_pointers.read_pointer(run / CHECKPOINTS, "latest") or "step-0"
    steps = experiment.train.steps_per_epoch(image_count) * experiment.train.epochs
    return {"step": int(latest.removeprefix("step-")), "steps": steps}


def _summarize_run(measured_run: MeasuredRun) -> dict[str, Any]:
    """Metrics of a run with their intervals; `unfinished` holds its progress, or None for a finished run."""
    return {
        "run": measured_run.name,
        "step": measured_run.trained.step,
        "unfinished": _unfinished_progress(measured_run.trained.run),
        "numbers": measured_run.measurement.metrics,
        "intervals": measured_run.intervals,
    }


def _compare_pair(first: MeasuredRun, other: MeasuredRun) -> dict[str, Any]:
    differences = describe_differences(first.experiment, other.experiment, first.name, other.name)
    same_config = not differences
    seeds = [run.experiment.seed for run in (first, other)]
    if seeds[0] != seeds[1]:
        differences.append(f"seed: {seeds[0]} and {seeds[1]}")
    temperatures = [run.trained.choices.temperature for run in (first, other)]
    if temperatures[0] != temperatures[1]:
        differences.append(
            f"calibrated: {' and '.join('no' if value is None else f'{value:.4g}' for value in temperatures)}"
        )
    unpaired_reason = _unpaired_reason(first, other)
    tests = [] if unpaired_reason else compare_metrics(first.measurement, other.measurement)
    return {
        "runs": [first.name, other.name],
        "config": differences,
        "same_config": same_config,
        "data": _data_differences(first, other),
        "unpaired": unpaired_reason,
        "tests": tests,
        "distinguishable": [row["number"] for row in tests if row["distinguishable"]],
    }


def _data_differences(first: MeasuredRun, other: MeasuredRun) -> list[str]:
    """List what differs between the training data of two runs."""
    first_facts, other_facts = first.trained.facts, other.trained.facts
    if first_facts.fingerprint == other_facts.fingerprint and first_facts.counts == other_facts.counts:
        return []
    lines = [
        f"{name}: {first_facts.counts.get(name, 0):,} images and {other_facts.counts.get(name, 0):,}"
        for name in dict.fromkeys([*first_facts.counts, *other_facts.counts])
        if first_facts.counts.get(name) != other_facts.counts.get(name)
    ]
    if first_facts.classes != other_facts.classes:
        lines.append(
            f"classes: {len(first_facts.classes):,} and {len(other_facts.classes):,}; their names or order differ"
        )
    return lines or ["equally many images, but other files, modification times or targets"]


def _unpaired_reason(first: MeasuredRun, other: MeasuredRun) -> str | None:
    """Reason that two measurements are not on the same images and targets, or None."""
    first_examples, other_examples = first.examples, other.examples
    comparison_keys = [run.trained.task.measuring.comparison_key() for run in (first, other)]
    if comparison_keys[0] != comparison_keys[1]:
        return f"the metrics measure different things: {_describe_key_difference(*comparison_keys)}"
    if first.split != other.split or len(first_examples) != len(other_examples):
        return f"{first.split} of {len(first_examples):,} images and {other.split} of {len(other_examples):,}"
    for index in range(len(first_examples)):
        if first_examples.sample_name(index) != other_examples.sample_name(index):
            names = [escape(examples.sample_name(index)) for examples in (first_examples, other_examples)]
            return f"image {index} is {names[0]} in one and {names[1]} in the other"
    codes = [
        target_codes(examples.source.targets, examples.source.objects, len(examples.source))[examples.source_rows]
        for examples in (first_examples, other_examples)
    ]
    if not torch.equal(*codes) or not _have_equal_masks(first_examples.source.masks, other_examples.source.masks):
        return "the images have different targets"
    pixels = [examples.source.images for examples in (first_examples, other_examples)]
    if isinstance(pixels[0], np.ndarray) and not np.array_equal(pixels[0], np.asarray(pixels[1])):
        return "the arrays hold different pixels"
    return None


def _have_equal_masks(first: Masks | None, other: Masks | None) -> bool:
    """Return whether masks are the same arrays, files or shapes, read by the same values."""
    if first is None or other is None:
        return first is other
    if first.meaning != other.meaning or len(first.images) != len(other.images):
        return False
    if isinstance(first.images, np.ndarray) or isinstance(other.images, np.ndarray):
        return np.array_equal(np.asarray(first.images), np.asarray(other.images))
    return first.images.digest() == other.images.digest()


def _describe_key_difference(first_key: list[Any], other_key: list[Any]) -> str:
    """Describe how two comparison keys differ: both in full, or of long ones the first entry that differs."""
    if max(len(first_key), len(other_key)) <= _MAX_LISTED_KEYS:
        return f"{escape(str(first_key))} and {escape(str(other_key))}"
    pairs = itertools.zip_longest(first_key, other_key)
    index, parts = next((index, parts) for index, parts in enumerate(pairs, 1) if parts[0] != parts[1])
    first_part, other_part = ("none" if part is None else escape(str(part)) for part in parts)
    counts = f"{len(first_key):,} and {len(other_key):,}"
    return f"{counts}; the first that differs is number {index:,}: {first_part} and {other_part}"


def compare_metrics(first: Measurement, other: Measurement) -> list[dict[str, Any]]:
    """Test each metric that both measurements have; returns a row for each, with the difference and its interval.

    A metric that is a share of the images is tested by McNemar's exact test (1947), any other by a bootstrap over
    images with the same draws for both (Efron and Tibshirani 1993, ch. 16). Holm's method (1979) keeps the chance of
    calling any metric of two equal networks different below SIGNIFICANCE_LEVEL.
    """
    rows: list[dict[str, Any]] = []
    for name, value in first.metrics.items():
        other_value = other.metrics.get(name)
        if value is None or other_value is None or (draws := _bootstrap_differences(first, other, name)) is None:
            continue
        difference, (min_value, max_value) = other_value - value, metric_bounds(name, value)
        low, high = bootstrap_interval(difference, draws, (min_value - max_value, max_value - min_value))
        binary = name in first.correct and name in other.correct
        p_value = (
            mcnemar_p_value(first.correct[name], other.correct[name])
            if binary
            else bootstrap_p_value(difference, draws)
        )
        rows.append(
            {
                "number": name,
                "first": value,
                "other": other_value,
                "difference": difference,
                "from": low,
                "to": high,
                "p": p_value,
                "test": "McNemar" if binary else "bootstrap",
            }
        )
    for row, is_rejected in zip(rows, holm_rejections([row["p"] for row in rows]), strict=True):
        row["distinguishable"] = is_rejected
    return rows


def _bootstrap_differences(first: Measurement, other: Measurement, name: str) -> NDArray[np.float64] | None:
    """Differences of a metric over the bootstrap draws in which both have it; None without common draws."""
    draws = [measurement.bootstrap_draws.get(name) for measurement in (first, other)]
    if draws[0] is None or draws[1] is None or len(draws[0]) != len(draws[1]):
        return None
    difference: NDArray[np.float64] = draws[1] - draws[0]
    finite = difference[np.isfinite(difference)]
    return finite if len(finite) else None


def mcnemar_p_value(first_N: NDArray[np.bool_], other_N: NDArray[np.bool_]) -> float:
    """Exact probability of such a difference, or a larger one, if both are equally often correct."""
    from scipy.stats import binomtest

    better, worse = int((other_N & ~first_N).sum()), int((first_N & ~other_N).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_p_value(difference: float, drawn_D: NDArray[np.float64]) -> float:
    """Two-sided p-value of a difference, from a normal tail with the draws' deviation, corrected for their bias.

    The share of draws beyond zero would be too coarse: with a hundred draws it cannot go below 0.01, which is too much
    for a test of twelve metrics at once.
    """
    deviation = float(drawn_D.std())
    corrected = 2 * difference - float(drawn_D.mean())
    if not deviation:
        return 0.0 if corrected else 1.0
    return math.erfc(abs(corrected) / deviation / math.sqrt(2))


def holm_rejections(p_values: Sequence[float]) -> list[bool]:
    """Mark the p-values that Holm's method rejects at SIGNIFICANCE_LEVEL, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    is_rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > SIGNIFICANCE_LEVEL / (len(p_values) - rank):
            break
        is_rejected[index] = True
    return is_rejected


def _figure(first: MeasuredRun, pair: dict[str, Any]) -> Plot:
    tests: list[dict[str, Any]] = pair["tests"]
    positions = [float(position) for position in range(len(tests))]
    middle, low, high = ([float(row[key]) for row in tests] for key in ("difference", "from", "to"))
    differences = Series("difference, 95 %", middle, positions, "spans", low, high)
    no_difference = Series("none", [0.0, 0.0], [-0.5, len(tests) - 0.5])
    title = f"{pair['runs'][1]} minus {first.name} on {first.split}"
    return Plot(title, "difference", "", (differences, no_difference), ticks=tuple(row["number"] for row in tests))
