"""`cnnrun eval`: measure a trained network on a split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Run, Runs, SplitName, show
from cnnrun.commands.tables import format_metric


def evaluate(
    run: Run = None,
    split: SplitName = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write figures, such as the reliability diagram, to this folder.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Measure what `predict --fast` would predict, computed in bfloat16.")
    ] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure a trained network on a split. Example: cnnrun eval runs/digits/1 --split val"""
    from cnnrun.base.device import choose_device
    from cnnrun.results.evaluate import evaluate_run

    show(evaluate_run(run, runs, choose_device(device), split, plots, fast), as_json, print_evaluation)


def print_evaluation(data: dict[str, Any], out: Output) -> None:
    """Print the metrics, their confidence intervals, then the tables."""
    from cnnrun.results.report import class_tables

    samples = f"split {data['split']}, {format_count(data['samples'], 'image')}"
    precision = f", computed in {data['precision']}" if "precision" in data else ""
    out.print(f"{data['run']}, checkpoint of step {data['step']:,}: {samples}{precision}")
    metrics, intervals = data["numbers"], data["intervals"]
    out.print("  ".join(f"{name} {format_metric(value)}" for name, value in metrics.items() if name not in intervals))
    if None in metrics.values():
        out.print(f"n/a: undefined, because {data['split']} has nothing to measure it on")
    rows = [[name, f"{metrics[name]:.4f}", f"{low:.4f}", f"{high:.4f}"] for name, (low, high) in intervals.items()]
    if rows:
        out.print(build_table(["metric", "value", "from", "to (95 %)"], rows))
    for name, rows in data["tables"].items():
        class_tables.show_rows(out, name, rows)
    for name, matrix in data["matrices"].items():
        class_tables.show_matrix(out, name, matrix, data["tables"].get("per_class", []))
    for path in data.get("plots", ()):
        out.print(escape(path))
