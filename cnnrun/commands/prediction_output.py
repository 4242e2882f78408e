"""Predictions as they come, a row a picture: as text, CSV or JSON lines on stdout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cnnrun.base.errors import DataError, escape, escape_cell
from cnnrun.contracts.prediction_text import describe_prediction, named_values

_LABEL, _BOX = ["label", "probability"], ["label", "score", "x", "y", "width", "height"]


def write_all(rows: Iterable[dict[str, Any]], as_json: bool, as_csv: bool) -> None:
    """Each row as it comes. Raises DataError in the end where pictures could not be read."""
    bad = 0
    with _writing("json" if as_json else "csv" if as_csv else "text") as write:
        for row in rows:
            write(row)
            bad += "error" in row
    if bad:
        raise DataError(f"{bad} file(s) could not be read")


@contextmanager
def _writing(form: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one prediction as `text`, `csv` or `json` (one object a line)."""
    if form == "csv":
        table = _Table()
        try:
            yield table.add
        finally:
            table.end()
    elif form == "json":
        yield lambda row: print(json.dumps(row), flush=True)  # noqa: T201
    else:
        yield _text_row


class _Table:
    """CSV, headed by the columns of the first picture that could be read; errors before it wait for that."""

    def __init__(self) -> None:
        self._writer, self._waiting = csv.writer(sys.stdout), list[dict[str, Any]]()
        self._columns: list[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        if self._columns is None and "error" in row and "objects" not in row:
            self._waiting.append(row)
            return
        if self._columns is None:
            self._begin(_columns(row))
        self._write(row)

    def end(self) -> None:
        """What still waits: pictures of which none could be read."""
        if self._waiting:
            self._begin(_LABEL)

    def _begin(self, columns: list[str]) -> None:
        self._columns = columns
        self._writer.writerow(map(_cell, ["path", *columns, "error"]))
        for row in self._waiting:
            self._write(row)
        self._waiting = []

    def _write(self, row: dict[str, Any]) -> None:
        assert self._columns is not None
        for cells in _cells(row):
            blank = [""] * (len(self._columns) - len(cells))
            self._writer.writerow(map(_cell, [row["path"], *cells, *blank, row.get("error", "")]))


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula, nor a terminal for a command.

    Text that begins with = + - @ gets an apostrophe before it, unless it is a number; control characters are escaped.
    """
    return escape_cell(value) if isinstance(value, str) else value


def _columns(row: dict[str, Any]) -> list[str]:
    if "values" in row:
        return list(named_values(row))
    if "probabilities" in row:  # no list of labels in one cell: names may hold whatever would separate them
        return [f"{what} {name}" for what in ("present", "probability") for name in row["probabilities"]]
    if "embedding" in row:
        return [f"e{number}" for number in range(len(row["embedding"]))]
    if "objects" in row:
        return _BOX
    if "matches" in row:
        return ["person", "similarity", *_ranked(["person", "similarity"], 1, len(row["matches"]))]
    return [*_LABEL, *_ranked(_LABEL, 2, len(row["top"]))]


def _ranked(columns: list[str], first: int, last: int) -> list[str]:
    """Columns for each of the ranks from `first` to `last`."""
    return [f"{column} {rank}" for rank in range(first, last + 1) for column in columns]


def _cells(row: dict[str, Any]) -> Iterator[list[Any]]:
    """What stands between the path and the error, a line each."""
    if row.get("objects"):
        yield from ([each["label"], each["score"], *each["bbox"]] for each in row["objects"])
    elif "embedding" in row:
        yield row["embedding"]
    elif "values" in row:
        yield list(named_values(row).values())
    elif "probabilities" in row:
        yield [*(int(name in row["labels"]) for name in row["probabilities"]), *row["probabilities"].values()]
    elif "matches" in row:
        ranks = [cell for each in row["matches"] for cell in (each["person"], each["similarity"])]
        yield [row["person"] or "", row["similarity"], *ranks]
    elif "top" in row:
        yield [cell for each in row["top"] for cell in (each["label"], each["probability"])]
    else:
        yield []


def _text_row(row: dict[str, Any]) -> None:
    if "error" in row:
        print(escape(row["error"]), file=sys.stderr)  # noqa: T201
        return
    print(f"{escape(row['path'])}: {escape(describe_prediction(row))}", flush=True)  # noqa: T201
