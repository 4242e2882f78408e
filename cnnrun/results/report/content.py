"""One run as a page shows it: its numbers and curves, where it fails, what it sees, what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Examples
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.network_svg import render_svg
from cnnrun.explain.figures.panels import marks_panel, to_pillow
from cnnrun.explain.figures.tiles import scale_to_side
from cnnrun.explain.methods.filters import filters
from cnnrun.explain.methods.gradients import gradcam
from cnnrun.explain.methods.top_patches import top_patches
from cnnrun.explain.methods.worst_images import Mistake, WorstImages, find_worst_images
from cnnrun.explain.subject import Explanation, ImagesToExplain, Subject, sample_evenly
from cnnrun.model.network import flops
from cnnrun.model.outline import build_outline
from cnnrun.results.report import charts
from cnnrun.results.report.class_tables import format_cell
from cnnrun.results.report.html import image_data_url
from cnnrun.tasks.classification_metrics import largest_confusions
from cnnrun.tasks.intervals import confidence_intervals
from cnnrun.tasks.temperature import TEMPERATURE
from cnnrun.training.run_records import read_environments, read_metrics, read_result

_PANEL = 900  # pixels that two pictures with boxes are wide at most
_MISTAKES, _EXPLAINED, _CHANNELS = 24, 6, 8  # pictures shown, explained; channels whose patches are shown
_MOST_EXPLAINED = 4  # runs beside each other
_ELSEWHERE = "What it sees is in the run's own report: here are too many runs for it."
_MOST_ROWS, _PAIRS = 100, 50  # points of a series as text; pairs of classes that are confused
_LOOKED_AT = 10_000  # pictures of a split among which the strongest patches are
_SAID = 3  # things that are said of a picture
_HIDDEN = ("precision_recall", "reliability")  # tables that charts show


@dataclass(frozen=True)
class ReportedRun:
    """A run as the page shows it: its network, a split, and what was measured there."""

    run: Path
    experiment: Experiment
    subject: Subject
    split: str
    examples: Examples
    measurement: Measurement

    @property
    def confidence_intervals(self) -> dict[str, Any]:
        return confidence_intervals(
            self.measurement.metrics, self.measurement.bootstrap_draws, self.measurement.correct
        )


def run_section(seen: ReportedRun, key: str, specs: dict[str, Any], beside: int = 1) -> dict[str, Any]:
    """What the template shows of one run of so many beside each other; its charts are added to `specs`.

    The more runs, the fewer pictures of each: a page stays small enough to be sent around.
    """
    given = seen.subject.trained
    done = read_result(seen.run) or {}
    bad = find_worst_images(seen.subject, seen.examples, _pictures_of(seen, beside), seen.experiment.train.batch)
    explanations, unseen = _explained(seen, bad.mistakes) if beside <= _MOST_EXPLAINED else ([], [_ELSEWHERE])
    chose = seen.split == "val" and seen.experiment.train.monitor.startswith("val/")
    best = ", ".join(f"{name} {value:.4f}" for name, value in done.get("best", {}).items())
    return {
        "id": key,
        "name": str(seen.run),
        "line": f"task {given.task.kind}; checkpoint of step {given.step}"
        + (f" of {done['steps']}: the best by {best}" if done else "; the training is not finished"),
        "notes": _notes(seen),
        "headline": _headline(seen),
        "measured": f"On the {len(seen.examples):,} pictures of {seen.split}, with 95 % intervals. "
        + ("It chose the checkpoint, so it flatters; test is for the end." if chose else ""),
        "tables": _tables(seen, key),
        "charts": _charts(seen, key, specs),
        "mistakes": _shown(seen, bad),
        "explanations": explanations,
        "unseen": unseen,
        "network": _network(seen, key),
        "cost": _cost(done),
        "data": _data(seen),
        "environment": _environment(seen.run),
        "config": seen.experiment.to_yaml(),
    }


def _pictures_of(seen: ReportedRun, beside: int) -> int:
    """How many of the worst are shown: of those with boxes, which are larger, fewer."""
    return max(2, (_MISTAKES if seen.subject.trained.task.target_kind != "boxes" else _MISTAKES // 2) // beside)


def _notes(seen: ReportedRun) -> list[str]:
    chosen = seen.subject.trained.facts.chosen
    heat = chosen.get(TEMPERATURE)
    notes = [f"Calibrated: probabilities are at temperature {heat:.4g}."] if heat else []
    others = [f"{name} {value:.4g}" for name, value in chosen.items() if name != TEMPERATURE]
    return notes + ([f"Chosen on val: {join_names(others)}."] if others else [])


def _headline(seen: ReportedRun) -> list[dict[str, str]]:
    spans = seen.confidence_intervals
    return [
        {
            "name": name,
            "value": "none" if value is None else f"{value:.4f}",
            "span": f"{spans[name][0]:.4f} to {spans[name][1]:.4f}" if name in spans else "",
        }
        for name, value in seen.measurement.metrics.items()
    ]


def _tables(seen: ReportedRun, key: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for name, rows in seen.measurement.tables.items():
        if rows and name not in _HIDDEN:
            title = name.replace("_", " ")
            cells = [[format_cell(value) for value in row.values()] for row in rows]
            made.append({"id": f"{key}-{name}", "title": title, "columns": list(rows[0]), "rows": cells})
    classes = seen.subject.trained.facts.classes
    for name, matrix in seen.measurement.matrices.items():
        made.append({"id": f"{key}-{name}", **_confused(name, matrix, classes)})
    return [{"open": len(each["rows"]) <= 12, **each} for each in made if each["rows"]]


def _confused(name: str, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """The pairs of classes that are confused most, as a table; of many classes it stands for the chart."""
    pairs, among = largest_confusions(matrix, _PAIRS)
    rows = [[classes[true], classes[said], str(count), str(of)] for true, said, count, of in pairs]
    most = f"the {len(rows)} most confused of {among:,} pairs" if among > len(rows) else "most often"
    of_many = f" of {len(classes):,} classes" if len(classes) > charts.MAX_MATRIX_CLASSES else ""
    return {"title": f"{name}{of_many}: {most}", "columns": ["true", "taken for", "times", "of"], "rows": rows}


def _charts(seen: ReportedRun, key: str, specs: dict[str, Any]) -> list[dict[str, Any]]:
    """Curves of the training, what the task draws of its numbers, and matrices; each spec under its id."""
    made = []
    first = ("loss", seen.experiment.train.monitor)
    for number, plot in enumerate([*training_curves([("", seen.run)]), *seen.measurement.plots]):
        aside = plot.x == "epoch" and plot.title not in first
        made.append(add_chart(f"{key}-chart{number}", plot, specs) | {"aside": aside})
    for name, counts in seen.measurement.matrices.items():
        spec = charts.matrix_spec(f"{name} on {seen.split}", counts, seen.subject.trained.facts.classes)
        if spec:
            specs[f"{key}-{name}-matrix"] = spec
            made.append({"id": f"{key}-{name}-matrix", "title": name, **_counts(seen, counts), "aside": False})
    return made


def _counts(seen: ReportedRun, counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A matrix that is drawn as lines: the cells that hold something, row by row."""
    classes = seen.subject.trained.facts.classes
    cells = [(a, b, count) for a, row in enumerate(counts) for b, count in enumerate(row) if count]
    rows = [[classes[a], classes[b], str(count)] for a, b, count in cells]
    return {"columns": ["true", "predicted", "times"], "rows": rows, "note": ""}


