"""Old spellings of options and commands, which still work and say what they are called now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

OPTIONS = {"--picture": "--image", "--pictures": "--images", "--target": "--class", "--map": "--match"}
COMMANDS = {"found": "detections"}


class Command(TyperCommand):
    """A command that takes its options under their old names as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_new_options(args, {name for each in self.params for name in each.opts}))


class Group(TyperGroup):
    """A group that takes its commands under their old names as well."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, [_new_name(args[0], COMMANDS, self.commands), *args[1:]])


def _with_new_options(args: list[str], known: Iterable[str]) -> list[str]:
    """The arguments with old option names replaced, up to `--`, after which nothing is an option."""
    end = args.index("--") if "--" in args else len(args)
    renamed = []
    for word in args[:end]:
        name, equals, value = word.partition("=")
        renamed.append(_new_name(name, OPTIONS, known) + equals + value)
    return renamed + args[end:]


def _new_name(name: str, table: dict[str, str], known: Iterable[str]) -> str:
    """The new name of an option or command that has one, said in a line; any other name as it is."""
    new = table.get(name)
    if new is None or new not in known:
        return name
    from cnnrun.base.progress import say

    say(f"{name} is now called {new}")
    return new
