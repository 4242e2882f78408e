"""A table with a row a picture: CSV, TSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from cnnrun.contracts import ClassNames, Indexed, SourceSpec, Split
from cnnrun.errors import DataError, printable
from cnnrun.files import Files
from cnnrun.labelling import class_names, jail, refuse, split_name

_MAX_BYTES = 1 << 30


class Table(SourceSpec):
    """A row a picture: its path, its label, and, where there are such columns, its split and its group."""

    kind = "table"
    main = "path"

    path: str
    """A .csv, .tsv or .parquet file with a line of column names."""
    root: str | None = None
    """The folder that the pictures' paths start from; by default the table's own."""
    picture: str = "path"
    """The column of paths."""
    label: str | list[str] = Field("label", min_length=1)
    """The column of labels; or several columns, one a class, of which each row has one 1 and otherwise 0."""
    split: str | None = None
    """The column that says train, val or test; by default the column `split` where there is one."""
    group: str | None = None
    """The column of what belongs on one side of a split, such as a patient; by default `group` where there is one."""
    classes: ClassNames | None = None
    """The classes in the order wanted; by default the labels sorted."""

    def read(self, apart: bool = False) -> Indexed:
        path = Path(self.path)
        root = Path(self.root) if self.root else path.parent
        if not root.is_dir():
            raise DataError(f"{printable(str(root))}: no such folder (data.source.table.root)")
        rows = read_rows(path)
        labels = [self.label] if isinstance(self.label, str) else self.label
        split = self._optional(rows, self.split, "split")
        group = self._optional(rows, self.group, "group")
        wanted = [self.picture, *labels, *(column for column in (split, group) if column)]
        if missing := [column for column in wanted if column not in rows.columns]:
            known = ", ".join(map(printable, rows.columns))
            raise DataError(f"{path}: has no column {printable(missing[0])!r} (columns: {known})")
        refuse(_mistakes(rows, wanted, self.picture, jail(root)))
        for column in wanted[1:]:  # ' cat' is no class beside 'cat'
            rows.columns[column] = [cell.strip() for cell in rows.columns[column]]
        paths, splits = rows.columns[self.picture], rows.columns[split] if split else ["train"] * len(rows)
        written = _one_hot(rows, labels) if isinstance(self.label, list) else rows.columns[self.label]
        return self._indexed(rows, root, paths, splits, written, rows.columns[group] if group else None, apart)

    def _optional(self, rows: Rows, given: str | None, usual: str) -> str | None:
        return given or (usual if usual in rows.columns and usual != self.label else None)

    def _indexed(
        self,
        rows: Rows,
        root: Path,
        paths: list[str],
        splits: list[str],
        labels: list[str],
        groups: list[str] | None,
        apart: bool,
    ) -> Indexed:
        where = [split_name(split) for split in splits]
        refuse(
            [
                f"{rows.at(i)}: split is {printable(splits[i])!r}; use train, val or test"
                for i, name in enumerate(where)
                if name is None
            ]
        )
        training = [label for label, name in zip(labels, where, strict=True) if name == "train"]
        if not training:
            raise DataError(f"{rows.path}: no row is of the train split")
        known = labels if apart else training
        classes = self.classes or (self.label if isinstance(self.label, list) else class_names(known))
        number = {name: i for i, name in enumerate(classes)}
        refuse(
            [
                f"{rows.at(i)}: {printable(label)!r} is not a class of the training rows"
                for i, label in enumerate(labels)
                if label not in number
            ]
        )
        of_group = {name: i for i, name in enumerate(dict.fromkeys(groups))} if groups else {}
        made = {}
        for name in ("train", "val", "test"):
            members = [i for i, each in enumerate(where) if each == name]
            if members:
                targets = {"labels": torch.tensor([number[labels[i]] for i in members])}
                grouped: Tensor | None = torch.tensor([of_group[groups[i]] for i in members]) if groups else None
                made[name] = Split(Files(root / paths[i] for i in members), targets, str(rows.path), grouped)
        return Indexed(tuple(classes), made)


@dataclass(frozen=True)
class Rows:
    """Columns of text; `first` is the line of the first row in the file."""

    path: Path
    columns: dict[str, list[str]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        """Where a row stands, as messages name it."""
        return f"{printable(str(self.path))}:{self.lines[row]}"


def _mistakes(rows: Rows, wanted: list[str], picture: str, why_not: Callable[[str], str | None]) -> list[str]:
    """Empty cells, paths that may not be used, and pictures that stand twice: a line each."""
    found = [
        f"{rows.at(i)}: {printable(column)} is empty"
        for column in wanted
        for i, cell in enumerate(rows.columns[column])
        if not cell.strip()
    ]
    first: dict[str, int] = {}
    for i, path in enumerate(rows.columns[picture]):
        if path.strip() and (why := why_not(path)):
            found.append(f"{rows.at(i)}: {printable(path)!r} {why}")
        elif path in first:
            found.append(f"{rows.at(i)}: {printable(path)!r} stands in line {rows.lines[first[path]]} already")
        first.setdefault(path, i)
    return found


def _one_hot(rows: Rows, columns: list[str]) -> list[str]:
    """The column that is 1 in each row."""
    found, problems = [], []
    for i, cells in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
        chosen = []
        for column, cell in zip(columns, cells, strict=True):
            value = _zero_or_one(cell)
            if value is None:
                problems.append(f"{rows.at(i)}: {printable(column)} is {printable(cell)!r}; expected 0 or 1")
            chosen += [column] if value else []
        if len(chosen) != 1:
            problems.append(f"{rows.at(i)}: {len(chosen)} of the label columns are 1; one label a picture is expected")
        found += chosen[:1] or [""]
    refuse(problems)
    return found


def _zero_or_one(cell: str) -> bool | None:
    try:
        return {0.0: False, 1.0: True}.get(float(cell))
    except ValueError:
        return None


def read_rows(path: Path) -> Rows:
    """The rows of a CSV, TSV or Parquet file, every cell as text. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{printable(str(path))}: no such file")
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{printable(str(path))}: more than {_MAX_BYTES:,} bytes")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _check_header(path, header, delimiter)
            cells, lines = [], []
            for row in reader:
                if len(row) != len(header) and row:
                    raise DataError(f"{path}:{reader.line_num}: {len(row)} cells; the first line has {len(header)}")
                if row:
                    cells.append(row)
                    lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a table: {error}") from None
    if not cells:
        raise DataError(f"{path}: no rows")
    return Rows(
        path, {name: list(column) for name, column in zip(header, zip(*cells, strict=True), strict=True)}, lines
    )


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if not header:
        raise DataError(f"{path}: empty")
    if len(header) == 1 and any(other in header[0] for other in ";\t,"):
        raise DataError(f"{path}:1: one column {printable(header[0])!r}; separate columns by {delimiter!r}")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path}:1: column {printable(name)!r} stands twice")


def _read_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'cnnrun[parquet]'") from None
    try:
        table = read_table(str(path))
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {printable(str(error).splitlines()[0])}") from None
    if not table.num_rows:
        raise DataError(f"{path}: no rows")
    columns = {
        name: ["" if cell is None else str(cell) for cell in table.column(name).to_pylist()]
        for name in table.column_names
    }
    return Rows(path, columns, range(1, table.num_rows + 1))
