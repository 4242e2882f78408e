"""One run as a page shows it: its numbers and curves, where it fails, what it sees, what it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrun import charts, runs
from cnnrun.calibration import TEMPERATURE
from cnnrun.dataset import Examples
from cnnrun.drawing import svg
from cnnrun.errors import ConfigError
from cnnrun.experiment import Experiment
from cnnrun.explain import Explanation, Shown, Subject
from cnnrun.explain.filters import filters
from cnnrun.explain.slopes import gradcam
from cnnrun.explain.top import top
from cnnrun.explain.worst import Mistake, worst
from cnnrun.network import flops
from cnnrun.outline import outline
from cnnrun.page import as_image
from cnnrun.panels import panel, picture_of
from cnnrun.plots import Plot, Series
from cnnrun.resampling import intervals
from cnnrun.taskspec import Measured
from cnnrun.tiles import grown

_MISTAKES, _EXPLAINED, _CHANNELS = 24, 6, 8  # pictures shown, explained; channels whose patches are shown
_SAID = 3  # things that are said of a picture
_HIDDEN = ("precision_recall", "reliability")  # tables that charts show


@dataclass(frozen=True)
class Seen:
    """A run as the page shows it: its network, a split, and what was measured there."""

    run: Path
    experiment: Experiment
    subject: Subject
    split: str
    examples: Examples
    measured: Measured

    @property
    def spans(self) -> dict[str, Any]:
        return intervals(self.measured.numbers, self.measured.spread, self.measured.right)


def portrait(seen: Seen, key: str, specs: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of one run; its charts are added to `specs`."""
    given = seen.subject.given
    done = runs.result(seen.run) or {}
    mistakes, by = worst(seen.subject, seen.examples, _MISTAKES, seen.experiment.train.batch)
    explanations, unseen = _explained(seen, mistakes)
    best = ", ".join(f"{name} {value:.4f}" for name, value in done.get("best", {}).items())
    return {
        "id": key,
        "name": str(seen.run),
        "line": f"task {given.task.kind}; checkpoint of step {given.step}"
        + (f" of {done['steps']}: the best by {best}" if done else "; the training is not finished"),
        "notes": _notes(seen),
        "headline": _headline(seen),
        "measured": f"On the {len(seen.examples):,} pictures of {seen.split}, with 95 % intervals over pictures. "
        + ("It chose the checkpoint, so it flatters; test is for the end." if seen.split == "val" else ""),
        "tables": _tables(seen, key),
        "charts": _charts(seen, key, specs),
        "mistakes": _shown(seen, mistakes, by),
        "explanations": explanations,
        "unseen": unseen,
        "network": _network(seen),
        "cost": _cost(done),
        "data": _data(seen),
        "environment": _environment(seen.run),
        "config": seen.experiment.to_yaml(),
    }


def _notes(seen: Seen) -> list[str]:
    chosen = seen.subject.given.facts.chosen
    heat = chosen.get(TEMPERATURE)
    notes = [f"Calibrated: probabilities are at temperature {heat:.4g}."] if heat else []
    others = [f"{name} {value:.4g}" for name, value in chosen.items() if name != TEMPERATURE]
    return notes + ([f"Chosen on val: {', '.join(others[:20])}."] if others else [])


def _headline(seen: Seen) -> list[dict[str, str]]:
    spans = seen.spans
    return [
        {
            "name": name,
            "value": f"{value:.4f}",
            "span": f"{spans[name][0]:.4f} to {spans[name][1]:.4f}" if name in spans else "",
        }
        for name, value in seen.measured.numbers.items()
    ]


