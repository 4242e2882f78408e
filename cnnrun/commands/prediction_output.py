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
from cnnrun.results.predict import PredictedFile


def write_all(files: Iterable[PredictedFile], as_json: bool, as_csv: bool) -> None:
    """Print each file's prediction as soon as it is made. Raises DataError at the end if images could not be read."""
    unreadable = 0
    with _writer("json" if as_json else "csv" if as_csv else "text") as write:
        for predicted in files:
            write(predicted)
            unreadable += predicted.prediction is None
    if unreadable:
        raise DataError(f"{format_count(unreadable, 'file')} could not be read")


@contextmanager
def _writer(output_format: str) -> Iterator[Callable[[PredictedFile], None]]:
    """Context with a function that prints one prediction as `text`, `csv` or `json` (one object per line)."""
    if output_format == "csv":
        table = _CsvTable()
        try:
            yield table.add
        finally:
            table.close()
    elif output_format == "json":
        yield lambda predicted: print(json.dumps(predicted.to_json()), flush=True)  # noqa: T201
    else:
        yield _print_text


class _CsvTable:
    """CSV with the columns of the first prediction. Files before it that cannot be read wait until these are known."""

    def __init__(self) -> None:
        self._writer, self._pending = csv.writer(sys.stdout), list[PredictedFile]()
        self._columns: list[str] | None = None

    def add(self, predicted: PredictedFile) -> None:
        """Write a file's rows, or hold them back until the columns are known."""
        if self._columns is None and predicted.prediction is None:
            self._pending.append(predicted)
            return
        if self._columns is None and predicted.prediction:
            self._write_header(predicted.prediction.csv_columns())
        self._write(predicted)

    def close(self) -> None:
        """Write the rows held back, if no image could be read."""
        if self._pending:
            self._write_header([])

    def _write_header(self, columns: list[str]) -> None:
        self._columns = columns
        self._writer.writerow(map(_cell, ["path", *columns, "error"]))
        for predicted in self._pending:
            self._write(predicted)
        self._pending = []

    def _write(self, predicted: PredictedFile) -> None:
        assert self._columns is not None
        for cells in predicted.prediction.csv_rows() if predicted.prediction else [[]]:
            blank = [""] * (len(self._columns) - len(cells))
            self._writer.writerow(map(_cell, [str(predicted.path), *cells, *blank, predicted.error]))


def _cell(value: Any) -> Any:
    """Escape a cell, so that no spreadsheet runs it as a formula and no terminal as a command.

    Text that begins with = + - @ gets an apostrophe before it, unless it is a number; control characters are escaped.
    """
    return escape_cell(value) if isinstance(value, str) else value


def _print_text(predicted: PredictedFile) -> None:
    if predicted.prediction is None:
        print(escape(predicted.error), file=sys.stderr)  # noqa: T201
        return
    print(f"{escape(str(predicted.path))}: {escape(predicted.prediction.to_text())}", flush=True)  # noqa: T201
