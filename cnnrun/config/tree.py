"""The tree of a YAML file: mappings and lists that store the position of every key and value, and problems in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Position:
    """Line and column (from 1) in the file `origin`, or a command-line argument `origin` (line 0)."""

    origin: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}:{self.column}" if self.line else self.origin


class Map(dict[str, Any]):
    """A mapping that stores the positions of its keys and values.

    `display_name` replaces the name of its first key in messages. It is the block's name in an expanded block, and
    empty if cnnrun inserted the key and the user never wrote it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_positions: dict[str, Position] = {}
        self.positions: dict[str, Position] = {}
        self.display_name: str | None = None

    def put(self, key: str, value: object, key_position: Position, position: Position) -> None:
        """Set a key together with its position and that of its value."""
        self[key] = value
        self.key_positions[key] = key_position
        self.positions[key] = position


def update_names(tree: Map, old_keys: dict[str, str], old_values: dict[str, dict[str, str]]) -> list[str]:
    """Replace, in place, old keys by new ones and old words by new words; returns a warning with a position for each.

    An old key beside the new one stays, and is then refused as unknown.
    """
    warnings = []
    for old, new in old_keys.items():
        if old in tree and new not in tree:
            position, value_position = tree.key_positions.pop(old), tree.positions.pop(old)
            tree.put(new, tree.pop(old), position, value_position)
            warnings.append(f"{position}: `{old}` is now called `{new}`; the old name works for one more version")
    for key, words in old_values.items():
        if isinstance(word := tree.get(key), str) and word in words:
            tree[key] = new = words[word]
            warnings.append(
                f"{tree.positions[key]}: `{key}: {word}` is now `{key}: {new}`; the old word works for one more version"
            )
    return warnings


class Seq(list[Any]):
    """A list that stores the positions of its items."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[Position] = []

    def append_at(self, value: object, position: Position) -> None:
        """Append an item together with its position."""
        self.append(value)
        self.positions.append(position)


@dataclass(frozen=True)
class Problem:
    """One mistake: its position, its path in the file, and a message that says what is wrong and what to do."""

    position: Position
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.position}: {self.path}: {self.message}" if self.path else f"{self.position}: {self.message}"


def path_text(tree: object, path: KeyPath) -> str:
    """Text of a path, such as model[2].conv.out_channels; an expanded block appears under its own name."""
    text, node = "", tree
    for key in path:
        name: str | int = key
        if isinstance(node, Map) and node.display_name is not None and key == next(iter(node), None):
            name = node.display_name
        if name != "":
            text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else name
        node = _child(node, key)
    return text


def find_position(tree: object, path: KeyPath, position: Position, *, at_key: bool = False) -> Position:
    """Position of the value at `path`, or of its key with `at_key`.

    If the path does not exist in full, returns the position of the deepest part that does; `position` is the root's.
    """
    node = tree
    for depth, key in enumerate(path):
        use_key = at_key and depth == len(path) - 1
        if isinstance(node, Map) and key in node:
            position = node.key_positions[str(key)] if use_key else node.positions[str(key)]
        elif isinstance(node, Seq) and isinstance(key, int) and key < len(node):
            position = node.positions[key]
        else:
            return position
        node = _child(node, key)
    return position


def copy_tree(value: Any) -> Any:
    """Deep copy of a tree with its positions."""
    if isinstance(value, Map):
        mapping = Map()
        mapping.display_name = value.display_name
        for key, item in value.items():
            mapping.put(key, copy_tree(item), value.key_positions[key], value.positions[key])
        return mapping
    if isinstance(value, Seq):
        items = Seq()
        for item, position in zip(value, value.positions, strict=True):
            items.append_at(copy_tree(item), position)
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
    """Placeholder for a value with a reported problem, so that it is not reported again."""

    name: str = "invalid value"


INVALID = InvalidValue()
