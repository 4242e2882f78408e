"""`cnnrun diagram`: draw the network as text or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Overrides


def diagram(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write an SVG file instead of printing text.")] = None,
) -> None:
    """Draw the network's layers, blocks, connections and shapes. Example: cnnrun diagram c.yaml --out c.svg"""
    from cnnrun.experiment.config_file import read_config

    experiment = read_config(config, overrides or [])
    from cnnrun.base.atomic_files import write_text
    from cnnrun.experiment.checks import build_config_outline
    from cnnrun.explain.figures.network_svg import render_svg
    from cnnrun.model import outline

    parts = build_config_outline(experiment)
    if out is None:
        typer.echo(outline.format_outline(parts))
    else:
        drawing = render_svg(parts, experiment.name)
        write_text(out, drawing)
        typer.echo(f"{escape(str(out))}: {len(drawing):,} bytes")
