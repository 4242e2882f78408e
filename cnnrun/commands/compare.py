"""`cnnrun compare`: differences of trained networks, with statistical tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Plots, Runs, SplitName, refuse_ranks, show


def compare(
    paths: Annotated[
        list[Path], typer.Argument(help="Runs, checkpoints or configs; each is compared with the first.", metavar="RUN")
    ],
    split: SplitName = None,
    plots: Plots = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also compare unfinished runs, by their newest checkpoints.")
    ] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare trained networks, and test whether they differ. Example: cnnrun compare runs/digits/1 runs/digits/2"""
    refuse_ranks("compare")
    from cnnrun.base.device import choose_device
    from cnnrun.results.compare import compare_runs

    comparison = compare_runs(paths, runs, choose_device(device), split, plots, unfinished)
    show(comparison, as_json, _print_comparison)


def _print_comparison(data: dict[str, Any], out: Output) -> None:
    """Print for each pair what differs in config and data, and a row for each metric with its test."""
    out.print(f"on {format_count(data['samples'], 'image')} of {data['split']}")
    for row in data["runs"]:
        if progress := row["unfinished"]:
            position = f"step {progress['step']:,} of {progress['steps']:,}"
            out.print(
                f"{escape(row['run'])} is unfinished ({position}): its checkpoint of step {row['step']:,} is compared"
            )
    for pair in data["pairs"]:
        first, second = map(escape, pair["runs"])
        out.print(f"{first} and {second}")
        for line in pair["config"] or ["the configs are the same"]:
            out.print(f"  {line}")
        for line in pair["data"]:
            out.print(f"  different data: {escape(line)}")
        if pair["unpaired"]:
            out.print(f"  not tested, because they were measured on different data: {pair['unpaired']}")
            continue
        out.print(_tests_table(pair["tests"]))
        out.print(_verdict(pair))
    for path in data.get("plots", ()):
        out.print(escape(path))


def _tests_table(tests: list[dict[str, Any]]) -> Any:
    rows = [
        [
            row["number"],
            f"{row['first']:.4f}",
            f"{row['other']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['from']:+.4f}",
            f"{row['to']:+.4f}",
            f"{row['p']:.3g}",
            row["test"],
            "differs" if row["distinguishable"] else "",
        ]
        for row in tests
    ]
    return build_table(["metric", "first", "second", "difference", "from", "to (95 %)", "p", "test", ""], rows)


def _verdict(pair: dict[str, Any]) -> str:
    if not pair["tests"]:
        return "not tested: too few images for a confidence interval of any metric"
    if not pair["distinguishable"]:
        return "not distinguishable on these images"
    names = ", ".join(pair["distinguishable"])
    if pair["same_config"]:
        return f"distinguishable by {names}; their configs are the same, so the trainings differ"
    return f"distinguishable by {names}; to test whether the configs are the cause, train several seeds (train --seeds)"
