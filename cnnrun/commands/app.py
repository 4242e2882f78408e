"""The command line. Each command is short: machinery is imported inside, so that --help needs no torch."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cnnrun import __version__
from cnnrun.base import torchrun
from cnnrun.base.errors import UserError, printable
from cnnrun.base.signals import leaving
from cnnrun.base.standard_streams import standard_streams
from cnnrun.commands.data import cache_app, data_app, init
from cnnrun.commands.exits import leave, of_a_bug
from cnnrun.commands.explain import explain_app
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, SplitName, Target, show
from cnnrun.commands.people import enroll, identify, verify
from cnnrun.commands.study import calibrate, compare, find_lr, page, plan, sweep


class Mapping(StrEnum):
    """How `import` matches tensors."""

    order = "order"
    name = "name"


app = typer.Typer(
    name="cnnrun",
    help="Train, evaluate and ship convolutional networks that are written down as YAML.",
    epilog="Start: cnnrun train configs/digits.yaml   Then: cnnrun eval, cnnrun predict PICTURES, cnnrun export onnx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume this config's newest unfinished run; complete a finished one."),
    ] = False,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="So, but only if the result is that of an uninterrupted run.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Train so many seeds, a run each; sum them up.")
    ] = None,
    page: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the run at the end.")
    ] = True,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a network. Example: cnnrun train configs/digits.yaml train.epochs=3"""
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    # Imported only now: a bad config should be answered sooner.
    from cnnrun.commands import report, report_study
    from cnnrun.results import operations
    from cnnrun.results.report import write as reporting
    from cnnrun.results.studies.seeds import train as train_seeds

    keep_freed_memory()
    if seeds:
        summary = train_seeds(experiment, seeds, runs, chosen, resume or strict_resume, strict_resume, page)
        show(summary, as_json, report_study.seeds)
        return
    result = operations.train(experiment, runs, chosen, resume or strict_resume, strict_resume)
    if page and not torchrun.rank():
        reporting.after(Path(result["run"]), runs, chosen, anew="already_finished" not in result)
    show(result, as_json, report.training)


