"""`cnnrun report`: what was trained, how well it does, where it fails and what it sees, in one page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import write_new
from cnnrun.base.errors import ConfigError, Interrupted, UserError, printable
from cnnrun.base.progress import say
from cnnrun.experiment.config_differences import told_apart
from cnnrun.experiment.open_run import measured
from cnnrun.explain.subject import Subject
from cnnrun.results.report.content import Seen, chart, curves, portrait
from cnnrun.results.report.html import BY, rendered
from cnnrun.training.run_records import REPORT, read_result


def report(
    targets: Sequence[Path], root: Path, device: torch.device, split: str = "val", out: Path | None = None
) -> dict[str, Any]:
    """Write the page about one run, or about several side by side; returns where it is.

    By default report.html in the run, of several beside the runs; one of ours that is there is replaced. Measured on
    val, so that test stays unseen until it is asked for. Raises CheckpointError, ConfigError, StorageError.
    """
    wanted: Sequence[Path | None] = targets or [None]
    folder = out.parent if out else root if len(wanted) > 1 else None
    if folder and not folder.is_dir():
        raise ConfigError(f"{printable(str(folder))}: no such folder for the report; give --out")
    seen = [_seen(target, root, device, split) for target in wanted]
    specs: dict[str, Any] = {}
    together = _together(seen, specs) if len(seen) > 1 else None
    pages = [portrait(each, f"run{number}", specs, len(seen)) for number, each in enumerate(seen, 1)]
    names = ", ".join(str(each.run) for each in seen)
    page = {
        "title": names if len(seen) < 4 else f"{len(seen)} runs",
        "subtitle": " · ".join(dict.fromkeys(f"{each.experiment.task.kind}, {each.experiment.name}" for each in seen)),
        "runs": pages,
        "together": together,
    }
    path = out or (seen[0].run if len(seen) == 1 else root) / REPORT
    data = rendered(page, specs)
    write_new(path, data, mine=BY.encode())
    return {"path": str(path), "runs": [str(each.run) for each in seen], "split": split, "bytes": len(data)}


def after(run: Path, root: Path, device: torch.device, *, anew: bool = True) -> None:
    """Write the page of a run whose training has ended; unless `anew`, only where there is none yet.

    Whatever keeps it from being written is said, and costs the page alone.
    """
    if not anew and (run / REPORT).exists():
        return
    try:
        say(f"{report([run], root, device)['path']}: the run as a page for a browser")
    except Interrupted:
        raise
    except Exception as error:
        why = printable(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        say(f"{run / REPORT} was not written: {why}; `cnnrun report {run}` tries again")


def _seen(target: Path | None, root: Path, device: torch.device, split: str) -> Seen:
    experiment, given, name, examples, found = measured(target, root, device, split)
    return Seen(given.run, experiment, Subject(given, experiment.model.layers), name, examples, found)


def _together(seen: Sequence[Seen], specs: dict[str, Any]) -> dict[str, Any]:
    """Several runs side by side: numbers, what differs from the first, their curves in the same figures."""
    names = list(dict.fromkeys(name for each in seen for name in each.measured.numbers))
    rows = []
    for each in seen:
        spans = each.spans
        numbers = each.measured.numbers
        cells = [_with_span(numbers[name], spans.get(name)) if name in numbers else "" for name in names]
        done = read_result(each.run) or {}
        rows.append([str(each.run), *cells, f"{each.subject.built.parameters:,}", f"{done.get('seconds', 0):,.0f}"])
    first = seen[0]
    differences = [
        line
        for other in seen[1:]
        for line in told_apart(first.experiment, other.experiment, str(first.run), str(other.run))
    ]
    plots = curves([(str(each.run), each.run) for each in seen])
    made = [chart(f"together-chart{number}", plot, specs) for number, plot in enumerate(plots)]
    columns = ["run", *names, "parameters", "seconds"]
    return {"columns": columns, "rows": rows, "differences": differences, "charts": made}


def _with_span(value: float | None, span: tuple[float, float] | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" + (f" ({span[0]:.4f} to {span[1]:.4f})" if span else "")
