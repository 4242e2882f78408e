"""`cnnrun compare`: what two trained networks differ in, and whether the pictures can tell them apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.base.extras import require_package
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Examples
from cnnrun.data.targets import target_codes
from cnnrun.experiment.config_differences import describe_differences
from cnnrun.experiment.open_run import find_run, measure_run, read_run_config
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.png import write_plots
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.tasks.intervals import bootstrap_interval, confidence_intervals, metric_bounds
from cnnrun.tasks.temperature import TEMPERATURE
from cnnrun.training import checkpoints
from cnnrun.training.run_records import CHECKPOINTS, read_facts, read_result

SIGNIFICANCE_LEVEL = 0.05  # the part of equal pairs that may be called different, all their numbers together
_MOST_THINGS = 30  # classes, or other things with a number, that are named where two networks' differ


@dataclass(frozen=True)
class MeasuredRun:
    """A trained network and what it does on a split."""

    run: str
    experiment: Experiment
    trained: TrainedNetwork
    split: str
    examples: Examples
    measurement: Measurement
    fingerprint: str


def compare_runs(
    targets: Sequence[Path],
    root: Path,
    device: torch.device,
    split: str | None,
    plots: Path | None = None,
    unfinished: bool = False,
) -> dict[str, Any]:
    """Each network against the first, on the same pictures.

    Raises ConfigError for networks of different tasks; CheckpointError for runs whose training has not ended, unless
    `unfinished` runs are asked for or a checkpoint is named.
    """
    if len(targets) < 2:
        raise ConfigError("compare needs two or more runs")
    require_package("scipy", "stats", "compare")
    found = [find_run(target, root) for target in targets]
    if not unfinished:
        _refuse_unfinished(found)
    first, *others = [_seen(path or run, root, device, split) for run, path in found]
    for other in others:
        if other.trained.task.kind != first.trained.task.kind:
            kinds = f"{first.trained.task.kind} and {other.trained.task.kind}"
            raise ConfigError(f"{first.run} and {other.run} are for different tasks ({kinds})")
    pairs = [_pair(first, other) for other in others]
    made = {
        "split": first.split,
        "samples": len(first.examples),
        "runs": [_about(each) for each in (first, *others)],
        "pairs": pairs,
    }
    if plots:
        made["plots"] = write_plots([_figure(first, pair) for pair in pairs if pair["tests"]], plots)
    return made


def _refuse_unfinished(found: Sequence[tuple[Path, Path | None]]) -> None:
    """Raises CheckpointError, a line for each run whose training has not ended, unless a checkpoint is named."""
    lines = []
    for run, path in found:
        if path is None and (reached := _unfinished(run)):
            where = f"{escape(str(run))}: unfinished (step {reached['step']:,} of {reached['steps']:,})"
            lines.append(f"{where}; finish it with `cnnrun train CONFIG --resume`, or compare with --unfinished")
    if lines:
        raise CheckpointError(*lines)


def _unfinished(run: Path) -> dict[str, int] | None:
    """The step that a run has reached and how many there are to be; None for a run whose training has ended.

    One that ended by early stopping has a result, as any other that came to its end.
    """
    if read_result(run) is not None:
        return None
    facts, experiment = read_facts(run), read_run_config(run)
    pictures = facts.counts.get("train", 0) if facts else 0
    latest = checkpoints.read_pointer(run / CHECKPOINTS, "latest") or "step-0"
    steps = experiment.train.steps_per_epoch(pictures) * experiment.train.epochs
    return {"step": int(latest.removeprefix("step-")), "steps": steps}


def _seen(target: Path, root: Path, device: torch.device, split: str | None) -> MeasuredRun:
    experiment, given, name, examples, found = measure_run(target, root, device, split)
    return MeasuredRun(str(given.run), experiment, given, name, examples, found, given.facts.fingerprint)


def _about(seen: MeasuredRun) -> dict[str, Any]:
    """The network's numbers; `unfinished` is how far its training has come where it has not ended, and else None."""
    spans = confidence_intervals(seen.measurement.metrics, seen.measurement.bootstrap_draws, seen.measurement.correct)
    about = {"run": seen.run, "step": seen.trained.step, "unfinished": _unfinished(seen.trained.run)}
    return {**about, "numbers": seen.measurement.metrics, "intervals": spans}


def _pair(first: MeasuredRun, other: MeasuredRun) -> dict[str, Any]:
    words = describe_differences(first.experiment, other.experiment, first.run, other.run)
    same = not words
    seeds = [each.experiment.seed for each in (first, other)]
    if seeds[0] != seeds[1]:
        words.append(f"seed: {seeds[0]} and {seeds[1]}")
    heats = [each.trained.facts.chosen.get(TEMPERATURE) for each in (first, other)]
    if heats[0] != heats[1]:
        words.append(f"calibrated: {' and '.join('no' if heat is None else f'{heat:.4g}' for heat in heats)}")
    why = _not_paired(first, other)
    tests = [] if why else compare_metrics(first.measurement, other.measurement)
    return {
        "runs": [first.run, other.run],
        "config": words,
        "same_config": same,
        "data": _data(first, other),
        "unpaired": why,
        "tests": tests,
        "distinguishable": [row["number"] for row in tests if row["distinguishable"]],
    }


def _data(first: MeasuredRun, other: MeasuredRun) -> list[str]:
    """What the two learned from that is not the same."""
    mine, theirs = first.trained.facts, other.trained.facts
    if first.fingerprint == other.fingerprint and mine.counts == theirs.counts:
        return []
    lines = [
        f"{name}: {mine.counts.get(name, 0):,} pictures and {theirs.counts.get(name, 0):,}"
        for name in dict.fromkeys([*mine.counts, *theirs.counts])
        if mine.counts.get(name) != theirs.counts.get(name)
    ]
    if mine.classes != theirs.classes:
        lines.append(f"classes: {len(mine.classes)} and {len(theirs.classes)}, or in another order")
    return lines or ["the same numbers of pictures, but other files, times or targets"]


