"""`cnnrun kinds` and `schema`: what the YAML may say."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cnnrun.commands.options import Json, show


def kinds(
    word: Annotated[str | None, typer.Argument(help="A family (layers, tasks ...) or a kind (conv, sgd ...).")] = None,
    as_json: Json = False,
) -> None:
    """What the YAML may say: every kind with its settings. Example: cnnrun kinds conv"""
    from cnnrun.commands import kinds as vocabulary
    from cnnrun.commands import tables

    show(vocabulary.described(word), as_json, tables.kinds)


def schema() -> None:
    """The JSON Schema of a config, for editors. Example: cnnrun schema > cnnrun.schema.json"""
    from cnnrun.commands import kinds as vocabulary

    typer.echo(json.dumps(vocabulary.json_schema(), indent=1))
