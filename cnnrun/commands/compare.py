"""`cnnrun compare`: what trained networks differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Plots, Runs, SplitName, refuse_ranks, show


def compare(
    targets: Annotated[
        list[Path], typer.Argument(help="Runs, checkpoints or configs; each against the first.", metavar="RUN")
    ],
    split: SplitName = None,
    plots: Plots = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Compare runs whose training has not ended, by what they reached.")
    ] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare trained networks and test how they differ. Example: cnnrun compare runs/digits/1 runs/digits/2"""
    refuse_ranks("compare")
    from cnnrun.base.device import choose_device
    from cnnrun.results import compare as comparing

    made = comparing.compare_runs(targets, runs, choose_device(device), split, plots, unfinished)
    show(made, as_json, _print_comparison)


def _print_comparison(data: dict[str, Any], out: Output) -> None:
    """Print for each pair what differs in config and data, and a row for each number with its test."""
    out.print(f"on {data['samples']:,} pictures of {data['split']}")
    for row in data["runs"]:
        if reached := row["unfinished"]:
            how_far = f"step {reached['step']:,} of {reached['steps']:,}"
            out.print(
                f"{escape(row['run'])} is unfinished ({how_far}): its checkpoint of step {row['step']:,} is compared"
            )
    for pair in data["pairs"]:
        first, other = map(escape, pair["runs"])
        out.print(f"{first} and {other}")
        for line in pair["config"] or ["the configs are the same"]:
            out.print(f"  {line}")
        for line in pair["data"]:
            out.print(f"  other data: {escape(line)}")
        if pair["unpaired"]:
            out.print(f"  not tested, they were not measured on the same: {pair['unpaired']}")
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
    return build_table(["number", "first", "other", "difference", "from", "to (95 %)", "p", "test", ""], rows)


def _verdict(pair: dict[str, Any]) -> str:
    if not pair["tests"]:
        return "not tested: these pictures are too few for any number to say how far it would move"
    if not pair["distinguishable"]:
        return "not distinguishable on these pictures"
    names = ", ".join(pair["distinguishable"])
    if pair["same_config"]:
        return f"distinguishable by {names}: as trainings, for their config is the same"
    return f"distinguishable by {names}; whether by their configs, several seeds of each would tell (train --seeds)"
