"""Reader of a strict subset of YAML 1.2 that keeps the position of every key and value.

The subset has words, numbers, lists, mappings, comments and anchors. Values that YAML readers disagree about (`010`,
`1:30`, `yes`) are refused with their position. Size, depth and number of values are limited, so that no file can hang
or crash the program.
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
MAX_INT_DIGITS = 19  # the digits of 2**63 - 1


def read_yaml(path: Path) -> tuple[Map, list[Problem]]:
    """Read the mapping in a file, and the problems that did not stop the reading. Raises ConfigError."""
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, origin: str) -> tuple[Map, list[Problem]]:
    """Read the mapping in `text`; `origin` names it in messages. Raises ConfigError if it is not valid YAML."""
    value, position, problems = parse_value(text, origin)
    if value is None:
        raise ConfigError(f"{origin}:1:1: the config is empty")
    if not isinstance(value, Map):
        raise ConfigError(f"{position}: expected a mapping of sections (task:, data:, model:, train:)")
    return value, problems


def parse_value(text: str, origin: str, fixed_position: Position | None = None) -> tuple[Any, Position, list[Problem]]:
    """Read any value in `text`; returns it with its position and the problems in it. Raises ConfigError.

    With `fixed_position`, that of a command-line argument, everything has this position.
    """
    composer = _Composer(origin, fixed_position)
    try:
        return *composer.compose(yaml.parse(text, Loader=yaml.SafeLoader)), composer.problems
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{composer.position(error.problem_mark)}: {_syntax_message(error, text)}") from None
    except yaml.reader.ReaderError as error:
        position = fixed_position or _end_position(origin, text[: error.position])
        raise ConfigError(f"{position}: character {error.character!r} is not allowed in YAML") from None
    except (ValueError, OverflowError):  # PyYAML converts an escape such as "\U00110000" without checking it
        escape = re.search(r"\\U(?!000|0010)[0-9a-fA-F]{8}", text)
        position = fixed_position or _end_position(origin, text[: escape.start()] if escape else "")
        raise ConfigError(f"{position}: {_BAD_ESCAPE}") from None


def _read_text(path: Path) -> str:
    data = read_bytes(path, ConfigError, MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = _end_position(str(path), data[: error.start].decode("utf-8"))
        raise ConfigError(f"{position}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _end_position(origin: str, text: str) -> Position:
    """Position of the character after `text`."""
    return Position(origin, text.count("\n") + 1, len(text) - text.rfind("\n"))


def _syntax_message(error: yaml.MarkedYAMLError, text: str) -> str:
    """Message for a syntax error that says what to do."""
    problem = error.problem or "not valid YAML"
    position = error.problem_mark
    lines = text.split("\n")
    if position and position.line < len(lines) and "\t" in lines[position.line][: position.column + 1]:
        return "a tab; indent with spaces"
    if problem.startswith("expected ',' or"):
        start = f" since line {error.context_mark.line + 1}" if error.context_mark else ""
        return f"{problem.split(', but')[0]} (is a bracket or a comma missing{start}?)"
    if "mapping values are not allowed" in problem:
        return "a second `: ` on this line; put the value on a line of its own, or quote it"
    return problem + (f" ({error.context})" if error.context else "")


_BAD_ESCAPE = "an escape in quotes is not a valid character"
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_AMBIGUOUS = [
    (re.compile(r"[-+]?0[0-9_]+"), "a leading zero means octal to some YAML readers; write it without, or quote it"),
    (
        re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?"),
        "some YAML readers read this in base 60; quote it if it is text",
    ),
    (re.compile(r"[-+]?[0-9][0-9_.]*_[0-9_.eE+-]*"), "write the number without underscores, or quote it"),
    (re.compile(r"[-+]?0[xXoObB][0-9a-fA-F_]+"), "write the number in decimal, or quote it"),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), "must be a finite number"),
    (re.compile(r"(?i)yes|no|on|off"), "write `true` or `false`, or quote it if it is a word"),
    (re.compile(r"True|TRUE|False|FALSE"), "write `true` or `false`"),
]


class _Composer:
    """Builds Maps and Seqs from PyYAML's events one by one, and checks every limit before it builds a value."""

    def __init__(self, origin: str, fixed_position: Position | None) -> None:
        self._origin = origin
        self._fixed_position = fixed_position
        self.problems: list[Problem] = []
        self._anchors: dict[str, tuple[Any, int, int] | None] = {}  # value, nodes and depth; None while it is read
        self._nodes = 0

    def position(self, mark: Any) -> Position:
        """Position of a mark of PyYAML, which counts from 0; the start of the text for None."""
        if self._fixed_position:
            return self._fixed_position
        return Position(self._origin, mark.line + 1, mark.column + 1) if mark else Position(self._origin, 1, 1)

    def compose(self, events: Iterator[Any]) -> tuple[Any, Position]:
        """Build the value of the only document and return it with its position; None if there is no document."""
        next(events)  # stream start
        event = next(events)
        if isinstance(event, yaml.StreamEndEvent):
            return None, self.position(None)
        event = next(events)
        value = self._compose_value(event, events, ())
        next(events)  # document end
        end = next(events)
        if not isinstance(end, yaml.StreamEndEvent):
            raise ConfigError(f"{self.position(end.start_mark)}: a second document; one file holds one config")
        return value, self.position(event.start_mark)

    def _compose_value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        """Build the value that begins with `event`, and store it under its anchor."""
        position = self.position(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._resolve_alias(event, position, path)
        if event.tag is not None and event.tag != "!":
            raise ConfigError(f"{position}: tag {event.tag!r}: YAML tags are not allowed")
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{position}: nested deeper than {MAX_DEPTH} levels")
        self._count_nodes(1, position)
        if isinstance(event, yaml.ScalarEvent) and not is_encodable(event.value):
            raise ConfigError(f"{position}: {_BAD_ESCAPE}")
        nodes_before = self._nodes
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._read_scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._compose_sequence(events, path)
        else:
            value = self._compose_mapping(events, path)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._nodes - nodes_before + 1, _depth(value))
        return value

    def _count_nodes(self, nodes: int, position: Position) -> None:
        """Add to the number of values. Raises ConfigError if there are too many."""
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{position}: more than {MAX_NODES:,} values (aliases counted as what they stand for)")

    def _resolve_alias(self, event: Any, position: Position, path: KeyPath) -> Any:
        """Copy the value of an anchor. Raises ConfigError if the copy would be too deep, or one too many."""
        if event.anchor not in self._anchors:
            raise ConfigError(f"{position}: alias *{event.anchor} has no anchor before it")
        anchor = self._anchors[event.anchor]
        if anchor is None:
            raise ConfigError(f"{position}: alias *{event.anchor} contains itself")
        value, nodes, depth = anchor
        self._count_nodes(nodes, position)
        if len(path) + depth > MAX_DEPTH:
            raise ConfigError(f"{position}: nested deeper than {MAX_DEPTH} levels")
        return copy_tree(value)

    def _compose_sequence(self, events: Iterator[Any], path: KeyPath) -> Seq:
        sequence = Seq()
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            sequence.append_at(
                self._compose_value(event, events, (*path, len(sequence))), self.position(event.start_mark)
            )
        return sequence

    def _compose_mapping(self, events: Iterator[Any], path: KeyPath) -> Map:
        """Build a mapping. Keys of `<<` are added last, because the mapping's own keys override them."""
        mapping = Map()
        merged: list[tuple[Any, Position]] = []
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key_position = self.position(event.start_mark)
            key = self._read_key(event, key_position)
            item = next(events)
            value, position = self._compose_value(item, events, (*path, key)), self.position(item.start_mark)
            if key == "<<" and not event.style:
                merged.append((value, key_position))
            elif key in mapping:
                first = mapping.key_positions[key]
                self._add_problem(key_position, (*path, key), f"{key!r} appears twice (first at line {first.line})")
            else:
                mapping.put(key, value, key_position, position)
        for value, position in merged:
            _merge(mapping, value, position)
        return mapping

    def _read_key(self, event: Any, position: Position) -> str:
        """Read a key. Raises ConfigError unless it is a word."""
        if not isinstance(event, yaml.ScalarEvent):
            raise ConfigError(f"{position}: a key must be a word")
        if event.tag is not None or event.anchor:
            raise ConfigError(f"{position}: a key cannot have a tag or an anchor")
        self._count_nodes(1, position)
        if not event.style and (event.value in ("", "~", "null", "true", "false") or _FLOAT.fullmatch(event.value)):
            raise ConfigError(f"{position}: key {event.value!r} must be a word; quote it if it is one")
        return str(event.value)

    def _read_scalar(self, event: Any, path: KeyPath) -> Any:
        """Read a word or number; INVALID, with a problem, for what YAML readers disagree about."""
        text, position = event.value, self.position(event.start_mark)
        if event.style or event.tag == "!":
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _INT.fullmatch(text):
            if len(text) <= MAX_INT_DIGITS:
                return int(text)
            message = f"{text[:12]}... has {len(text)} digits; the largest has {MAX_INT_DIGITS}"
            return self._add_problem(position, path, message)
        if _FLOAT.fullmatch(text):
            number = float(text) if len(text) < 400 else float("inf")
            if abs(number) == float("inf"):
                return self._add_problem(position, path, f"{text[:40]} is too large")
            return number
        for pattern, advice in _AMBIGUOUS:
            if pattern.fullmatch(text):
                return self._add_problem(position, path, f"{text!r}: {advice}")
        return text

    def _add_problem(self, position: Position, path: KeyPath, message: str) -> InvalidValue:
        """Record a problem, and return the placeholder for its value."""
        self.problems.append(Problem(position, path_text(None, path), message))
        return INVALID


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, Map) else value if isinstance(value, Seq) else ()
    return 1 + max(map(_depth, children), default=0)


class _Dumper(yaml.SafeDumper):
    """Writer that quotes every text which this module would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    reserved_patterns = [_INT, _FLOAT, *(pattern for pattern, _ in _AMBIGUOUS)]
    is_reserved = text in ("", "~", "null", "true", "false") or any(p.fullmatch(text) for p in reserved_patterns)
    is_plain = text.isprintable() and not is_reserved
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_flow(data: Any) -> str:
    """Write plain data as YAML in one line."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=9999
    ).strip()


def _merge(mapping: Map, value: Any, position: Position) -> None:
    """Apply YAML's `<<`: add the keys of `value`, a mapping or a list of them, that `mapping` does not have."""
    for source in value if isinstance(value, Seq) else [value]:
        if not isinstance(source, Map):
            raise ConfigError(f"{position}: `<<` takes a mapping or a list of mappings")
        for key, item in source.items():
            if key not in mapping:
                mapping.put(key, item, source.key_positions[key], source.positions[key])
