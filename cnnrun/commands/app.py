"""The command line: all commands by name. Commands import what they need when they run, so --help needs no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from cnnrun import __version__
from cnnrun.base import torchrun
from cnnrun.base.errors import UserError
from cnnrun.base.process_settings import collect_garbage_rarely, keep_freed_memory, limit_spinning
from cnnrun.base.signals import exit_on_signals
from cnnrun.base.standard_streams import standard_streams
from cnnrun.commands.cache import cache_app
from cnnrun.commands.calibrate import calibrate
from cnnrun.commands.check import check
from cnnrun.commands.compare import compare
from cnnrun.commands.data import data_app
from cnnrun.commands.diagram import diagram
from cnnrun.commands.enroll import enroll
from cnnrun.commands.evaluate import evaluate
from cnnrun.commands.exits import describe_failure, exit_with_lines
from cnnrun.commands.explain import explain_app
from cnnrun.commands.export import export_app
from cnnrun.commands.faces import faces
from cnnrun.commands.find_lr import find_lr
from cnnrun.commands.identify import identify
from cnnrun.commands.import_weights import import_weights
from cnnrun.commands.init import init
from cnnrun.commands.plan import plan
from cnnrun.commands.predict import predict
from cnnrun.commands.renamed import Command
from cnnrun.commands.report import report
from cnnrun.commands.schema import kinds, schema
from cnnrun.commands.selftest import selftest
from cnnrun.commands.summary import summary
from cnnrun.commands.sweep import sweep
from cnnrun.commands.train import train
from cnnrun.commands.verify import verify
from cnnrun.commands.zoo import zoo_app

app = typer.Typer(
    name="cnnrun",
    help="Train, evaluate and export convolutional networks that are described in YAML.",
    epilog="Start: cnnrun train configs/digits.yaml   Then: cnnrun eval, cnnrun predict IMAGES, cnnrun export onnx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# `cnnrun --help` lists the commands in this order.
COMMANDS: dict[str, typer.Typer | Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "init": init,
    "faces": faces,
    "verify": verify,
    "enroll": enroll,
    "identify": identify,
    "calibrate": calibrate,
    "compare": compare,
    "sweep": sweep,
    "plan": plan,
    "find-lr": find_lr,
    "report": report,
    "import": import_weights,
    "check": check,
    "summary": summary,
    "diagram": diagram,
    "selftest": selftest,
    "kinds": kinds,
    "schema": schema,
    "explain": explain_app,
    "data": data_app,
    "cache": cache_app,
    "zoo": zoo_app,
    "export": export_app,
}
for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name, cls=Command)(command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cnnrun {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Allow data sources to download from URLs and to run `pipe:` commands.")
    ] = False,
) -> None:
    """Apply the options that precede the command."""
    # data.sources.shards reads this variable, in this process and its children, until the command ends.
    if fetch:
        previous = os.environ.get("CNNRUN_FETCH", "0")
        os.environ["CNNRUN_FETCH"] = "1"
        context.call_on_close(lambda: os.environ.update(CNNRUN_FETCH=previous))
    torchrun.check_environment()


def main() -> None:
    """Run the command line. A user's mistake ends with its lines on stderr and its exit code, never a traceback."""
    limit_spinning()
    keep_freed_memory()
    collect_garbage_rarely()
    with standard_streams():
        try:
            with exit_on_signals():
                try:
                    app()
                finally:
                    sys.stdout.flush()
        except UserError as error:
            exit_with_lines(error, error.lines, error.exit_code)
        except Exception as error:
            exit_with_lines(error, *describe_failure(error))
