"""`cnnrun data`: what is in a config's data, and its division."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import ConfigError, escape
from cnnrun.commands.options import Config, Json, Overrides, show
from cnnrun.commands.renamed import Command
from cnnrun.commands.tables import MOST_ROWS, print_findings, width_height

data_app = typer.Typer(help="Look at a config's data, and divide it.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    config: Config,
    overrides: Overrides = None,
    verify: Annotated[Path | None, typer.Option(help="A manifest that the files must agree with.")] = None,
    write_manifest: Annotated[Path | None, typer.Option(help="Write a manifest: SHA-256 of every file.")] = None,
    as_json: Json = False,
) -> None:
    """Report what is in the data and what is wrong; leave as training would. Example: cnnrun data check c.yaml"""
    from cnnrun.experiment.config_file import read_config
    from cnnrun.experiment.data_check import check_data, refuse_unfit

    report = check_data(read_config(config, overrides or []), verify, write_manifest)
    show(report, as_json, _print_audit)
    refuse_unfit(report)


@data_app.command("show", cls=Command)
def data_show(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("data.png"),
    images: Annotated[int, typer.Option(min=1, max=200, help="How many images, a row each.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, max=20, help="How many epochs of augmentation to show.")] = 6,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder to write the sheet to for TensorBoard.")] = None,
    as_json: Json = False,
) -> None:
    """Draw images as they are and as training sees them. Example: cnnrun data show c.yaml --out sheet.png"""
    from cnnrun.experiment.config_file import read_config
    from cnnrun.explain.augmentation_sheet import write_augmentation_sheet

    sheet = write_augmentation_sheet(read_config(config, overrides or []), images, epochs, out, tensorboard)
    show(sheet, as_json, _print_sheet)


@data_app.command("split")
def data_split(
    config: Config,
    overrides: Overrides = None,
    val: Annotated[float, typer.Option(min=0, max=0.9, help="The share of the training images for val.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="The share of the images for test.")] = 0.2,
    folds: Annotated[
        int, typer.Option(min=0, max=100, help="Make this many folds for cross-validation instead of val.")
    ] = 0,
    group_by: Annotated[
        str | None,
        typer.Option(help="A pattern; images whose paths have the same match stay together, such as '(patient\\d+)'."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the division.")] = 0,
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("split.csv"),
    as_json: Json = False,
) -> None:
    """Divide images, stratified, into a table for `source: table`. Example: cnnrun data split c.yaml --folds 5"""
    from cnnrun.data.split_table import Shares, write_split_table
    from cnnrun.experiment.config_file import read_config

    if folds == 1 or val + test >= 1:
        raise ConfigError("give two folds or more, and leave something to train on: --val and --test below 1 together")
    shares = Shares(val, test, folds, group_by, seed)
    show(write_split_table(read_config(config, overrides or []).data, shares, out), as_json, _print_split)


def _print_audit(data: dict[str, Any], out: Output) -> None:
    """Print what a data set holds and what is wrong with it."""
    splits = list(data["pictures"])
    out.print(f"{data['name']}: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    sizes = data["sizes"]
    shown = "  ".join(f"{name} {width_height(sizes[name])}" for name in ("smallest", "median", "largest"))
    out.print(f"width x height: {shown}, {sizes['distinct']:,} different")
    for name in ("formats", "modes"):
        out.print(f"{name}: " + "  ".join(f"{key} {count:,}" for key, count in data[name].items()))
    for name in ("mean", "std"):
        out.print(f"{name} of train: " + " ".join(f"{value:.2f}" for value in data[name]))
    names = list(data["classes"][splits[0]])
    rows = [[name, *(f"{data['classes'][split].get(name, 0):,}" for split in splits)] for name in names[:MOST_ROWS]]
    out.print(build_table(["class", *splits], rows))
    if len(names) > MOST_ROWS:
        out.print(f"... and {len(names) - MOST_ROWS:,} more classes (--json has them all)")
    for what, found in data.get("differences", {}).items():
        for name in found[:MOST_ROWS]:
            out.print(f"manifest: {what}: {name}")
        if len(found) > MOST_ROWS:
            out.print(f"manifest: {what}: and {len(found) - MOST_ROWS:,} more (--json has them all)")
    if data["findings"] or not data["refused"]:  # what is refused is the error that follows
        print_findings(data["findings"], out)


def _print_sheet(data: dict[str, Any], out: Output) -> None:
    """Print where the contact sheet is."""
    out.print(f"{escape(data['path'])}: {data['pictures']} pictures, {data['times']} times augmented")


def _print_split(data: dict[str, Any], out: Output) -> None:
    """Print what a table of splits says, and how a config uses it."""
    for column, counts in data["columns"].items():
        out.print(f"{column}: " + "  ".join(f"{name} {count:,}" for name, count in counts.items() if count))
    if data["groups"]:
        out.print(f"{data['groups']:,} groups, each in one split")
    split = "" if "split" in data["columns"] else f", split: {next(iter(data['columns']))}"
    settings = f"path: {data['path']}, root: {data['root']}{split}"
    out.print(escape(f"use it:  source: {{table: {{{settings}}}}}"))
