"""`cnnrun report`: one HTML page with a run's metrics, curves, worst images, explanations, network and config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import write_new_file
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import ConfigError, InterruptionError, UserError, escape
from cnnrun.base.progress import say
from cnnrun.experiment.config_differences import describe_differences
from cnnrun.experiment.open_run import measure_run
from cnnrun.explain.subject import ExplainedNetwork
from cnnrun.results.report.content import ReportedRun, add_chart, run_section, training_curves
from cnnrun.results.report.html import GENERATOR, render_page
from cnnrun.training.run_records import REPORT, read_result


def write_report(
    run_paths: Sequence[Path], runs: Path, device: torch.device, split: str = "val", out: Path | None = None
) -> dict[str, Any]:
    """Write the report on one run, or on several side by side; returns its path and size.

    The default path is report.html in the run's folder, or in `runs` for several. An earlier report there is replaced.
    The default split is val, so that test is not looked at by accident. Raises CheckpointError, ConfigError,
    StorageError.
    """
    paths: Sequence[Path | None] = run_paths or [None]
    folder = out.parent if out else runs if len(paths) > 1 else None
    if folder and not folder.is_dir():
        if out:
            raise ConfigError(f"--out {escape(str(out))}: no such folder: {escape(str(folder))}")
        raise ConfigError(f"--runs {escape(str(folder))}: no such folder; give --out")
    reported_runs = [_measure_for_report(path, runs, device, split) for path in paths]
    specs: dict[str, Any] = {}
    comparison = _comparison_section(reported_runs, specs) if len(reported_runs) > 1 else None
    sections = [
        run_section(reported, f"run{number}", specs, len(reported_runs))
        for number, reported in enumerate(reported_runs, 1)
    ]
    names = [reported.measured.name for reported in reported_runs]
    subtitles = [
        f"{reported.measured.experiment.task.kind}, {reported.measured.experiment.name}" for reported in reported_runs
    ]
    page = {
        "title": ", ".join(names) if len(names) < 4 else f"{len(names)} runs",
        "subtitle": " · ".join(dict.fromkeys(subtitles)),
        "runs": sections,
        "comparison": comparison,
    }
    out_path = out or (reported_runs[0].measured.trained.run if len(reported_runs) == 1 else runs) / REPORT
    html = render_page(page, specs)
    write_new_file(out_path, html, own_mark=GENERATOR.encode())
    return {"path": str(out_path), "runs": names, "split": split, "bytes": len(html)}


def report_after_training(run: Path, runs: Path, device: torch.device, *, overwrite: bool = True) -> None:
    """Write the report of a run whose training has ended; without `overwrite`, only if it has none yet.

    A failure is printed and never fails the training.
    """
    if not overwrite and (run / REPORT).exists():
        return
    try:
        say(f"{write_report([run], runs, device)['path']}: the report of this run; open it in a browser")
    except InterruptionError:
        raise
    except Exception as error:
        reason = escape(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        say(f"{run / REPORT} was not written: {reason}; `cnnrun report {run}` tries again")


def _measure_for_report(path: Path | None, runs: Path, device: torch.device, split: str) -> ReportedRun:
    """Measure a run on the split, and name the layers of its network."""
    measured = measure_run(path, runs, device, split)
    return ReportedRun(measured, ExplainedNetwork(measured.trained, measured.experiment.model.layers))


def _comparison_section(reported_runs: Sequence[ReportedRun], specs: dict[str, Any]) -> dict[str, Any]:
    """Section that compares several runs: metrics, settings that differ from the first run's, and common curves."""
    names = list(dict.fromkeys(name for reported in reported_runs for name in reported.measured.measurement.metrics))
    rows = []
    for reported in reported_runs:
        measured = reported.measured
        metrics, intervals = measured.measurement.metrics, measured.intervals
        cells = [_format_with_interval(metrics[name], intervals.get(name)) if name in metrics else "" for name in names]
        result = read_result(measured.trained.run) or {}
        parameter_count = reported.subject.built_network.parameter_count
        rows.append(
            [
                measured.name,
                *cells,
                f"{parameter_count:,}",
                format_duration(result["seconds"]) if result else "unfinished",
            ]
        )
    first = reported_runs[0].measured
    differences = [
        line
        for other in reported_runs[1:]
        for line in describe_differences(first.experiment, other.measured.experiment, first.name, other.measured.name)
    ]
    plots = training_curves([(reported.measured.name, reported.measured.trained.run) for reported in reported_runs])
    chart_items = [add_chart(f"comparison-chart{number}", plot, specs) for number, plot in enumerate(plots)]
    columns = ["run", *names, "parameters", "training time"]
    return {"columns": columns, "rows": rows, "differences": differences, "charts": chart_items}


def _format_with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