def _not_paired(first: MeasuredRun, other: MeasuredRun) -> str | None:
    """Why the two were not measured on the same pictures, or None."""
    mine, theirs = first.examples, other.examples
    about = [each.trained.task.comparison_key(each.trained.facts) for each in (first, other)]
    if about[0] != about[1]:
        return f"numbers of other things, {_things(*about)}"
    if first.split != other.split or len(mine) != len(theirs):
        return f"{first.split} of {len(mine):,} pictures and {other.split} of {len(theirs):,}"
    for place in range(len(mine)):
        if mine.sample_name(place) != theirs.sample_name(place):
            return f"picture {place} is {escape(mine.sample_name(place))} and {escape(theirs.sample_name(place))}"
    known = [
        target_codes(each.source.targets, each.source.objects, len(each.source))[each.source_rows]
        for each in (mine, theirs)
    ]
    if not torch.equal(*known):
        return "the pictures have other targets"
    pixels = [each.source.images for each in (mine, theirs)]
    if isinstance(pixels[0], np.ndarray) and not np.array_equal(pixels[0], np.asarray(pixels[1])):
        return "arrays of other pixels"
    return None


def _things(mine: list[Any], theirs: list[Any]) -> str:
    """What two networks give numbers of, in words; of many things, such as classes, the first that differ."""
    if max(len(mine), len(theirs)) <= _MOST_THINGS:
        return f"{escape(str(mine))} and {escape(str(theirs))}"
    pairs = itertools.zip_longest(mine, theirs)
    place, pair = next((place, pair) for place, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    one, other = ("none" if each is None else escape(str(each)) for each in pair)
    return f"{len(mine):,} and {len(theirs):,}; the first that differs is number {place:,}: {one} and {other}"


def compare_metrics(first: Measurement, other: Measurement) -> list[dict[str, Any]]:
    """A row a number that both have: the difference with its interval, and whether it may be chance.

    Numbers that are shares of the pictures by McNemar's exact test (1947), others by a bootstrap over pictures, the
    same draws for both (Efron and Tibshirani 1993, ch. 16). Of all numbers together at most LEVEL of equal pairs are
    called different (Holm 1979).
    """
    rows: list[dict[str, Any]] = []
    for name, value in first.metrics.items():
        theirs = other.metrics.get(name)
        if value is None or theirs is None or (drawn := _differences(first, other, name)) is None:
            continue
        difference, (least, most) = theirs - value, metric_bounds(name, value)
        low, high = bootstrap_interval(difference, drawn, (least - most, most - least))
        binary = name in first.correct and name in other.correct
        p = (
            mcnemar_p_value(first.correct[name], other.correct[name])
            if binary
            else bootstrap_p_value(difference, drawn)
        )
        rows.append(
            {
                "number": name,
                "first": value,
                "other": theirs,
                "difference": difference,
                "from": low,
                "to": high,
                "p": p,
                "test": "McNemar" if binary else "bootstrap",
            }
        )
    for row, below in zip(rows, holm_rejections([row["p"] for row in rows]), strict=True):
        row["distinguishable"] = below
    return rows


def _differences(first: Measurement, other: Measurement, name: str) -> NDArray[np.float64] | None:
    """What a number differs by in each draw in which both have it; None where there are no draws of both."""
    drawn = [each.bootstrap_draws.get(name) for each in (first, other)]
    if drawn[0] is None or drawn[1] is None or len(drawn[0]) != len(drawn[1]):
        return None
    difference: NDArray[np.float64] = drawn[1] - drawn[0]
    known = difference[np.isfinite(difference)]
    return known if len(known) else None


def mcnemar_p_value(first_N: NDArray[np.bool_], other_N: NDArray[np.bool_]) -> float:
    """The probability of such a difference or a larger one if both were right equally often, exactly."""
    from scipy.stats import binomtest

    better, worse = int((other_N & ~first_N).sum()), int((first_N & ~other_N).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_p_value(difference: float, drawn_D: NDArray[np.float64]) -> float:
    """Twice the normal tail beyond no difference, by the draws' deviation and less their bias, as the interval is.

    Not the part of the draws beyond: of a hundred that is a hundredth at least, too much for twelve numbers at once.
    """
    deviation = float(drawn_D.std())
    apart = 2 * difference - float(drawn_D.mean())
    if not deviation:
        return 0.0 if apart else 1.0
    return math.erfc(abs(apart) / deviation / math.sqrt(2))


def holm_rejections(p_values: Sequence[float]) -> list[bool]:
    """Which are small enough, tested together."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    small = [False] * len(p_values)
    for rank, place in enumerate(order):
        if p_values[place] > SIGNIFICANCE_LEVEL / (len(p_values) - rank):
            break
        small[place] = True
    return small


def _figure(first: MeasuredRun, pair: dict[str, Any]) -> Plot:
    rows: list[dict[str, Any]] = pair["tests"]
    places = [float(place) for place in range(len(rows))]
    middle, low, high = ([float(row[key]) for row in rows] for key in ("difference", "from", "to"))
    differences = Series("difference, 95 %", middle, places, "spans", low, high)
    nothing = Series("none", [0.0, 0.0], [-0.5, len(rows) - 0.5])
    title = f"{pair['runs'][1]} less {first.run} on {first.split}"
    return Plot(title, "difference", "", (differences, nothing), ticks=tuple(row["number"] for row in rows))