def _tables(seen: Seen, key: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for name, rows in seen.measured.tables.items():
        if rows and name not in _HIDDEN:
            title = name.replace("_", " ")
            cells = [[_cell(value) for value in row.values()] for row in rows]
            made.append({"id": f"{key}-{name}", "title": title, "columns": list(rows[0]), "rows": cells})
    classes = seen.subject.given.facts.classes
    for name, matrix in seen.measured.matrices.items():
        confused = sorted(
            ((count, classes[a], classes[b]) for a, row in enumerate(matrix) for b, count in enumerate(row) if a != b),
            reverse=True,
        )
        lines = [[true, said, str(count)] for count, true, said in confused[:50] if count]
        columns = ["true", "taken for", "times"]
        made.append({"id": f"{key}-{name}", "title": f"{name}: most often", "columns": columns, "rows": lines})
    return [{"open": len(each["rows"]) <= 12, **each} for each in made if each["rows"]]


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _charts(seen: Seen, key: str, specs: dict[str, Any]) -> list[dict[str, Any]]:
    """Curves of the training, what the task draws of its numbers, and matrices; each spec under its id."""
    made = []
    first = ("loss", seen.experiment.train.monitor)
    for number, plot in enumerate([*curves([("", seen.run)]), *seen.measured.plots]):
        aside = plot.x == "epoch" and plot.title not in first
        made.append(chart(f"{key}-chart{number}", plot, specs) | {"aside": aside})
    for name, counts in seen.measured.matrices.items():
        spec = charts.matrix(f"{name} on {seen.split}", counts, seen.subject.given.facts.classes)
        if spec:
            specs[f"{key}-{name}-matrix"] = spec
            made.append({"id": f"{key}-{name}-matrix", "title": name, "rows": [], "aside": False})
    return made


def chart(key: str, plot: Plot, specs: dict[str, Any]) -> dict[str, Any]:
    specs[key] = charts.vega(plot)
    rows = [
        [series.name, f"{x:.6g}", f"{y:.6g}"]
        for series in plot.series
        if len(series.x) <= 100
        for x, y in zip(series.x, series.y, strict=True)
    ]
    return {"id": key, "title": plot.title, "columns": ["series", plot.x or "x", plot.y or "y"], "rows": rows}


def curves(of: Sequence[tuple[str, Path]]) -> list[Plot]:
    """The losses in one figure and each number of val in one of its own, by epoch, of runs by the names given."""
    lines: dict[str, list[Series]] = {}
    for name, run in of:
        rows = _metrics(run)
        for number in [key for key in rows[0] if key not in ("step", "epoch")] if rows else []:
            points = [(row["epoch"], row[number]) for row in rows if isinstance(row.get(number), int | float)]
            title = "loss" if number in ("train/loss", "val/loss") else number
            label = " ".join(each for each in (name, number) if each) if title == "loss" or not name else name
            lines.setdefault(title, []).append(Series(label, [p[0] for p in points], [p[1] for p in points]))
    return [Plot(title, "epoch", title, tuple(series)) for title, series in lines.items()]


def _metrics(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _shown(seen: Seen, mistakes: Sequence[Mistake], by: str) -> dict[str, Any] | None:
    """The worst pictures; where results lie somewhere in them, what is there beside what is found."""
    if not mistakes:
        return None
    pictures, large = _pictures(seen, mistakes)
    true = list(dict.fromkeys(each.true for each in mistakes))
    way = "Worst first" if len(mistakes) > 1 else "The worst"
    return {
        "caption": f"{way}, by {by}, of the {len(seen.examples):,} pictures of {seen.split}.",
        "names": sorted(true),
        "large": large,
        "pictures": [
            {
                "image": image,
                "name": seen.examples.name(each.sample),
                "true": each.true,
                "said": "" if large else _first(each.said),
                "badness": f"{by} {each.badness:.3g}",
            }
            for each, image in zip(mistakes, pictures, strict=True)
        ],
    }


def _first(said: str) -> str:
    """The likeliest of what is said, a line each."""
    parts = said.split("  ")
    return "\n".join(parts[:_SAID]) + (" …" if len(parts) > _SAID else "")


def _pictures(seen: Seen, mistakes: Sequence[Mistake]) -> tuple[list[str], bool]:
    given, shown = seen.subject.given, _of(seen, mistakes)
    true = given.task.true_marks(shown.targets, given.facts)
    found = given.task.found_marks(given.results(shown.pixels), given.facts)
    if true is None or found is None:
        return [as_image(np.asarray(grown(picture_of(each), 112).convert("RGB"))) for each in shown.pixels], False
    parts = zip(shown.pixels.split(1), true, found, strict=True)
    return [as_image(panel(one, [mine], [theirs], ["true"])) for one, mine, theirs in parts], True


def _of(seen: Seen, mistakes: Sequence[Mistake]) -> Shown:
    """Those pictures, as explanations take them."""
    given, index = seen.subject.given, torch.tensor([each.sample for each in mistakes])
    pixels = seen.examples.take(index).to(given.device).float()
    names = [seen.examples.name(each.sample) for each in mistakes]
    return Shown(pixels, names, [each.true for each in mistakes], seen.examples.targets_of(index, given.device))


def _explained(seen: Seen, mistakes: Sequence[Mistake]) -> tuple[list[dict[str, str]], list[str]]:
    """Pictures of what the network sees, each with its line; and a line for each that cannot be made, and why."""
    subject, batch = seen.subject, seen.experiment.train.batch
    some = list(mistakes[:_EXPLAINED])
    ways: list[tuple[str, Callable[[], Explanation]]] = [
        ("filters", lambda: filters(subject, None)),
        ("top", lambda: top(subject, seen.examples, None, [], _CHANNELS, batch)),
        ("gradcam of the worst", lambda: gradcam(subject, _of(seen, some), None, None)),
    ]
    made, unseen = [], []
    for name, way in ways if some else ways[:2]:
        try:
            found = way()
            made.append({"image": as_image(found.picture), "caption": found.caption})
        except ConfigError as error:
            unseen.append(f"Without {name}: {error}")
    return made, unseen


def _network(seen: Seen) -> dict[str, Any]:
    built = seen.subject.built
    rows = [
        [row.path, "x".join(map(str, row.out_shape)), f"{row.parameters:,}", f"{count / 1e6:,.2f}"]
        for row, count in zip(built.rows, flops(built), strict=True)
    ]
    total = sum(flops(built))
    return {
        "line": f"{built.parameters:,} parameters, {total / 1e6:,.1f} MFLOPs a picture of "
        f"{'x'.join(map(str, built.image))}.",
        "svg": svg(outline(built, seen.experiment.task.kind), seen.experiment.name),
        "columns": ["layer", "output", "parameters", "MFLOPs"],
        "rows": rows,
    }


def _cost(done: dict[str, Any]) -> list[list[str]]:
    """What the training took."""
    if not done:
        return [["not finished", ""]]
    return [
        ["steps", f"{done['steps']:,}"],
        ["seconds", f"{done['seconds']:,.1f}"],
        ["images/s", f"{done['images_per_second']:,.0f}"],
        ["waiting for data", f"{done['data_wait_share']:.1%}"],
        *([["peak memory, MiB", f"{done['peak_memory_mib']:,.0f}"]] if done.get("peak_memory_mib") else []),
    ]


def _data(seen: Seen) -> dict[str, Any]:
    facts = seen.subject.given.facts
    source = seen.experiment.data.source
    what = [number.name for number in facts.numbers] or list(facts.classes)
    shown = ", ".join(what[:20]) + (f" and {len(what) - 20} more" if len(what) > 20 else "")
    rows = [[name, f"{count:,}"] for name, count in facts.counts.items()]
    return {"source": source.kind, "what": shown, "rows": rows}


def _environment(run: Path) -> list[list[str]]:
    found = runs.environments(run)
    rows = [[name, str(value)] for name, value in (found[0] if found else {}).items()]
    return rows + ([["later", f"{len(found) - 1} other environment(s)"]] if len(found) > 1 else [])
