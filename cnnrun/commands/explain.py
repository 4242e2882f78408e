"""`cnnrun explain`: one command per method, with options built from the method's settings, and `ablate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Run, Runs, SplitName, show
from cnnrun.commands.renamed import Command, Group

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_MAX_ROWS = 40  # rows of a method's table that are printed


class _MethodGroup(Group):
    """The group of commands, built when it is first used, because importing the methods would slow `cnnrun --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not self.commands:
            self.commands.update(_build_commands())
        return super().parse_args(ctx, args)


explain_app = typer.Typer(
    help="Visualize what a trained network responds to. Figures are written to RUN/explain.",
    no_args_is_help=True,
    cls=_MethodGroup,
)


@explain_app.callback()
def _explain() -> None:
    """Do nothing, since Typer needs a command or a callback to make a group."""


def _build_commands() -> dict[str, Any]:
    """Build the commands, by name, in the order of the methods' union."""
    from cnnrun.config.spec import union_members
    from cnnrun.explain.methods import Method

    app = typer.Typer(rich_markup_mode=None)
    for method in union_members(Method):
        app.command(method.kind, cls=Command)(_build_function(method))
    app.command("ablate", cls=Command)(ablate)
    group: Any = typer.main.get_group(app)
    return dict(group.commands)


def _build_function(method: Any) -> Callable[..., None]:
    """Build a function whose parameters Typer turns into options.

    They are the run, the method's own settings, the settings that methods share, and the common options.
    """
    from cnnrun.explain.method_base import ImageMethod

    def explain(run: Path | None, out: Path | None, device: str, runs: Path, as_json: bool, **values: Any) -> None:
        from cnnrun.base.device import choose_device
        from cnnrun.explain.run_method import explain_run

        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        settings = {name: value for name, value in settings.items() if value is not None}
        show(explain_run(method(**settings), run, runs, choose_device(device), out), as_json, _print_explanation)

    fields = sorted(method.model_fields.items(), key=lambda item: item[0] in ImageMethod.model_fields)
    parameters = [
        _parameter("run", Run, None),
        *(_setting_parameter(name, field) for name, field in fields),
        _parameter("out", Annotated[Path | None, typer.Option(help=method.out)], None),
        _parameter("device", Device, "auto"),
        _parameter("runs", Runs, Path("runs")),
        _parameter("as_json", Json, False),
    ]
    function: Any = explain
    function.__doc__ = method.__doc__
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return explain


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _setting_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Turn a setting into a parameter for Typer; the option of a tuple may be repeated."""
    from cnnrun.explain.method_base import OptionName

    kind, default, limits = field.annotation, field.default, field.metadata
    option = "--" + next((item.name for item in limits if isinstance(item, OptionName)), name)
    if bool in (kind, *get_args(kind)):
        option += f"/--no-{name}"
    if get_origin(kind) is tuple:
        element, *_ = get_args(kind)
        limits = [limit for part in getattr(element, "__metadata__", ()) for limit in part.metadata]
        kind, default = list[get_args(element)[0] if limits else element] | None, None  # type: ignore[misc, assignment]
    bounds = {
        key: getattr(limit, name)
        for limit in limits
        for name, key in (("ge", "min"), ("le", "max"))
        if hasattr(limit, name)
    }
    return _parameter(name, Annotated[kind, typer.Option(option, help=field.description, **bounds)], default)


def ablate(
    run: Run = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Layers to leave out, joined by commas; repeat for more variants.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option(help="Settings to change (KEY.PATH=VALUE), joined by commas; needs --retrain.")
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train each variant from scratch.")] = False,
    split: SplitName = None,
    out: Annotated[Path | None, typer.Option(help="The PNG file to write; by default in RUN/explain.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure the network without layers, or with other settings. Example: cnnrun explain ablate --remove model[3]"""
    from cnnrun.base.device import choose_device
    from cnnrun.explain.run import open_run
    from cnnrun.results.studies import ablate as ablation

    opened = open_run(run, runs, choose_device(device))
    show(ablation.run_ablation(opened, remove or [], change or [], retrain, split, out), as_json, _print_explanation)


def _print_explanation(data: dict[str, Any], out: Output) -> None:
    """Print the method's table if it has one, its result in one line, and the paths of its files."""
    rows = data[data["table"]] if data["table"] else []
    if rows:
        printed = [row for row in rows if isinstance(row, dict)][:_MAX_ROWS]
        names = [name for row in printed for name, value in row.items() if not isinstance(value, list | dict)]
        columns = list(dict.fromkeys(names))
        out.print(build_table(columns, [[_cell(row.get(name, "")) for name in columns] for row in printed]))
        if len(rows) > len(printed):
            out.print(f"and {len(rows) - len(printed):,} more (--json has them all)")
    out.print(escape(data["caption"]))
    for key in ("path", "features"):
        if key in data:
            out.print(escape(data[key]))


def _cell(value: object) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
