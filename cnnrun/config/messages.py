"""Messages about mistakes in the YAML: their place, what is wrong, suggestions for unknown words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import (
    ValidationError,
)
from pydantic_core import PydanticCustomError

from cnnrun.config.tree import INVALID, KeyPath, Map, Position, Problem, find_position, path_text

_MANY = 16  # a longer list of words helps nobody who was shown the right one


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A suggestion to append to a message about an unknown word: the nearest one, then what is allowed."""
    words = list(known)
    near = nearest_suggestion(word, words)
    known = f" (known: {join_words(words)})"
    if len(words) > _MANY:
        known = "" if near else " (`cnnrun kinds` lists them all)"
    return near + known


def nearest_suggestion(word: object, known: Iterable[str]) -> str:
    """The nearest of the known words, as the end of a message; nothing where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def join_words(words: Iterable[str]) -> str:
    return ", ".join(words)


def format_value(value: Any) -> str:
    """A value of the YAML in a message, cut to one short line."""
    text = repr(dict(value)) if isinstance(value, Map) else repr(value)
    text = {"None": "nothing", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."


def validation_problems(error: ValidationError, tree: object, root: KeyPath, mark: Position) -> list[Problem]:
    """Pydantic's complaints as ours: with the place in the file, one line each, in the file's order.

    `tree` is the whole file, `root` the path of the part that was validated, `mark` where that part stands.
    """
    found: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        if item["type"] != "doubtful":
            path = (*root, *item["loc"])
            # Beyond what the file holds, the path names the branches of a union: one mistake, told once.
            known = path if item["type"] in ("missing", "unknown_key") else path[: _known(tree, path)]
            found.setdefault(known, []).append(item)
    problems = []
    for path, items in found.items():
        at = find_position(tree, path, mark, at_key=items[0]["type"] == "unknown_key")
        deepest = max(len(item["loc"]) for item in items)
        text = "; or ".join(dict.fromkeys(_message(item) for item in items if len(item["loc"]) == deepest))
        problems.append(Problem(at, path_text(tree, path), text))
    return problems


def _known(tree: object, path: KeyPath) -> int:
    """How many leading keys of `path` lead to something in `tree`."""
    node: Any = tree
    for depth, key in enumerate(path):
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(path)


def add_suggestions(error: ValidationError, keys: list[str]) -> ValidationError:
    """The same error, with the model's own keys suggested where a key is unknown, and doubtful values left out."""
    lines: list[Any] = []
    for item in error.errors(include_url=False):
        kind: Any = item["type"]
        context = item.get("ctx", {})
        if kind == "extra_forbidden" and len(item["loc"]) == 1:
            text = f"unknown key{did_you_mean(item['loc'][0], keys)}"
            kind, context = PydanticCustomError("unknown_key", "{text}", {"text": text}), {}
        elif item.get("input") is INVALID:
            kind, context = invalid_value_error(), {}
        elif set(context) == {"text"}:
            kind = PydanticCustomError(kind, "{text}", context)
        lines.append({"type": kind, "loc": item["loc"], "input": item["input"], "ctx": context})
    return ValidationError.from_exception_data(error.title, lines)


def invalid_value_error() -> PydanticCustomError:
    return PydanticCustomError("doubtful", "already reported")


_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list",
    "dict_type": "expected a mapping (key: value)",
    "model_type": "expected a mapping (key: value)",
    "model_attributes_type": "expected a mapping (key: value)",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
}


def _message(item: Any) -> str:
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    if kind == "missing":
        return "this setting is required"
    if kind == "too_short":
        return f"needs at least {context['min_length']} item(s), has {context['actual_length']}"
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{format_value(value)} is not one of the choices{did_you_mean(value, allowed)}"
    if kind == "string_pattern_mismatch":
        return f"{format_value(value)} must match {context['pattern']}"
    if value is None and kind in _EXPECTED:
        return f"{_EXPECTED[kind].format(**context)}; give a value or remove the line"
    if kind not in _EXPECTED:
        return str(item["msg"]).removeprefix("Value error, ")
    return f"{_EXPECTED[kind].format(**context)}; got {format_value(value)}{_quotes_hint(kind, value)}"


def _quotes_hint(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, int | float):
        return " (quote it if it is text)"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return " (remove the quotes)"
    return ""
