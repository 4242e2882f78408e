"""Content of a run's section of the report: metrics, curves, worst images, explanations, network, data and config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrun.base.counts import format_count
from cnnrun.base.durations import format_duration
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError
from cnnrun.contracts.figure import Plot, Series
from cnnrun.experiment.extensions import describe_lineage
from cnnrun.experiment.open_run import MeasuredRun
from cnnrun.explain.figures.network_svg import render_svg
from cnnrun.explain.figures.panels import overlay_panel, to_pillow
from cnnrun.explain.figures.tiles import scale_to_side
from cnnrun.explain.methods.filters import filters
from cnnrun.explain.methods.gradients import gradcam
from cnnrun.explain.methods.top_patches import top_patches
from cnnrun.explain.methods.worst_images import WorstImage, WorstImages, find_worst_images
from cnnrun.explain.subject import ExplainedNetwork, Explanation, ImagesToExplain, sample_evenly
from cnnrun.model.network import flops
from cnnrun.model.outline import build_outline
from cnnrun.results.report import charts
from cnnrun.results.report.class_tables import format_cell
from cnnrun.results.report.html import image_data_url
from cnnrun.tasks.classification_metrics import largest_confusions
from cnnrun.training.run_records import read_environments, read_metrics, read_result

_MAX_PANEL_WIDTH = 900  # pixels of two copies of an image, with its targets and with its detections
_MAX_MISTAKES = 24  # worst images that are shown
_EXPLAINED_IMAGES, _CHANNELS = 6, 8  # images and channels that are explained
_MAX_EXPLAINED_RUNS = 4  # a report on more runs has no explanations
_TOO_MANY_RUNS = "A report on this many runs has no explanations; they are in each run's own report."
_MAX_CHART_ROWS = 100  # points of each series in the table of a chart
_MAX_PAIRS = 50  # most confused pairs of classes that are listed
_MAX_SEARCHED_IMAGES = 10_000  # images of a split that are searched for the strongest patches
_MAX_PREDICTIONS = 3  # predictions printed below a worst image


@dataclass(frozen=True)
class ReportedRun:
    """A run that the report shows: its measurement on a split, and its network with named layers."""

    measured: MeasuredRun
    subject: ExplainedNetwork


def run_section(reported: ReportedRun, key: str, specs: dict[str, Any], run_count: int = 1) -> dict[str, Any]:
    """Collect what the template shows of one run; adds the specifications of its charts to `specs`.

    With more runs in a report, each shows fewer images, so that the page stays small enough to send.
    """
    measured, trained = reported.measured, reported.measured.trained
    result = read_result(measured.trained.run) or {}
    count = _worst_image_count(measured, run_count)
    worst = find_worst_images(reported.subject, measured.examples, count, measured.experiment.train.batch)
    explanations, failures = list[dict[str, str]](), [_TOO_MANY_RUNS]
    if run_count <= _MAX_EXPLAINED_RUNS:
        explanations, failures = _explain_network(reported, worst.images)
    best = ", ".join(f"{name} {value:.4f}" for name, value in result.get("best", {}).items())
    return {
        "id": key,
        "name": measured.name,
        "description": f"task {trained.task.kind}; checkpoint of step {trained.step:,}"
        + (f" of {result['steps']:,}, the best by {best}" if result else "; the training is not finished"),
        "notes": [*_operating_notes(measured), *describe_lineage(trained.run)],
        "headline": _headline(measured),
        "measured_on": _measurement_note(measured),
        "tables": _metric_tables(measured, key),
        "charts": _all_charts(measured, key, specs),
        "mistakes": _worst_images_section(measured, worst),
        "explanations": explanations,
        "explanation_failures": failures,
        "network": _network_section(reported, key),
        "cost": _cost_rows(result),
        "data": _data_section(measured),
        "environment": _environment_rows(measured.trained.run),
        "config": measured.experiment.to_yaml(),
    }


def _measurement_note(measured: MeasuredRun) -> str:
    """Note on the images behind the metrics, with a warning if they also chose the checkpoint."""
    note = f"On {format_count(len(measured.examples), 'image')} of {measured.split}, with 95 % confidence intervals."
    if measured.split == "val" and measured.experiment.train.monitor.startswith("val/"):
        note += " They are optimistic, since val also chose the checkpoint; use test for final metrics."
    return note


def _worst_image_count(measured: MeasuredRun, run_count: int) -> int:
    """Number of worst images to show; images with boxes are larger, so fewer of them."""
    has_drawings = measured.trained.task.showing.has_overlays
    return max(2, (_MAX_MISTAKES // 2 if has_drawings else _MAX_MISTAKES) // run_count)


def _operating_notes(measured: MeasuredRun) -> list[str]:
    choices = measured.trained.choices
    temperature = choices.temperature
    notes = [f"Calibrated: probabilities are at temperature {temperature:.4g}."] if temperature else []
    others = replace(choices, temperature=None).by_description()
    thresholds = [f"{name} {value:.4g}" for name, value in others.items()]
    return notes + ([f"Chosen on val: {join_names(thresholds)}."] if thresholds else [])


def _headline(measured: MeasuredRun) -> list[dict[str, str]]:
    intervals = measured.intervals
    return [
        {
            "name": name,
            "value": format_cell(value),
            "interval": f"{intervals[name][0]:.4f} to {intervals[name][1]:.4f}" if name in intervals else "",
        }
        for name, value in measured.measurement.metrics.items()
    ]


def _metric_tables(measured: MeasuredRun, key: str) -> list[dict[str, Any]]:
    charted = {plot.table for plot in measured.measurement.plots}
    tables: list[dict[str, Any]] = []
    for name, rows in measured.measurement.tables.items():
        if rows and name not in charted:
            title = name.replace("_", " ")
            cells = [[format_cell(value) for value in row.values()] for row in rows]
            tables.append({"id": f"{key}-{name}", "title": title, "columns": list(rows[0]), "rows": cells})
    classes = measured.trained.facts.classes
    for name, matrix in measured.measurement.matrices.items():
        tables.append({"id": f"{key}-{name}", **_confusion_table(name, matrix, classes)})
    return [{"is_open": len(table["rows"]) <= 12, **table} for table in tables if table["rows"]]


def _confusion_table(name: str, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Table of the pairs of classes that are confused most; for many classes it replaces the chart."""
    pairs, pair_count = largest_confusions(matrix, _MAX_PAIRS)
    rows = [[classes[true], classes[predicted], str(count), str(total)] for true, predicted, count, total in pairs]
    heading = f"the {len(rows)} most confused of {pair_count:,} pairs" if pair_count > len(rows) else "most often"
    of_many = f" of {len(classes):,} classes" if len(classes) > charts.MAX_MATRIX_CLASSES else ""
    return {"title": f"{name}{of_many}: {heading}", "columns": ["true", "predicted", "times", "of"], "rows": rows}


