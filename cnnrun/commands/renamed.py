"""Old names of options and commands, which still work and print their new names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

OPTIONS = {"--picture": "--image", "--pictures": "--images", "--target": "--class", "--map": "--match"}
COMMANDS = {"found": "detections"}


class Command(TyperCommand):
    """A command that also accepts the old names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, _replace_old_options(args, {name for parameter in self.params for name in parameter.opts})
        )


class Group(TyperGroup):
    """A group that also accepts the old names of its commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, [_new_name(args[0], COMMANDS, self.commands), *args[1:]])


def _replace_old_options(args: list[str], known: Iterable[str]) -> list[str]:
    """Replace old option names in the arguments before `--`, which ends the options."""
    end = args.index("--") if "--" in args else len(args)
    replaced = []
    for argument in args[:end]:
        name, equals, value = argument.partition("=")
        replaced.append(_new_name(name, OPTIONS, known) + equals + value)
    return replaced + args[end:]


def _new_name(name: str, table: dict[str, str], known: Iterable[str]) -> str:
    """Return, and print, the new name of a renamed option or command; return any other name unchanged."""
    new = table.get(name)
    if new is None or new not in known:
        return name
    from cnnrun.base.progress import say

    say(f"{name} is now called {new}")
    return new
