"""Reading a table as text: CSV, TSV, or Parquet if pyarrow is installed."""

from __future__ import annotations

import csv
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cnnrun.base.bounded_files import check_expansion, check_fits_memory, max_unpacked_bytes, open_file
from cnnrun.base.errors import DataError, escape, first_line, unescape_cell
from cnnrun.base.extras import require_package
from cnnrun.base.progress import say

_MAX_BYTES = 1 << 30
_IMAGE_COLUMNS = ("filename", "file_name", "file", "image", "image_path")
_MAX_ROWS, _MAX_COLUMNS = 10_000_000, 4096
_CELL_BYTES = 100  # an estimate of the memory that a cell takes
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # the first bytes of a UTF-16 file
_MAX_CELL_BYTES = 4096  # of a Parquet file's cells, on average
_BATCH_ROWS = 10_000  # of a Parquet file, read at a time


@dataclass(frozen=True)
class Rows:
    """Columns of text; `lines` locate the rows in messages: last lines in CSV and TSV, row numbers in Parquet."""

    path: Path
    columns: dict[str, list[str]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def location(self, row: int) -> str:
        """The file and line of a row, for messages."""
        return f"{escape(str(self.path))}:{self.lines[row]}"


def read_rows(path: Path, names: Sequence[str] | None = None) -> Rows:
    """Read a CSV, TSV or Parquet file, every cell as text. Raises DataError if it cannot be read or has no rows.

    `names` are those of the columns of a CSV or TSV file that has no line of names.
    """
    if not path.is_file():
        raise DataError(f"{escape(str(path))}: {'not a regular file' if path.exists() else 'no such file'}")
    if path.suffix.lower() == ".parquet":
        if names:
            raise DataError(f"{escape(str(path))}: Parquet names its columns itself; remove data.source.table.columns")
        return _read_parquet(path)
    encoding = "utf-8-sig"
    try:
        with open_file(path, DataError, _MAX_BYTES) as raw:
            encoding = "utf-16" if raw.peek(2)[:2] in _UTF_16_MARKS else encoding
            file = TextIOWrapper(raw, encoding, newline="")
            delimiter = _choose_delimiter(path, file.readline())
            file.seek(0)
            # skipinitialspace: quotes after a blank are still quotes, not part of the cell.
            reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
            header = list(names) if names else next(reader, [])
            _check_column_names(path, header, delimiter)
            columns: list[list[str]] = [[] for _ in header]
            lines = array("q")
            for row in reader:
                if len(row) != len(header) and row:
                    raise DataError(f"{path}:{reader.line_num}: {len(row)} cells; the first line has {len(header)}")
                if row:
                    for column, cell in zip(columns, row, strict=True):
                        column.append(unescape_cell(cell))
                    lines.append(reader.line_num)
                    _check_size(path, len(lines), len(header))
    except UnicodeDecodeError as error:
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise DataError(f"{path}: not {name} (byte {error.start}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a table: {error}") from None
    if not lines:
        raise DataError(f"{path}: no rows")
    return Rows(path, dict(zip(header, columns, strict=True)), lines)


def find_image_column(rows: Rows, target_columns: Sequence[str]) -> str | None:
    """Find the only column with a usual name for image paths that holds no targets; None if there are none or two."""
    usual = [name for name in rows.columns if name.strip().casefold() in _IMAGE_COLUMNS]
    names = [name for name in usual if name not in target_columns]
    return names[0] if len(names) == 1 else None


def _choose_delimiter(path: Path, header: str) -> str:
    """The delimiter: that of the suffix, or for CSV the semicolon or tab of a header that has no comma."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    if delimiter != ",":
        say(f"{escape(str(path))}: columns are separated by {'semicolons' if delimiter == ';' else 'tabs'}")
    return delimiter


def _check_size(path: Path, rows: int, columns: int) -> None:
    """Raise DataError for more than 10,000,000 rows, or more than fit the memory."""
    if rows > _MAX_ROWS:
        raise DataError(f"{escape(str(path))}: more than {_MAX_ROWS:,} rows")
    if rows % 100_000 == 0:
        check_fits_memory(path, rows * columns * _CELL_BYTES, DataError)


def _check_column_names(path: Path, header: list[str], delimiter: str) -> None:
    """Raise DataError if the column names are missing, too many, repeated, or separated by another delimiter."""
    if not header:
        raise DataError(f"{path}: empty")
    if len(header) > _MAX_COLUMNS:
        raise DataError(f"{path}:1: {len(header):,} columns; at most {_MAX_COLUMNS:,} are read")
    if len(header) == 1 and any(separator in header[0] for separator in ";\t,"):
        raise DataError(f"{path}:1: one column {escape(header[0])!r}; separate columns by {delimiter!r}")
    for name, count in Counter(header).items():
        if count > 1:
            hint = "" if any(character.isalpha() for character in name) else "; the first line must name the columns"
            raise DataError(f"{path}:1: column {escape(name)!r} appears twice{hint}")


def _read_parquet(path: Path) -> Rows:
    """Read a Parquet file in batches, so that a small file cannot unpack to any amount of text."""
    require_package("pyarrow", "parquet", f"{path}: Parquet", DataError)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open_file(path, DataError, _MAX_BYTES) as file:
            parquet = ParquetFile(file, pre_buffer=False)
            metadata = parquet.metadata
            names = list(parquet.schema_arrow.names)
            _check_column_names(path, names, ",")
            _check_size(path, metadata.num_rows, metadata.num_columns)
            check_fits_memory(path, metadata.num_rows * metadata.num_columns * _CELL_BYTES, DataError)
            columns = _read_columns(path, parquet, names)
    except (ArrowException, OSError, KeyError, ValueError, OverflowError, TypeError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    if not metadata.num_rows:
        raise DataError(f"{path}: no rows")
    return Rows(path, columns, range(1, metadata.num_rows + 1))


def _read_columns(path: Path, parquet: Any, names: list[str]) -> dict[str, list[str]]:
    """The cells of each column as text. Raises DataError if they hold more text than an archive of this size may."""
    columns: dict[str, list[str]] = {name: [] for name in names}
    text_bytes, file_bytes = 0, path.stat().st_size
    # No threads: pyarrow's abort the interpreter if they still run when it exits.
    for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
        for name, column in zip(names, batch.columns, strict=True):
            _check_cells(path, name, column)
            cells = ["" if cell is None else str(cell) for cell in column.to_pylist()]
            text_bytes += sum(len(cell.encode()) for cell in cells)
            columns[name] += cells
        if text_bytes > max_unpacked_bytes(file_bytes):
            check_expansion(path, file_bytes, text_bytes, DataError)
    return columns


def _check_cells(path: Path, name: str, column: Any) -> None:
    """Raise DataError if cells are too long, before a dictionary column is expanded to one text for each row."""
    values = getattr(column, "dictionary", column)
    if values.nbytes > _MAX_CELL_BYTES * max(1, len(values)):
        raise DataError(f"{escape(str(path))}: column {escape(name)!r} has cells of {_MAX_CELL_BYTES:,} bytes or more")
