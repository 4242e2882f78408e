"""`cnnrun kinds` and `cnnrun schema`: the kinds and settings of the YAML."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.commands.options import Json, show


def kinds(
    word: Annotated[
        str | None,
        typer.Argument(
            help="A family (layers, tasks ...), a section (train ...) or a kind (conv, sgd ...).", metavar="WORD"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the kinds of a config, or the settings of one. Example: cnnrun kinds conv"""
    from cnnrun.commands import kinds as vocabulary

    show(vocabulary.describe_word(word), as_json, _print_kinds)


def schema() -> None:
    """Print the JSON Schema of a config, for editors. Example: cnnrun schema > cnnrun.schema.json"""
    from cnnrun.commands import kinds as vocabulary

    typer.echo(json.dumps(vocabulary.json_schema(), indent=1))


def _print_kinds(data: dict[str, Any], out: Output) -> None:
    """Print families with their kinds, or one kind with its settings."""
    for family, entries in data.items():
        out.print(f"{family}:")
        for entry in entries:
            out.print(f"  {entry['kind']:<20} {entry['help']}")
            if len(entries) == 1:
                for setting in entry["settings"]:
                    default = "required" if setting["required"] else f"default {setting['default']}"
                    out.print(f"      {setting['name']:<18} {default}. {setting['help']}")
