"""`cnnrun data`: check, show and split a config's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, escape
from cnnrun.commands.options import Config, Json, Overrides, show
from cnnrun.commands.renamed import Command
from cnnrun.commands.tables import MAX_ROWS, print_findings, width_height

data_app = typer.Typer(help="Check, show and split a config's data.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    config: Config,
    overrides: Overrides = None,
    verify: Annotated[Path | None, typer.Option(help="Check the files against this manifest.")] = None,
    write_manifest: Annotated[
        Path | None, typer.Option(help="Write a manifest to this file: the SHA-256 of every data file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Report what is in the data and what is wrong with it. Example: cnnrun data check c.yaml"""
    from cnnrun.experiment.config_file import read_config
    from cnnrun.experiment.data_check import check_audit_passed, check_data

    audit = check_data(read_config(config, overrides or []), verify, write_manifest)
    show(audit, as_json, _print_audit)
    check_audit_passed(audit)


@data_app.command("show", cls=Command)
def data_show(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("data.png"),
    images: Annotated[int, typer.Option(min=1, max=200, help="Number of images, one per row.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, max=20, help="Number of epochs of augmentation to show.")] = 6,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write the sheet to this folder for TensorBoard.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw images before and after augmentation. Example: cnnrun data show c.yaml --out sheet.png"""
    from cnnrun.experiment.config_file import read_config
    from cnnrun.explain.augmentation_sheet import write_augmentation_sheet

    sheet = write_augmentation_sheet(read_config(config, overrides or []), images, epochs, out, tensorboard)
    show(sheet, as_json, _print_sheet)


@data_app.command("split")
def data_split(
    config: Config,
    overrides: Overrides = None,
    val: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction of the training images for val.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction of all images for test.")] = 0.2,
    folds: Annotated[
        int, typer.Option(min=0, max=100, help="Make this many cross-validation folds instead of val.")
    ] = 0,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Keep images in one split if this pattern matches the same text in their paths: '(patient\\d+)'."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random split.")] = 0,
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("split.csv"),
    as_json: Json = False,
) -> None:
    """Split images by class into a CSV file for `source: table`. Example: cnnrun data split c.yaml --folds 5"""
    from cnnrun.data.split_table import SplitTableSettings, write_split_table
    from cnnrun.experiment.config_file import read_config

    if folds == 1 or val + test >= 1:
        raise ConfigError("--folds must be 0 or at least 2, and --val and --test together below 1")
    shares = SplitTableSettings(val, test, folds, group_by, seed)
    show(write_split_table(read_config(config, overrides or []).data, shares, out), as_json, _print_split)


def _print_audit(data: dict[str, Any], out: Output) -> None:
    """Print the contents of a data set and its problems."""
    splits = list(data["pictures"])
    out.print(f"{data['name']}: " + "  ".join(f"{name} {count:,}" for name, count in data["pictures"].items()))
    sizes = data["sizes"]
    described = "  ".join(f"{name} {width_height(sizes[name])}" for name in ("smallest", "median", "largest"))
    out.print(f"width x height: {described}, {sizes['distinct']:,} different")
    for name in ("formats", "modes"):
        out.print(f"{name}: " + "  ".join(f"{key} {count:,}" for key, count in data[name].items()))
    for name in ("mean", "std"):
        out.print(f"{name} of train: " + " ".join(f"{value:.2f}" for value in data[name]))
    names = list(data["classes"][splits[0]])
    rows = [[name, *(f"{data['classes'][split].get(name, 0):,}" for split in splits)] for name in names[:MAX_ROWS]]
    out.print(build_table(["class", *splits], rows))
    if len(names) > MAX_ROWS:
        out.print(f"... and {len(names) - MAX_ROWS:,} more classes (--json has them all)")
    for kind, files in data.get("differences", {}).items():
        for name in files[:MAX_ROWS]:
            out.print(f"manifest: {kind}: {name}")
        if len(files) > MAX_ROWS:
            out.print(f"manifest: {kind}: and {len(files) - MAX_ROWS:,} more (--json has them all)")
    if data["findings"] or not data["refused"]:  # an error follows for refused data
        print_findings(data["findings"], out)


def _print_sheet(data: dict[str, Any], out: Output) -> None:
    """Print the path and the size of the contact sheet."""
    images, times = format_count(data["pictures"], "image"), format_count(data["times"], "time")
    out.print(f"{escape(data['path'])}: {images}, each augmented {times}")


def _print_split(data: dict[str, Any], out: Output) -> None:
    """Print the sizes of the splits, and the config line that uses the table."""
    for column, counts in data["columns"].items():
        out.print(f"{column}: " + "  ".join(f"{name} {count:,}" for name, count in counts.items() if count))
    if data["groups"]:
        out.print(f"{format_count(data['groups'], 'group')}, each in one split")
    split = "" if "split" in data["columns"] else f", split: {next(iter(data['columns']))}"
    settings = f"path: {data['path']}, root: {data['root']}{split}"
    out.print(escape(f"use it in a config:  source: {{table: {{{settings}}}}}"))