@app.command("eval")
def evaluate(
    target: Target = None,
    split: SplitName = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for figures, such as the reliability diagram.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure a trained network on a split. Example: cnnrun eval runs/digits/1 --split val"""
    from cnnrun.base.device import choose
    from cnnrun.commands import report
    from cnnrun.results import operations

    result = operations.evaluate(target, runs, choose(device), split, plots)
    show(result, as_json, report.evaluation)


@app.command()
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Picture files and folders.")],
    run: Annotated[
        Path | None, typer.Option(help="A run, a checkpoint, a config or a weights file; by default the newest run.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    score: Annotated[
        list[str] | None, typer.Option(help="Show objects from this score: 0.4 for all, or cat=0.6 for a class.")
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="A folder for the pictures with what was found drawn on.")] = None,
    coco: Annotated[
        Path | None, typer.Option(help="A file for what is shown, in COCO's results format; with --score 0 for all.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Results for pictures, one line each, as they come. Example: cnnrun predict photos/ --json"""
    from cnnrun.base.device import choose
    from cnnrun.commands import prediction_output
    from cnnrun.results import operations

    found = operations.predicted(run, runs, choose(device), paths, batch, score or [], draw, coco)
    prediction_output.write_all(found, as_json, csv)


for command in (init, verify, enroll, identify, calibrate, compare, sweep, plan):
    app.command()(command)
app.command("find-lr")(find_lr)
app.command("report")(page)
app.add_typer(explain_app, name="explain")
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")

zoo_app = typer.Typer(help="Networks that are shipped as YAML.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """Every network with its parameters and multiply-adds. Example: cnnrun zoo list"""
    from dataclasses import asdict

    from cnnrun.commands import report
    from cnnrun.config import zoo

    show({"networks": [asdict(zoo.entry(name)) for name in zoo.names()]}, as_json, report.zoo)


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="One of `cnnrun zoo list`.")]) -> None:
    """A network's file, to copy and change. Example: cnnrun zoo show resnet18 > mine.yaml"""
    from cnnrun.config import zoo

    typer.echo(zoo.text(name), nl=False)


@zoo_app.command("blocks")
def zoo_blocks() -> None:
    """The blocks that every config may use. Example: cnnrun zoo blocks"""
    from cnnrun.config.blocks import SHIPPED

    typer.echo(SHIPPED.read_text(), nl=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A state dict: .pth, .pt or .safetensors.")],
    like: Annotated[str, typer.Option(help="The network it is of: one of `cnnrun zoo list`, or a config.")],
    map_: Annotated[
        Mapping, typer.Option("--map", help="Tensors are matched by their order or by name.")
    ] = Mapping.order,
    classes: Annotated[str | None, typer.Option(help="A file with a class name a line, or `imagenet`.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Tensors to leave out, such as 'AuxLogits.*'.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default the network's name here.")] = None,
    as_json: Json = False,
) -> None:
    """PyTorch weights as a weights file. Example: cnnrun import resnet50.pth --like resnet50 --classes imagenet"""
    from cnnrun.commands import report
    from cnnrun.results import operations

    show(operations.imported(file, like, map_.value, classes, drop or [], out), as_json, report.imported)


export_app = typer.Typer(help="Write a trained network as a file for other programs.", no_args_is_help=True)
app.add_typer(export_app, name="export")


@export_app.command("onnx")
def export_onnx(
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default exports/model.onnx in the run.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """ONNX with pre-processing inside, compared with the network before it is kept. Example: cnnrun export onnx"""
    from cnnrun.commands import report
    from cnnrun.export.onnx import Onnx
    from cnnrun.results import operations

    show(operations.exported(Onnx(), target, runs, split, out), as_json, report.parity)


@export_app.command("code")
def export_code(
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default exports/model.py in the run.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """A Python file and its weights, which need torch alone. Example: cnnrun export code"""
    from cnnrun.commands import report
    from cnnrun.export.python_file import Code
    from cnnrun.results import operations

    show(operations.exported(Code(), target, runs, split, out), as_json, report.parity)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode the pictures, which training then finds done.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a config and its data as training would. Example: cnnrun check configs/digits.yaml"""
    from cnnrun.experiment.schema import load

    experiment = load(config, overrides or [])
    from cnnrun.commands import report
    from cnnrun.results import operations

    show(operations.checked(experiment, decode), as_json, report.checked)


@app.command()
def summary(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """The network, a row a layer: shape, parameters, FLOPs, memory, receptive field. Example: cnnrun summary c.yaml"""
    from cnnrun.experiment.schema import load

    experiment = load(config, overrides or [])
    from cnnrun.commands import report
    from cnnrun.results import operations

    show(operations.summary(experiment), as_json, report.summary)


@app.command()
def diagram(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="An SVG file to write; without, the diagram is printed as text.")
    ] = None,
) -> None:
    """Draw the network with blocks, links and shapes. Example: cnnrun diagram c.yaml --out c.svg"""
    from cnnrun.experiment.schema import load

    experiment = load(config, overrides or [])
    from cnnrun.base.atomic_files import write_text
    from cnnrun.results import operations

    text, svg = operations.diagram(experiment)
    if out is None:
        typer.echo(text)
    else:
        write_text(out, svg)
        typer.echo(f"{printable(str(out))}: {len(svg):,} bytes")


@app.command()
def selftest(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file; without, a small one of cnnrun's own.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Whether this machine trains a config as it must: repeats, resumes, learns. Example: cnnrun selftest c.yaml"""
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []) if config else None, choose(device)
    from cnnrun.commands import report
    from cnnrun.results.studies import selftest as tests

    keep_freed_memory()
    result = tests.selftest(experiment, chosen)
    show(result, as_json, report.selftest)
    tests.refuse(result)


@app.command()
def kinds(
    word: Annotated[str | None, typer.Argument(help="A family (layers, tasks ...) or a kind (conv, sgd ...).")] = None,
    as_json: Json = False,
) -> None:
    """What the YAML may say: every kind with its settings. Example: cnnrun kinds conv"""
    from cnnrun.commands import kinds as vocabulary
    from cnnrun.commands import report

    show(vocabulary.described(word), as_json, report.kinds)


@app.command()
def schema() -> None:
    """The JSON Schema of a config, for editors. Example: cnnrun schema > cnnrun.schema.json"""
    from cnnrun.commands import kinds as vocabulary

    typer.echo(json.dumps(vocabulary.json_schema(), indent=1))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnnrun {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Let data sources download from URLs and run `pipe:` commands.")
    ] = False,
) -> None:
    if fetch:  # where data.shards looks, here and in processes that this one starts, until the command ends
        before = os.environ.get("CNNRUN_FETCH", "0")
        os.environ["CNNRUN_FETCH"] = "1"
        context.call_on_close(lambda: os.environ.update(CNNRUN_FETCH=before))
    torchrun.check_environment()


def main() -> None:
    """Run the command line; a user's mistake is its lines on stderr and its exit code, never a traceback."""
    with standard_streams():
        try:
            with leaving():
                try:
                    app()
                finally:
                    sys.stdout.flush()
        except UserError as error:
            leave(error, error.lines, error.exit_code)
        except Exception as error:
            leave(error, *of_a_bug(error))
