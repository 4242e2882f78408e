"""`cnnrun report`: what was trained, how well it does, where it fails and what it sees, in one page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import write_new_file
from cnnrun.base.errors import ConfigError, InterruptionError, UserError, escape
from cnnrun.base.progress import say
from cnnrun.experiment.config_differences import describe_differences
from cnnrun.experiment.open_run import measure_run
from cnnrun.explain.subject import Subject
from cnnrun.results.report.content import ReportedRun, add_chart, run_section, training_curves
from cnnrun.results.report.html import GENERATOR, render_page
from cnnrun.training.run_records import REPORT, read_result


def write_report(
    targets: Sequence[Path], root: Path, device: torch.device, split: str = "val", out: Path | None = None
) -> dict[str, Any]:
    """Write the page about one run, or about several side by side; returns where it is.

    By default report.html in the run, of several beside the runs; one of ours that is there is replaced. Measured on
    val, so that test stays unseen until it is asked for. Raises CheckpointError, ConfigError, StorageError.
    """
    wanted: Sequence[Path | None] = targets or [None]
    folder = out.parent if out else root if len(wanted) > 1 else None
    if folder and not folder.is_dir():
        raise ConfigError(f"{escape(str(folder))}: no such folder for the report; give --out")
    seen = [_seen(target, root, device, split) for target in wanted]
    specs: dict[str, Any] = {}
    together = _together(seen, specs) if len(seen) > 1 else None
    pages = [run_section(each, f"run{number}", specs, len(seen)) for number, each in enumerate(seen, 1)]
    names = ", ".join(str(each.run) for each in seen)
    page = {
        "title": names if len(seen) < 4 else f"{len(seen)} runs",
        "subtitle": " · ".join(dict.fromkeys(f"{each.experiment.task.kind}, {each.experiment.name}" for each in seen)),
        "runs": pages,
        "together": together,
    }
    path = out or (seen[0].run if len(seen) == 1 else root) / REPORT
    data = render_page(page, specs)
    write_new_file(path, data, own_mark=GENERATOR.encode())
    return {"path": str(path), "runs": [str(each.run) for each in seen], "split": split, "bytes": len(data)}


def report_after_training(run: Path, root: Path, device: torch.device, *, overwrite: bool = True) -> None:
    """Write the page of a run whose training has ended; unless `anew`, only where there is none yet.

    Whatever keeps it from being written is said, and costs the page alone.
    """
    if not overwrite and (run / REPORT).exists():
        return
    try:
        say(f"{write_report([run], root, device)['path']}: the run as a page for a browser")
    except InterruptionError:
        raise
    except Exception as error:
        why = escape(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        say(f"{run / REPORT} was not written: {why}; `cnnrun report {run}` tries again")


def _seen(target: Path | None, root: Path, device: torch.device, split: str) -> ReportedRun:
    experiment, given, name, examples, found = measure_run(target, root, device, split)
    return ReportedRun(given.run, experiment, Subject(given, experiment.model.layers), name, examples, found)


def _together(seen: Sequence[ReportedRun], specs: dict[str, Any]) -> dict[str, Any]:
    """Several runs side by side: numbers, what differs from the first, their curves in the same figures."""
    names = list(dict.fromkeys(name for each in seen for name in each.measurement.metrics))
    rows = []
    for each in seen:
        spans = each.confidence_intervals
        numbers = each.measurement.metrics
        cells = [_with_span(numbers[name], spans.get(name)) if name in numbers else "" for name in names]
        done = read_result(each.run) or {}
        rows.append(
            [str(each.run), *cells, f"{each.subject.built_network.parameter_count:,}", f"{done.get('seconds', 0):,.0f}"]
        )
    first = seen[0]
    differences = [
        line
        for other in seen[1:]
        for line in describe_differences(first.experiment, other.experiment, str(first.run), str(other.run))
    ]
    plots = training_curves([(str(each.run), each.run) for each in seen])
    made = [add_chart(f"together-chart{number}", plot, specs) for number, plot in enumerate(plots)]
    columns = ["run", *names, "parameters", "seconds"]
    return {"columns": columns, "rows": rows, "differences": differences, "charts": made}


def _with_span(value: float | None, span: tuple[float, float] | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" + (f" ({span[0]:.4f} to {span[1]:.4f})" if span else "")
