"""YAML as plain data that remembers where everything stands.

A strict subset of YAML 1.2: words, numbers, lists, mappings, comments, anchors. Everything that YAML would read as
something other than what it looks like (`010`, `1:30`, `yes`) is refused with its position instead of guessed at,
and the input is bounded in size, depth and nodes, so that no file can hang or crash the program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import ConfigError, is_encodable
from cnnrun.config.tree import INVALID, InvalidValue, KeyPath, Map, Position, Problem, Seq, copy_tree, path_text

# PyYAML scans about 100 kB/s; a hand-written file is a few kB, and a bad one should be answered within a second.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 50_000
MAX_INT_DIGITS = 19  # as many as 2**63 - 1 has


def read_yaml(path: Path) -> tuple[Map, list[Problem]]:
    """The mapping in the file at `path`, with the mistakes that do not stop the reading. Raises ConfigError."""
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, where: str) -> tuple[Map, list[Problem]]:
    """The mapping written in `text`; `where` names it in messages. Raises ConfigError when it is not YAML."""
    value, mark, problems = parse_value(text, where)
    if value is None:
        raise ConfigError(f"{where}:1:1: the config is empty")
    if not isinstance(value, Map):
        raise ConfigError(f"{mark}: expected a mapping of sections (task:, data:, model:, train:)")
    return value, problems


def parse_value(text: str, where: str, fixed: Position | None = None) -> tuple[Any, Position, list[Problem]]:
    """Any value written in `text`. With `fixed`, every position is that one (a command-line argument)."""
    composer = _Composer(where, fixed)
    try:
        return *composer.document(yaml.parse(text, Loader=yaml.SafeLoader)), composer.problems
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{composer.mark(error.problem_mark)}: {_syntax(error, text)}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = fixed or Position(where, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise ConfigError(f"{mark}: character {error.character!r} cannot stand in YAML") from None
    except (ValueError, OverflowError):  # PyYAML turns an escape such as "\U00110000" into a character unchecked
        raise ConfigError(f"{fixed or Position(where, 1, 1)}: an escape in quotes stands for no character") from None


def _read_text(path: Path) -> str:
    data = read_bytes(path, ConfigError, MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        mark = Position(str(path), before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise ConfigError(f"{mark}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """PyYAML's complaint in words that say what to do."""
    what = error.problem or "not valid YAML"
    mark = error.problem_mark
    lines = text.split("\n")
    if mark and mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
        return "a tab; indent with spaces"
    if what.startswith("expected ',' or"):
        opened = f" since line {error.context_mark.line + 1}" if error.context_mark else ""
        return f"{what.split(', but')[0]} (is a bracket or a comma missing{opened}?)"
    if "mapping values are not allowed" in what:
        return "a second `: ` on this line; put the value on a line of its own, or quote it"
    return what + (f" ({error.context})" if error.context else "")


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DOUBTFUL = [
    (re.compile(r"[-+]?0[0-9_]+"), "a leading zero means octal to some YAML readers; write it without, or quote it"),
    (
        re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?"),
        "base 60 to some YAML readers; quote it if it is text",
    ),
    (re.compile(r"[-+]?[0-9][0-9_.]*_[0-9_.eE+-]*"), "write the number without underscores, or quote it"),
    (re.compile(r"[-+]?0[xXoObB][0-9a-fA-F_]+"), "write the number in decimal, or quote it"),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), "must be a finite number"),
    (re.compile(r"(?i)yes|no|on|off"), "only `true` and `false` are truth values; quote it if it is a word"),
    (re.compile(r"True|TRUE|False|FALSE"), "write `true` or `false`"),
]


