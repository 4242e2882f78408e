"""`cnnrun data`: what is in a config's data, and its division."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.base.errors import ConfigError
from cnnrun.commands.options import Config, Json, Overrides, show

data_app = typer.Typer(help="Look at a config's data, and divide it.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    config: Config,
    overrides: Overrides = None,
    verify: Annotated[Path | None, typer.Option(help="A manifest that the files must agree with.")] = None,
    write_manifest: Annotated[Path | None, typer.Option(help="Write a manifest: SHA-256 of every file.")] = None,
    as_json: Json = False,
) -> None:
    """What is in the data, and what is wrong; leaves as training would. Example: cnnrun data check c.yaml"""
    from cnnrun.commands import data_work, tables
    from cnnrun.experiment.schema import load

    found = data_work.checked(load(config, overrides or []), verify, write_manifest)
    show(found, as_json, tables.audit)
    data_work.refuse(found)


@data_app.command("show")
def data_show(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("data.png"),
    pictures: Annotated[int, typer.Option(min=1, max=200, help="How many pictures, a row each.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, max=20, help="How often each is augmented.")] = 6,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder to write the sheet to for TensorBoard.")] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures as they are and as training sees them. Example: cnnrun data show c.yaml --out sheet.png"""
    from cnnrun.commands import data_work, tables
    from cnnrun.experiment.schema import load

    made = data_work.shown(load(config, overrides or []), pictures, epochs, out, tensorboard)
    show(made, as_json, tables.sheet)


@data_app.command("split")
def data_split(
    config: Config,
    overrides: Overrides = None,
    val: Annotated[float, typer.Option(min=0, max=0.9, help="The part of the training pictures that chooses.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="The part that is reported.")] = 0.2,
    folds: Annotated[int, typer.Option(min=0, max=100, help="k folds for cross-validation in the place of val.")] = 0,
    group_by: Annotated[
        str | None, typer.Option(help="A pattern for paths: what it finds stays on one side, such as '(patient\\d+)'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed divides otherwise.")] = 0,
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("split.csv"),
    as_json: Json = False,
) -> None:
    """Divide pictures, stratified, into a table for `source: table`. Example: cnnrun data split c.yaml --folds 5"""
    from cnnrun.commands import data_work, tables
    from cnnrun.experiment.schema import load

    if folds == 1 or val + test >= 1:
        raise ConfigError("give two folds or more, and leave something to train on: --val and --test below 1 together")
    parts = data_work.Parts(val, test, folds, group_by, seed)
    show(data_work.divided(load(config, overrides or []), parts, out), as_json, tables.division)