def add_chart(key: str, plot: Plot, specs: dict[str, Any]) -> dict[str, Any]:
    """A figure under its id, and its numbers as text."""
    specs[key] = charts.vega_spec(plot)
    rows = [
        [series.name, f"{series.x[at]:.6g}", f"{series.y[at]:.6g}"]
        for series in plot.series
        for at in np.unique(np.linspace(0, len(series.x) - 1, min(_MOST_ROWS, len(series.x))).round().astype(int))
    ]
    most = max((len(series.x) for series in plot.series), default=0)
    note = f"{_MOST_ROWS} of up to {most:,} points of each series" if most > _MOST_ROWS else ""
    columns = ["series", plot.x or "x", plot.y or "y"]
    return {"id": key, "title": plot.title, "columns": columns, "rows": rows, "note": note}


def training_curves(of: Sequence[tuple[str, Path]]) -> list[Plot]:
    """The losses in one figure and each number of val in one of its own, by epoch, of runs by the names given."""
    lines: dict[str, list[Series]] = {}
    for name, run in of:
        rows = read_metrics(run)
        for number in dict.fromkeys(key for row in rows for key in row if key not in ("step", "epoch")):
            points = [(row["epoch"], row[number]) for row in rows if isinstance(row.get(number), int | float)]
            # Where there was nothing of that kind a line has no number; those of earlier versions have COCO's -1.
            if all(value == -1.0 for _, value in points):
                continue
            title = "loss" if number in ("train/loss", "val/loss") else number
            label = " ".join(each for each in (name, number) if each) if title == "loss" or not name else name
            lines.setdefault(title, []).append(Series(label, [p[0] for p in points], [p[1] for p in points]))
    return [Plot(title, "epoch", title, tuple(series)) for title, series in lines.items()]