class _Composer:
    """Builds Maps and Seqs from PyYAML's events, which come one by one: nothing is built before it was bounded."""

    def __init__(self, where: str, fixed: Position | None) -> None:
        self.where = where
        self.fixed = fixed
        self.problems: list[Problem] = []
        self._anchors: dict[str, tuple[Any, int, int] | None] = {}
        self._nodes = 0

    def mark(self, at: Any) -> Position:
        if self.fixed:
            return self.fixed
        return Position(self.where, at.line + 1, at.column + 1) if at else Position(self.where, 1, 1)

    def document(self, events: Iterator[Any]) -> tuple[Any, Position]:
        next(events)  # stream start
        event = next(events)
        if isinstance(event, yaml.StreamEndEvent):
            return None, self.mark(None)
        event = next(events)
        value = self._value(event, events, ())
        next(events)  # document end
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise ConfigError(f"{self.mark(after.start_mark)}: a second document; one file holds one config")
        return value, self.mark(event.start_mark)

    def _value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        mark = self.mark(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, mark, path)
        if event.tag is not None and event.tag != "!":
            raise ConfigError(f"{mark}: tag {event.tag!r}: YAML tags are not allowed")
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{mark}: nested deeper than {MAX_DEPTH} levels")
        self._count(1, mark)
        if isinstance(event, yaml.ScalarEvent) and not is_encodable(event.value):
            raise ConfigError(f"{mark}: an escape in quotes stands for no character")
        before = self._nodes
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(events, path)
        else:
            value = self._mapping(events, path)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._nodes - before + 1, _depth(value))
        return value

    def _count(self, nodes: int, mark: Position) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{mark}: more than {MAX_NODES} values (aliases counted as what they stand for)")

    def _alias(self, event: Any, mark: Position, path: KeyPath) -> Any:
        if event.anchor not in self._anchors:
            raise ConfigError(f"{mark}: alias *{event.anchor} has no anchor before it")
        known = self._anchors[event.anchor]
        if known is None:
            raise ConfigError(f"{mark}: alias *{event.anchor} contains itself")
        self._count(known[1], mark)
        if len(path) + known[2] > MAX_DEPTH:
            raise ConfigError(f"{mark}: nested deeper than {MAX_DEPTH} levels")
        return copy_tree(known[0])

    def _sequence(self, events: Iterator[Any], path: KeyPath) -> Seq:
        made = Seq()
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            made.put(self._value(event, events, (*path, len(made))), self.mark(event.start_mark))
        return made

    def _mapping(self, events: Iterator[Any], path: KeyPath) -> Map:
        made = Map()
        merged: list[tuple[Any, Position]] = []
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key_mark = self.mark(event.start_mark)
            key = self._key(event, key_mark)
            item = next(events)
            value, mark = self._value(item, events, (*path, key)), self.mark(item.start_mark)
            if key == "<<" and not event.style:
                merged.append((value, key_mark))
            elif key in made:
                first = made.key_positions[key]
                self._problem(key_mark, (*path, key), f"{key!r} stands twice (first at line {first.line})")
            else:
                made.put(key, value, key_mark, mark)
        for value, mark in merged:
            _merge(made, value, mark)
        return made

    def _key(self, event: Any, mark: Position) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise ConfigError(f"{mark}: a key must be a word")
        if event.tag is not None or event.anchor:
            raise ConfigError(f"{mark}: a key carries neither a tag nor an anchor")
        self._count(1, mark)
        if not event.style and (event.value in ("", "~", "null", "true", "false") or _FLOAT.fullmatch(event.value)):
            raise ConfigError(f"{mark}: key {event.value!r} must be a word; quote it if it is one")
        return str(event.value)

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        text, mark = event.value, self.mark(event.start_mark)
        if event.style or event.tag == "!":
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _INT.fullmatch(text):
            if len(text) <= MAX_INT_DIGITS:
                return int(text)
            return self._problem(mark, path, f"{text[:12]}... has {len(text)} digits; the largest has {MAX_INT_DIGITS}")
        if _FLOAT.fullmatch(text):
            number = float(text) if len(text) < 400 else float("inf")
            return number if abs(number) != float("inf") else self._problem(mark, path, f"{text[:40]} is too large")
        for pattern, advice in _DOUBTFUL:
            if pattern.fullmatch(text):
                return self._problem(mark, path, f"{text!r}: {advice}")
        return text

    def _problem(self, mark: Position, path: KeyPath, message: str) -> InvalidValue:
        self.problems.append(Problem(mark, path_text(None, path), message))
        return INVALID


def _depth(value: Any) -> int:
    inside = value.values() if isinstance(value, Map) else value if isinstance(value, Seq) else ()
    return 1 + max(map(_depth, inside), default=0)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that this module's reader would take for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    taken = [_INT, _FLOAT, *(pattern for pattern, _ in _DOUBTFUL)]
    taken_words = ("", "~", "null", "true", "false")
    plain = text.isprintable() and text not in taken_words and not any(p.fullmatch(text) for p in taken)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_flow(data: Any) -> str:
    """`dump_yaml` in one line."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=9999
    ).strip()


def _merge(made: Map, value: Any, mark: Position) -> None:
    """YAML's `<<`: keys of `value` (a mapping or a list of them) that `made` does not have itself."""
    for source in value if isinstance(value, Seq) else [value]:
        if not isinstance(source, Map):
            raise ConfigError(f"{mark}: `<<` takes a mapping or a list of mappings")
        for key, item in source.items():
            if key not in made:
                made.put(key, item, source.key_positions[key], source.positions[key])
