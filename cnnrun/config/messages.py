"""Messages about mistakes in the YAML: position, problem, and suggestions for unknown words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from cnnrun.base.counts import format_count
from cnnrun.config.tree import INVALID, KeyPath, Map, Position, Problem, find_position, path_text

_MAX_KNOWN_WORDS = 16  # longer lists of choices are left out of a message


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """End of a message about an unknown word: the nearest known word, then the list of them if it is short."""
    known_words = list(known)
    suggestion = nearest_suggestion(word, known_words)
    if len(known_words) <= _MAX_KNOWN_WORDS:
        return f"{suggestion} (known: {', '.join(known_words)})"
    return suggestion or " (`cnnrun kinds` lists them all)"


def nearest_suggestion(word: object, known: Iterable[str]) -> str:
    """End of a message that suggests the nearest known word; empty if none is similar."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def format_value(value: Any) -> str:
    """A value as YAML writes it, cut to 60 characters for a message."""
    text = repr(dict(value)) if isinstance(value, Map) else repr(value)
    text = {"None": "nothing", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."


def validation_problems(error: ValidationError, tree: object, root: KeyPath, position: Position) -> list[Problem]:
    """Turn pydantic's errors into problems with a position in the file, one per path, in the file's order.

    `tree` is the whole file, `root` the path of the validated part, `position` the position of that part.
    """
    details_by_path: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] != "already_reported":
            # A validator's name in the path is no key: pydantic adds it for a branch of a union.
            keys = (key for key in detail["loc"] if not str(key).startswith("function-"))
            path: KeyPath = (*root, *keys)
            # Keys beyond the file's own name the branches of a union: those errors are one mistake.
            is_key_error = detail["type"] in ("missing", "unknown_key")
            written_path = path if is_key_error else path[: _existing_depth(tree, path)]
            details_by_path.setdefault(written_path, []).append(detail)
    problems = []
    for path, details in details_by_path.items():
        is_unknown_key = details[0]["type"] == "unknown_key"
        max_depth = max(len(detail["loc"]) for detail in details)
        messages = dict.fromkeys(_message(detail) for detail in details if len(detail["loc"]) == max_depth)
        path_position = find_position(tree, path, position, at_key=is_unknown_key)
        problems.append(Problem(path_position, path_text(tree, path), "; or ".join(messages)))
    return problems


def _existing_depth(tree: object, path: KeyPath) -> int:
    """Number of leading keys of `path` that exist in `tree`."""
    node: Any = tree
    for depth, key in enumerate(path):
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(path)


def add_suggestions(error: ValidationError, keys: list[str]) -> ValidationError:
    """Return the same error with suggestions from `keys` for unknown keys, and reported values marked as such."""
    details: list[Any] = []
    for detail in error.errors(include_url=False):
        kind: Any = detail["type"]
        context = detail.get("ctx", {})
        if kind == "extra_forbidden" and len(detail["loc"]) == 1:
            text = f"unknown key{did_you_mean(detail['loc'][0], keys)}"
            kind, context = PydanticCustomError("unknown_key", "{text}", {"text": text}), {}
        elif detail.get("input") is INVALID:
            kind, context = invalid_value_error(), {}
        elif set(context) == {"text"}:
            kind = PydanticCustomError(kind, "{text}", context)
        details.append({"type": kind, "loc": detail["loc"], "input": detail["input"], "ctx": context})
    return ValidationError.from_exception_data(error.title, details)


def invalid_value_error() -> PydanticCustomError:
    """Error for a value that was reported already; `validation_problems` leaves it out."""
    return PydanticCustomError("already_reported", "already reported")


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


_PATTERN_ADVICE = {
    r"^[A-Za-z_][A-Za-z0-9_]*$": "use letters, digits and _, and begin with a letter",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$": "use letters, digits, `.`, _ and -, and begin with a letter or digit",
}


def _message(detail: Any) -> str:
    """Message for one of pydantic's error details, in the user's words."""
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "missing":
        return "this setting is required"
    if kind == "too_short":
        return f"needs at least {format_count(context['min_length'], 'item')}, has {context['actual_length']}"
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{format_value(value)} is not one of the choices{did_you_mean(value, allowed)}"
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"{format_value(value)} is not a name: {_PATTERN_ADVICE.get(pattern, f'it must match {pattern}')}"
    if value is None and kind in _EXPECTED:
        return f"{_EXPECTED[kind].format(**context)}; give a value or remove the line"
    if kind not in _EXPECTED:
        return str(detail["msg"]).removeprefix("Value error, ")
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