def _shown(seen: ReportedRun, bad: WorstImages) -> dict[str, Any] | None:
    """The worst pictures; where results lie somewhere in them, what is there beside what is found."""
    if not bad.mistakes:
        return None
    pictures, large = _pictures(seen, bad.mistakes)
    true = sorted({each.target_text for each in bad.mistakes})
    of = f"{bad.sample_count:,} of " if bad.sample_count < len(seen.examples) else ""
    return {
        "caption": f"Worst first, by {bad.badness_name}, of {of}the {len(seen.examples):,} pictures of {seen.split}.",
        "names": true if 1 < len(true) < len(bad.mistakes) else [],
        "large": large,
        "pictures": [
            {
                "image": image,
                "name": seen.examples.sample_name(each.sample),
                "true": each.target_text,
                "said": "" if large else f"{bad.prediction_title}: {_first(each.prediction_text)}",
                "badness": f"{bad.badness_name if bad.badness_name == 'loss' else 'by'} {each.badness:.3g}",
                "alt": f"{each.target_text}, {bad.prediction_title}: {each.prediction_text}",
            }
            for each, image in zip(bad.mistakes, pictures, strict=True)
        ],
    }


def _first(said: str) -> str:
    """The likeliest of what is said, a line each."""
    parts = said.split("  ")
    return "\n".join(parts[:_SAID]) + (" …" if len(parts) > _SAID else "")


def _pictures(seen: ReportedRun, mistakes: Sequence[Mistake]) -> tuple[list[str], bool]:
    given, shown = seen.subject.trained, _of(seen, mistakes)
    true = given.task.target_marks(shown.targets, given.facts)
    found = given.task.result_marks(given.results(shown.pixels), given.facts)
    if true is None or found is None:
        return [
            image_data_url(np.asarray(scale_to_side(to_pillow(each), 112).convert("RGB"))) for each in shown.pixels
        ], False
    parts = zip(shown.pixels.split(1), true, found, strict=True)
    return [image_data_url(marks_panel(one, [mine], [theirs], ["true"]), _PANEL) for one, mine, theirs in parts], True


def _of(seen: ReportedRun, mistakes: Sequence[Mistake]) -> ImagesToExplain:
    """Those pictures, as explanations take them."""
    given, index = seen.subject.trained, torch.tensor([each.sample for each in mistakes])
    pixels = seen.examples.load_images(index).to(given.device).float()
    names = [seen.examples.sample_name(each.sample) for each in mistakes]
    return ImagesToExplain(
        pixels, names, [each.target_text for each in mistakes], seen.examples.batch_targets(index, given.device)
    )


def _explained(seen: ReportedRun, mistakes: Sequence[Mistake]) -> tuple[list[dict[str, str]], list[str]]:
    """Pictures of what the network sees, each with its line; and a line for each that cannot be made, and why."""
    subject, batch = seen.subject, seen.experiment.train.batch
    few = mistakes[:_EXPLAINED]
    ways: list[tuple[str, Callable[[], Explanation]]] = [
        ("filters", lambda: filters(subject, None)),
        ("top", lambda: top_patches(subject, sample_evenly(seen.examples, _LOOKED_AT)[0], None, [], _CHANNELS, batch)),
        ("gradcam of the worst", lambda: gradcam(subject, _of(seen, few), None, None)),
    ]
    made, unseen = [], []
    for name, way in ways if few else ways[:2]:
        try:
            found = way()
            made.append({"image": image_data_url(found.image), "caption": found.caption})
        except ConfigError as error:
            unseen.append(f"Without {name}: {error}")
    return made, unseen


def _network(seen: ReportedRun, key: str) -> dict[str, Any]:
    built = seen.subject.built_network
    counts = flops(built)
    rows = [
        [row.path, "x".join(map(str, row.out_shape)), f"{row.parameters:,}", f"{count / 1e6:,.2f}"]
        for row, count in zip(built.rows, counts, strict=True)
    ]
    return {
        "line": f"{built.parameter_count:,} parameters, {sum(counts) / 1e6:,.1f} MFLOPs a picture of "
        f"{'x'.join(map(str, built.image))}.",
        "svg": render_svg(build_outline(built, seen.experiment.task.kind), seen.experiment.name, key),
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


def _data(seen: ReportedRun) -> dict[str, Any]:
    facts = seen.subject.trained.facts
    source = seen.experiment.data.source
    what = [number.name for number in facts.numbers] or list(facts.classes)
    shown = join_names(what)
    rows = [[name, f"{count:,}"] for name, count in facts.counts.items()]
    return {"source": source.kind, "what": shown, "rows": rows}


def _environment(run: Path) -> list[list[str]]:
    found = read_environments(run)
    rows = [[name, str(value)] for name, value in (found[0] if found else {}).items()]
    return rows + ([["later", f"{len(found) - 1} other environment(s)"]] if len(found) > 1 else [])
