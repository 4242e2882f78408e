"""The YAML's tree: mappings and lists that remember where everything stands, and the mistakes found in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Position:
    """A place: a file's line and column (from 1), or a command-line argument (line 0)."""

    where: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.where}:{self.line}:{self.column}" if self.line else self.where


class Map(dict[str, Any]):
    """A mapping that knows where its keys and values stand. `alias` is what messages call its first key.

    A block's name where the block was expanded, nothing where the key was put in and the user never wrote it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_positions: dict[str, Position] = {}
        self.positions: dict[str, Position] = {}
        self.display_name: str | None = None

    def put(self, key: str, value: object, key_mark: Position, mark: Position) -> None:
        self[key] = value
        self.key_positions[key] = key_mark
        self.positions[key] = mark


class Seq(list[Any]):
    """A list that knows where its items stand."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[Position] = []

    def put(self, value: object, mark: Position) -> None:
        self.append(value)
        self.positions.append(mark)


@dataclass(frozen=True)
class Problem:
    """One mistake: where, at which path of the file, what, and what to do about it."""

    position: Position
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.position}: {self.path}: {self.message}" if self.path else f"{self.position}: {self.message}"


def path_text(tree: object, path: KeyPath) -> str:
    """`path` as the user reads it: model[2].conv.out_channels; blocks appear under their own name."""
    text, node = "", tree
    for key in path:
        shown: str | int = key
        if isinstance(node, Map) and node.display_name is not None and key == next(iter(node), None):
            shown = node.display_name
        if shown != "":
            text += f"[{shown}]" if isinstance(shown, int) else f".{shown}" if text else shown
        node = _child(node, key)
    return text


def find_position(tree: object, path: KeyPath, mark: Position, *, at_key: bool = False) -> Position:
    """Where the value at `path` stands (or its key), or the nearest enclosing place that the tree knows."""
    node = tree
    for depth, key in enumerate(path):
        last = at_key and depth == len(path) - 1
        if isinstance(node, Map) and key in node:
            mark = node.key_positions[str(key)] if last else node.positions[str(key)]
        elif isinstance(node, Seq) and isinstance(key, int) and key < len(node):
            mark = node.positions[key]
        else:
            return mark
        node = _child(node, key)
    return mark


def copy_tree(value: Any) -> Any:
    """A deep copy that keeps the marks."""
    if isinstance(value, Map):
        made = Map()
        made.display_name = value.display_name
        for key, item in value.items():
            made.put(key, copy_tree(item), value.key_positions[key], value.positions[key])
        return made
    if isinstance(value, Seq):
        items = Seq()
        for item, mark in zip(value, value.positions, strict=True):
            items.put(copy_tree(item), mark)
        return items
    return value


def _child(node: object, key: str | int) -> object:
    if isinstance(node, Map):
        return node.get(str(key))
    if isinstance(node, Seq) and isinstance(key, int) and key < len(node):
        return node[key]
    return None


@dataclass(frozen=True)
class InvalidValue:
    """Stands where a value was already complained about, so that it is not complained about twice."""

    name: str = "doubtful value"


INVALID = InvalidValue()