def _all_charts(measured: MeasuredRun, key: str, specs: dict[str, Any]) -> list[dict[str, Any]]:
    """Charts of the training, of the task's metrics and of matrices; adds each specification under its id."""
    chart_items = []
    primary_titles = ("loss", measured.experiment.train.monitor)
    for number, plot in enumerate([*training_curves([("", measured.trained.run)]), *measured.measurement.plots]):
        is_secondary = plot.x_label == "epoch" and plot.title not in primary_titles
        chart_items.append(add_chart(f"{key}-chart{number}", plot, specs) | {"is_secondary": is_secondary})
    for name, counts in measured.measurement.matrices.items():
        spec = charts.matrix_spec(f"{name} on {measured.split}", counts, measured.trained.facts.classes)
        if spec:
            specs[f"{key}-{name}-matrix"] = spec
            rows = _matrix_rows(measured, counts)
            chart_items.append({"id": f"{key}-{name}-matrix", "title": name, **rows, "is_secondary": False})
    return chart_items


def _matrix_rows(measured: MeasuredRun, counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Nonzero cells of a confusion matrix as table rows: the text version of its chart."""
    classes = measured.trained.facts.classes
    cells = [
        (true, predicted, count) for true, row in enumerate(counts) for predicted, count in enumerate(row) if count
    ]
    rows = [[classes[true], classes[predicted], str(count)] for true, predicted, count in cells]
    return {"columns": ["true", "predicted", "times"], "rows": rows, "note": ""}


def add_chart(key: str, plot: Plot, specs: dict[str, Any]) -> dict[str, Any]:
    """Add a figure's specification under its id; returns the figure's values as a table."""
    specs[key] = charts.vega_spec(plot)
    rows = [
        [series.name, f"{series.x[index]:.6g}", f"{series.y[index]:.6g}"]
        for series in plot.series
        for index in _evenly_spaced(len(series.x))
    ]
    max_points = max((len(series.x) for series in plot.series), default=0)
    note = f"{_MAX_CHART_ROWS} of up to {max_points:,} points of each series" if max_points > _MAX_CHART_ROWS else ""
    columns = ["series", plot.x_label or "x", plot.y_label or "y"]
    return {"id": key, "title": plot.title, "columns": columns, "rows": rows, "note": note}


def _evenly_spaced(count: int) -> list[int]:
    """Indices of a series that the table of a chart shows."""
    indices = np.linspace(0, count - 1, min(_MAX_CHART_ROWS, count)).round().astype(int)
    return [int(index) for index in np.unique(indices)]


def training_curves(named_runs: Sequence[tuple[str, Path]]) -> list[Plot]:
    """Figures by epoch of named runs: one with the losses of train and val, and one for each other metric."""
    lines: dict[str, list[Series]] = {}
    for name, run in named_runs:
        rows = read_metrics(run)
        for metric in dict.fromkeys(key for row in rows for key in row if key not in ("step", "epoch")):
            points = [(row["epoch"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]
            # Earlier versions wrote COCO's -1 for an undefined metric; a curve of nothing else is left out.
            if all(value == -1.0 for _, value in points):
                continue
            title = "loss" if metric in ("train/loss", "val/loss") else metric
            label = " ".join(word for word in (name, metric) if word) if title == "loss" or not name else name
            lines.setdefault(title, []).append(Series(label, [p[0] for p in points], [p[1] for p in points]))
    return [Plot(title, "epoch", title, tuple(series)) for title, series in lines.items()]


def _worst_images_section(measured: MeasuredRun, worst: WorstImages) -> dict[str, Any] | None:
    """Section with the worst images, with targets and results side by side if they have positions in the image."""
    if not worst.images:
        return None
    images, is_wide = _encode_mistakes(measured, worst.images)
    target_texts = sorted({mistake.target_text for mistake in worst.images})
    share = f"{worst.sample_count:,} of " if worst.sample_count < len(measured.examples) else ""
    return {
        "caption": f"Worst first, by {worst.measure_name}, of {share}the {len(measured.examples):,} images of "
        f"{measured.split}.",
        "names": target_texts if 1 < len(target_texts) < len(worst.images) else [],
        "is_wide": is_wide,
        "images": [
            {
                "image": image,
                "name": measured.examples.sample_name(mistake.sample),
                "target": mistake.target_text,
                "prediction": ""
                if is_wide
                else f"{worst.prediction_title}: {_first_predictions(mistake.prediction_text)}",
                "badness": f"{'loss' if worst.measure_name == 'loss' else 'difference'} {mistake.measure:.3g}",
                "alt": f"{mistake.target_text}, {worst.prediction_title}: {mistake.prediction_text}",
            }
            for mistake, image in zip(worst.images, images, strict=True)
        ],
    }


def _first_predictions(text: str) -> str:
    """Shorten the text of a prediction to its most likely parts, a line each."""
    parts = text.split("  ")
    return "\n".join(parts[:_MAX_PREDICTIONS]) + (" …" if len(parts) > _MAX_PREDICTIONS else "")


def _encode_mistakes(measured: MeasuredRun, mistakes: Sequence[WorstImage]) -> tuple[list[str], bool]:
    trained, images = measured.trained, _select_mistakes(measured, mistakes)
    if not trained.task.showing.has_overlays:
        return [
            image_data_url(np.asarray(scale_to_side(to_pillow(pixels), 112).convert("RGB"))) for pixels in images.pixels
        ], False
    target_overlays = trained.task.showing.target_overlays(images.targets)
    parts = zip(images.pixels.split(1), target_overlays, trained.overlays(images.pixels), strict=True)
    panels = [overlay_panel(image_1CHW, [targets], [results], ["true"]) for image_1CHW, targets, results in parts]
    return [image_data_url(panel, _MAX_PANEL_WIDTH) for panel in panels], True


def _select_mistakes(measured: MeasuredRun, mistakes: Sequence[WorstImage]) -> ImagesToExplain:
    """Select the images of mistakes from the split."""
    trained, index = measured.trained, torch.tensor([mistake.sample for mistake in mistakes])
    pixels = measured.examples.load_images(index).to(trained.device).float()
    names = [measured.examples.sample_name(mistake.sample) for mistake in mistakes]
    target_texts = [mistake.target_text for mistake in mistakes]
    return ImagesToExplain(pixels, names, target_texts, measured.examples.batch_targets(index, trained.device))


def _explain_network(reported: ReportedRun, mistakes: Sequence[WorstImage]) -> tuple[list[dict[str, str]], list[str]]:
    """Explain the network by each method; returns images with captions, and a line for each method that failed."""
    subject, batch = reported.subject, reported.measured.experiment.train.batch
    explained_mistakes = mistakes[:_EXPLAINED_IMAGES]
    searched, _ = sample_evenly(reported.measured.examples, _MAX_SEARCHED_IMAGES)
    methods: list[tuple[str, Callable[[], Explanation]]] = [
        ("filters", lambda: filters(subject, None)),
        ("top", lambda: top_patches(subject, searched, None, [], _CHANNELS, batch)),
        (
            "gradcam of the worst",
            lambda: gradcam(subject, _select_mistakes(reported.measured, explained_mistakes), None, None),
        ),
    ]
    explanations, failures = [], []
    for name, explain in methods if explained_mistakes else methods[:2]:
        try:
            explanation = explain()
            explanations.append({"image": image_data_url(explanation.image), "caption": explanation.caption})
        except ConfigError as error:
            failures.append(f"No {name}: {error}")
    return explanations, failures


def _network_section(reported: ReportedRun, key: str) -> dict[str, Any]:
    network = reported.subject.built_network
    counts = flops(network)
    rows = [
        [row.path, "x".join(map(str, row.out_shape)), f"{row.parameters:,}", f"{count / 1e6:,.2f}"]
        for row, count in zip(network.rows, counts, strict=True)
    ]
    return {
        "description": f"{network.parameter_count:,} parameters, {sum(counts) / 1e6:,.1f} MFLOPs for an image of "
        f"{'x'.join(map(str, network.image_shape))}.",
        "svg": render_svg(
            build_outline(network, reported.measured.experiment.task.kind), reported.measured.experiment.name, key
        ),
        "columns": ["layer", "output", "parameters", "MFLOPs"],
        "rows": rows,
    }


def _cost_rows(result: dict[str, Any]) -> list[list[str]]:
    """Time, speed and memory that the training took."""
    if not result:
        return [["not finished", ""]]
    return [
        ["steps", f"{result['steps']:,}"],
        ["time", format_duration(result["seconds"])],
        ["images/s", f"{result['images_per_second']:,.0f}"],
        ["waiting for data", f"{result['data_wait_share']:.1%}"],
        *([["peak memory, MiB", f"{result['peak_memory_mib']:,.0f}"]] if result.get("peak_memory_mib") else []),
    ]


def _data_section(measured: MeasuredRun) -> dict[str, Any]:
    facts = measured.trained.facts
    source = measured.experiment.data.source
    target_names = [target.name for target in facts.numbers] or list(facts.classes)
    rows = [[name, f"{count:,}"] for name, count in facts.counts.items()]
    return {"source": source.kind, "targets": join_names(target_names), "rows": rows}


def _environment_rows(run: Path) -> list[list[str]]:
    environments = read_environments(run)
    rows = [[name, str(value)] for name, value in (environments[0] if environments else {}).items()]
    return rows + (
        [["resumed in", format_count(len(environments) - 1, "other environment")]] if len(environments) > 1 else []
    )
