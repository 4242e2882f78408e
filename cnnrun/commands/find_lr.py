"""`cnnrun find-lr`: measure the loss over a range of learning rates."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Device, Json, Overrides, Plots, refuse_ranks, show


def find_lr(
    config: Config,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option(help="The lowest learning rate.")] = 1e-5,
    high: Annotated[float, typer.Option(help="The highest learning rate.")] = 10.0,
    steps: Annotated[
        int,
        typer.Option(
            min=10, max=100_000, help="Number of training steps from the lowest to the highest learning rate."
        ),
    ] = 100,
    plots: Plots = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the loss over learning rates; no run is written. Example: cnnrun find-lr c.yaml --plots figures"""
    refuse_ranks("find-lr")
    from cnnrun.base.device import choose_device
    from cnnrun.experiment.config_file import read_config

    experiment, torch_device = read_config(config, overrides or []), choose_device(device)
    from cnnrun.results.studies.find_lr import find_learning_rate

    show(find_learning_rate(experiment, torch_device, low, high, steps, plots), as_json, _print_range)


def _print_range(data: dict[str, Any], out: Output) -> None:
    """Print some of the learning rates with their losses, and the two usual choices."""
    rates = data["rates"]
    sampled = rates[:: max(1, len(rates) // 15)]
    out.print(build_table(["lr", "loss"], [[f"{row['lr']:.3g}", f"{row['smoothed']:.4f}"] for row in sampled]))
    if len(sampled) < len(rates):
        out.print(f"{len(sampled)} of {len(rates):,} steps (--json has them all)")
    if "steepest" in data:
        out.print(
            f"the loss falls fastest at {data['steepest']:.2g}; a tenth of the rate of the lowest loss is ", end=""
        )
        out.print(f"{data['lowest_tenth']:.2g}. The config has {data['now']:g} and was not changed.")
    else:
        out.print("the loss does not fall by more than its noise in this range; the config was not changed")
    for path in data.get("plots", ()):
        out.print(escape(path))
