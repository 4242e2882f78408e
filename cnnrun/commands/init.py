"""`cnnrun init`: write a config for a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import escape
from cnnrun.commands.options import Json, show
from cnnrun.commands.tables import print_findings, width_height


def init(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder, a table, annotations, a .npz file, tar shards, `digits` or `digit_scenes`.", metavar="DATA"
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="classify, multilabel, regress, verify, detect or segment; by default what the data says."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The column to learn in a table, or several, with commas between them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The config to write; by default it is named after the data.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1e5, help="Time that the training may take on this machine, in minutes.")
    ] = 10.0,
    weights: Annotated[
        Path | None,
        typer.Option(help="Published weights to start from; by default those that `cnnrun zoo weights` has fetched."),
    ] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Start from random weights.")] = False,
    as_json: Json = False,
) -> None:
    """Inspect data and write a config that suits it. Example: cnnrun init photos/ --out photos.yaml"""
    from cnnrun.base.errors import ConfigError
    from cnnrun.experiment.init.config_writer import write_config
    from cnnrun.experiment.init.reading import Request

    if weights and from_scratch:
        raise ConfigError("--weights and --from-scratch contradict each other; give one of them")
    request = Request(task, [name.strip() for name in label.split(",")] if label else None)
    show(write_config(data, request, out, minutes, weights, from_scratch), as_json, _print_config)


def _print_config(data: dict[str, Any], out: Output) -> None:
    """Print what is in the data, the chosen settings, and the next command."""
    out.print("images: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    if counts := data["classes"]["train"]:
        rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        extremes = " to ".join(f"{counts[name]:,} ({escape(name)})" for name in (rarest, commonest))
        out.print(f"{format_count(len(counts), 'class', 'classes')} in train: {extremes}")
    sizes = data["sizes"]
    out.print(f"image sizes: {width_height(sizes['smallest'])} to {width_height(sizes['largest'])} pixels")
    print_findings(data["findings"], out, error="left out")
    height, width = data["size"]
    training = f"batch {data['batch']}, {format_count(data['epochs'], 'epoch')}"
    duration = f"about {format_duration(60 * data['minutes'])} here ({data['images_per_second']:,} images/s measured)"
    out.print(f"chosen: {width}x{height}x{data['channels']}, {data['parameters']:,} parameters, {training}: {duration}")
    if data["weights"]:
        learns = "of which only a new head learns" if data["frozen"] else "all of which learn"
        out.print(f"from the weights in {escape(data['weights'])}, {learns}")
    path = escape(data["path"])
    out.print(f"wrote {path}; next: cnnrun train {path}")
