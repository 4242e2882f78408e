"""Printing of predictions on stdout, one by one, as text, CSV or JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape, escape_cell
from cnnrun.contracts.prediction_text import describe_prediction, named_values

_LABEL_COLUMNS, _BOX_COLUMNS = ["label", "probability"], ["label", "score", "x", "y", "width", "height"]


def write_all(rows: Iterable[dict[str, Any]], as_json: bool, as_csv: bool) -> None:
    """Print each row as soon as it is predicted. Raises DataError at the end if images could not be read."""
    unreadable = 0
    with _writer("json" if as_json else "csv" if as_csv else "text") as write:
        for row in rows:
            write(row)
            unreadable += "error" in row
    if unreadable:
        raise DataError(f"{format_count(unreadable, 'file')} could not be read")


@contextmanager
def _writer(output_format: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Context with a function that prints one prediction as `text`, `csv` or `json` (one object per line)."""
    if output_format == "csv":
        table = _CsvTable()
        try:
            yield table.add
        finally:
            table.close()
    elif output_format == "json":
        yield lambda row: print(json.dumps(row), flush=True)  # noqa: T201
    else:
        yield _print_text


class _CsvTable:
    """CSV with the columns of the first readable image. Errors before it are held back until the header is known."""

    def __init__(self) -> None:
        self._writer, self._pending = csv.writer(sys.stdout), list[dict[str, Any]]()
        self._columns: list[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, or hold it back until the columns are known."""
        if self._columns is None and "error" in row and "objects" not in row:
            self._pending.append(row)
            return
        if self._columns is None:
            self._write_header(_columns(row))
        self._write(row)

    def close(self) -> None:
        """Write the rows held back, if no image could be read."""
        if self._pending:
            self._write_header(_LABEL_COLUMNS)

    def _write_header(self, columns: list[str]) -> None:
        self._columns = columns
        self._writer.writerow(map(_cell, ["path", *columns, "error"]))
        for row in self._pending:
            self._write(row)
        self._pending = []

    def _write(self, row: dict[str, Any]) -> None:
        assert self._columns is not None
        for cells in _cells(row):
            blank = [""] * (len(self._columns) - len(cells))
            self._writer.writerow(map(_cell, [row["path"], *cells, *blank, row.get("error", "")]))


def _cell(value: Any) -> Any:
    """Escape a cell, so that no spreadsheet runs it as a formula and no terminal as a command.

    Text that begins with = + - @ gets an apostrophe before it, unless it is a number; control characters are escaped.
    """
    return escape_cell(value) if isinstance(value, str) else value


def _columns(row: dict[str, Any]) -> list[str]:
    """The CSV columns between path and error that fit the kind of prediction in `row`."""
    if "values" in row:
        return list(named_values(row))
    if "probabilities" in row:  # a list in one cell would need a separator, which names may contain
        return [f"{column} {name}" for column in ("present", "probability") for name in row["probabilities"]]
    if "embedding" in row:
        return [f"e{index}" for index in range(len(row["embedding"]))]
    if "objects" in row:
        return _BOX_COLUMNS
    if "matches" in row:
        return ["person", "similarity", *_ranked(["person", "similarity"], 1, len(row["matches"]))]
    return [*_LABEL_COLUMNS, *_ranked(_LABEL_COLUMNS, 2, len(row["top"]))]


def _ranked(columns: list[str], first: int, last: int) -> list[str]:
    """Columns for each rank from `first` to `last`."""
    return [f"{column} {rank}" for rank in range(first, last + 1) for column in columns]


def _cells(row: dict[str, Any]) -> Iterator[list[Any]]:
    """The cells between path and error, for each line that a row needs."""
    if row.get("objects"):
        yield from ([found["label"], found["score"], *found["bbox"]] for found in row["objects"])
    elif "embedding" in row:
        yield row["embedding"]
    elif "values" in row:
        yield list(named_values(row).values())
    elif "probabilities" in row:
        yield [*(int(name in row["labels"]) for name in row["probabilities"]), *row["probabilities"].values()]
    elif "matches" in row:
        ranks = [cell for match in row["matches"] for cell in (match["person"], match["similarity"])]
        yield [row["person"] or "", row["similarity"], *ranks]
    elif "top" in row:
        yield [cell for entry in row["top"] for cell in (entry["label"], entry["probability"])]
    else:
        yield []


def _print_text(row: dict[str, Any]) -> None:
    if "error" in row:
        print(escape(row["error"]), file=sys.stderr)  # noqa: T201
        return
    print(f"{escape(row['path'])}: {escape(describe_prediction(row))}", flush=True)  # noqa: T201
