"""The commands about data: look at it, divide it, begin with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Config, Json, Overrides, show

data_app = typer.Typer(help="Look at a config's data, and divide it.", no_args_is_help=True)
cache_app = typer.Typer(help="Decoded pictures that are kept on the disk.", no_args_is_help=True)

CacheDir = Annotated[str | None, typer.Option("--dir", help="The folder; by default cnnrun's under the user's cache.")]


@data_app.command("check")
def data_check(
    config: Config,
    overrides: Overrides = None,
    verify: Annotated[Path | None, typer.Option(help="A manifest that the files must agree with.")] = None,
    write_manifest: Annotated[Path | None, typer.Option(help="Write a manifest: SHA-256 of every file.")] = None,
    as_json: Json = False,
) -> None:
    """What is in the data, and what is wrong; leaves as training would. Example: cnnrun data check c.yaml"""
    from cnnrun.commands import data_work, report
    from cnnrun.experiment.schema import load

    found = data_work.checked(load(config, overrides or []), verify, write_manifest)
    show(found, as_json, report.audit)
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
    from cnnrun.commands import data_work, report
    from cnnrun.experiment.schema import load

    made = data_work.shown(load(config, overrides or []), pictures, epochs, out, tensorboard)
    show(made, as_json, report.sheet)


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
    from cnnrun.base.errors import ConfigError
    from cnnrun.commands import data_work, report
    from cnnrun.experiment.schema import load

    if folds == 1 or val + test >= 1:
        raise ConfigError("give two folds or more, and leave something to train on: --val and --test below 1 together")
    parts = data_work.Parts(val, test, folds, group_by, seed)
    show(data_work.divided(load(config, overrides or []), parts, out), as_json, report.division)


@cache_app.command("list")
def cache_list(folder: CacheDir = None, as_json: Json = False) -> None:
    """Data sets decoded so far, the one used last first. Example: cnnrun cache list"""
    from cnnrun.commands import data_work, report

    show(data_work.cached(folder), as_json, report.cached)


@cache_app.command("clear")
def cache_clear(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin, from `cnnrun cache list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all.")] = False,
    folder: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Remove decoded pictures; they are decoded again when needed. Example: cnnrun cache clear --all"""
    from cnnrun.commands import data_work, report

    show(data_work.cleared(folder, keys or [], everything), as_json, report.cleared)


def init(
    data: Annotated[str, typer.Argument(help="A folder, a table, a .npz file, tar shards, or `digits`.")],
    task: Annotated[str, typer.Option(help="What the network is for.")] = "classify",
    out: Annotated[Path | None, typer.Option(help="The config to write; by default named after the data.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the training may take on this machine.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Look at data and write a config that trains well on it. Example: cnnrun init photos/ --out photos.yaml"""
    from cnnrun.commands import report
    from cnnrun.experiment import init_config

    show(init_config.start(data, task, out, minutes), as_json, report.started)
