"""A table with a row a picture: CSV, TSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.base.error_lines import join_names, refuse_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.class_names import clean_cell, float32_problem, missing_value_problem, sorted_classes
from cnnrun.data.sources.table_files import Rows, read_rows
from cnnrun.data.split_names import parse_split_name

_LARGEST = 1e30  # of a number
_TRUTHS = {"true": True, "false": False}
_BRACKETS = ("[]", "{}")  # around lists that Python or JSON wrote


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
    labels: str | list[str] | None = Field(None, min_length=1)
    """For label sets, in the place of `label`: the column that lists a row's labels, or several columns of 0 and 1, \
one a class."""
    separator: str = Field(";", min_length=1, max_length=8)
    """What stands between the labels in a column of `labels`."""
    numbers: str | list[str] | None = Field(None, min_length=1)
    """For numbers, in the place of `label`: their column or columns."""
    split: str | None = None
    """The column that says train, val or test; by default the column `split` where there is one."""
    group: str | None = None
    """The column of what belongs on one side of a split, such as a patient; by default `group` where there is one."""
    classes: ClassNames | None = None
    """The classes in the order wanted; by default the labels sorted."""

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> Self:
        if (self.label != "label") + (self.labels is not None) + (self.numbers is not None) > 1:
            raise ValueError("give one of label, labels and numbers")
        if twice := [name for name in self._columns if self._columns.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r} stands twice")
        if self.classes and (self.numbers or isinstance(self.labels, list)):
            raise ValueError("classes is for a column that holds them; remove it")
        if self.separator != ";" and not isinstance(self.labels, str):
            raise ValueError("separator is for a column that lists labels; remove it")
        return self

    @property
    def has_declared_classes(self) -> bool:
        return bool(self.classes) or isinstance(self.labels or self.label, list)

    @property
    def target_kind(self) -> str:
        return "label sets" if self.labels else "numbers" if self.numbers else "labels"

    def read(self, apart: bool = False) -> SourceContents:
        path = Path(self.path)
        root = Path(self.root) if self.root else path.parent
        if not root.is_dir():
            raise DataError(f"{escape(str(root))}: no such folder (data.source.table.root)")
        rows = read_rows(path)
        columns = self._columns
        split = self._optional(rows, self.split, "split")
        group = self._optional(rows, self.group, "group")
        wanted = [self.picture, *columns, *(column for column in (split, group) if column)]
        if missing := [column for column in wanted if column not in rows.columns]:
            raise DataError(f"{path}: has no column {escape(missing[0])!r} (columns: {join_names(list(rows.columns))})")
        may_be_empty = {self.labels} if isinstance(self.labels, str) else set()  # a picture of none of the classes
        refuse_problems(
            _mistakes(rows, [each for each in wanted if each not in may_be_empty], self.picture, path_checker(root))
        )
        _refuse_bare_names(rows, self.picture, root)
        for column in dict.fromkeys(wanted[1:]):  # ' cat' is no class beside 'cat'
            rows.columns[column] = [clean_cell(cell) for cell in rows.columns[column]]
        refuse_problems(
            _missing(
                rows, [*([] if self.has_declared_classes or self.numbers else columns), *([group] if group else [])]
            )
        )
        where = _splits(rows, split)
        self._say_unread(rows, split, group)
        classes, targets = self._targets(rows, columns, [apart or name == "train" for name in where])
        paths = rows.columns[self.picture]
        groups = _numbered(rows.columns[group]) if group else None
        made = {}
        for name in ("train", "val", "test"):
            members = [i for i, each in enumerate(where) if each == name]
            if members:
                own = {target: values[members] for target, values in targets.items()}
                grouped = None if groups is None else groups[members]
                made[name] = Split(Files(root / paths[i] for i in members), own, str(rows.path), grouped)
        return SourceContents(classes, made, number_names=tuple(columns) if self.numbers else ())

    def _optional(self, rows: Rows, given: str | None, usual: str) -> str | None:
        taken = {self.picture, *self._columns}
        return given or (usual if usual in rows.columns and usual not in taken else None)

    def _say_unread(self, rows: Rows, split: str | None, group: str | None) -> None:
        """Say which columns that are not read look as if they told splits or groups."""
        unread = [name for name in rows.columns if name not in {self.picture, *self._columns, split, group}]
        splits = [name for name in unread if name.strip().casefold() == "split" or _are_splits(rows.columns[name])]
        groups = [name for name in unread if name.strip().casefold() == "group"]
        for usual, names in (("split", [] if split else splits), ("group", [] if group else groups)):
            for name in map(escape, names):
                advice = f"if it tells the {usual}, write `{usual}: {name}` (data.source.table)"
                say(f"{escape(str(rows.path))}: column {name!r} is not read; {advice}")

    @property
    def _columns(self) -> list[str]:
        """Those of the targets."""
        given = self.labels or self.numbers or self.label
        return [given] if isinstance(given, str) else given

    def _targets(self, rows: Rows, columns: list[str], known: list[bool]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """The classes, as the rows that are `known` have them, and every row's targets."""
        if self.numbers:
            return (), {"numbers": _numbers(rows, columns)}
        if isinstance(self.labels, list):
            return tuple(self.labels), {"present": _zeros_and_ones(rows, columns)}
        if self.labels:
            return self._label_sets(rows, rows.columns[self.labels], known)
        labels = _one_hot(rows, columns) if isinstance(self.label, list) else rows.columns[columns[0]]
        from_rows = sorted_classes(label for label, is_known in zip(labels, known, strict=True) if is_known)
        classes = self.classes or (self.label if isinstance(self.label, list) else from_rows)
        number = {name: i for i, name in enumerate(classes)}
        _refuse_unknown(rows, [[label] for label in labels], number)
        return tuple(classes), {"labels": torch.tensor([number[label] for label in labels])}

    def _label_sets(self, rows: Rows, cells: list[str], known: list[bool]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Classes and targets of a column that lists each row's labels."""
        sets = [[label for each in cell.split(self.separator) if (label := clean_cell(each))] for cell in cells]
        refuse_problems(
            f"{rows.location(i)}: {escape(label)!r} stands twice"
            for i, labels in enumerate(sets)
            for label in dict.fromkeys(labels)
            if labels.count(label) > 1
        )
        training = (label for labels, is_known in zip(sets, known, strict=True) if is_known for label in labels)
        classes = self.classes or sorted_classes(training)
        if not classes:
            raise DataError(f"{rows.path}: no training row has a label in {escape(str(self.labels))!r}")
        if not self.classes:
            refuse_problems(self._other_lists(rows, sets))
            self._say_joined(rows, set(classes))
        number = {name: i for i, name in enumerate(classes)}
        _refuse_unknown(rows, sets, number)
        present = torch.zeros(len(rows), len(classes), dtype=torch.bool)
        for i, labels in enumerate(sets):
            present[i, [number[label] for label in labels]] = True
        return tuple(classes), {"present": present}

    def _other_lists(self, rows: Rows, sets: list[list[str]]) -> Iterator[str]:
        """Labels that are lists themselves, by another separator or as programs write them: a line each."""
        known = Counter(part for label in {each for labels in sets for each in labels} for part in _parts(label))
        for i, labels in enumerate(sets):
            for label in labels:
                parts = _parts(label)
                if label[0] + label[-1] in _BRACKETS or (len(parts) > 1 and max(known[each] for each in parts) > 1):
                    how = f"is a list, and labels are separated by {self.separator!r} here (separator)"
                    yield f"{rows.location(i)}: {escape(label)!r} {how}; or give `classes` if it is one label"

    def _say_joined(self, rows: Rows, classes: set[str]) -> None:
        """Say which classes may be several, joined by what names have in them as well: blanks, + and &."""
        parts = {name: [part for part in re.split(r"[\s+&]+", name) if part] for name in sorted(classes)}
        known = Counter(part for each in parts.values() for part in set(each))
        joined = [name for name, each in parts.items() if len(each) > 1 and min(known[part] for part in each) > 1]
        if joined:
            say(
                f"{escape(str(rows.path))}: {len(joined):,} classes such as {escape(joined[0])!r} look like "
                f"lists of others, and labels are separated by {self.separator!r} here (separator)"
            )


def _are_splits(cells: Sequence[str]) -> bool:
    """Return whether all cells are names of splits, of two splits at least."""
    return None not in (names := {parse_split_name(cell) for cell in set(cells)}) and len(names) > 1


def _parts(label: str) -> list[str]:
    """The labels that a label would be by the usual separators; itself alone where it has none of them."""
    return [part.strip() for part in re.split(r"[;,|/\t]", label) if part.strip()]


def _missing(rows: Rows, columns: list[str]) -> Iterator[str]:
    """Cells that stand for no value: a line each."""
    for column in columns:
        for i, cell in enumerate(rows.columns[column]):
            if problem := missing_value_problem(cell):
                yield f"{rows.location(i)}: {escape(column)} is {cell!r}, which {problem}"


def _splits(rows: Rows, column: str | None) -> list[str]:
    """The split of each row."""
    written = rows.columns[column] if column else ["train"] * len(rows)
    where = [parse_split_name(each) for each in written]
    refuse_problems(
        f"{rows.location(i)}: split is {escape(written[i])!r}; use train, val or test"
        for i, name in enumerate(where)
        if name is None
    )
    if "train" not in where:
        raise DataError(f"{rows.path}: no row is of the train split")
    return [name for name in where if name]


def _numbered(names: list[str]) -> Tensor:
    """Each name by its place among the different ones."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([place[name] for name in names])


def _refuse_unknown(rows: Rows, labels: Sequence[Sequence[str]], known: dict[str, int]) -> None:
    refuse_problems(
        f"{rows.location(i)}: {escape(label)!r} is not a class of the training rows"
        for i, of_row in enumerate(labels)
        for label in of_row
        if label not in known
    )


def _mistakes(rows: Rows, wanted: list[str], picture: str, why_not: Callable[[str], str | None]) -> Iterator[str]:
    """Empty cells, paths that may not be used, and pictures that stand twice: a line each."""
    for column in wanted:
        for i, cell in enumerate(rows.columns[column]):
            if not cell.strip():
                yield f"{rows.location(i)}: {escape(column)} is empty"
    first: dict[str, int] = {}
    for i, path in enumerate(rows.columns[picture]):
        if path.strip() and (why := why_not(path)):
            yield f"{rows.location(i)}: {escape(path)!r} {why}"
        elif path in first:
            yield f"{rows.location(i)}: {escape(path)!r} stands in line {rows.lines[first[path]]} already"
        first.setdefault(path, i)


def _refuse_bare_names(rows: Rows, column: str, root: Path) -> None:
    """Raises DataError for a column of names without a suffix, such as Kaggle's ids, that are no files."""
    names = rows.columns[column]
    if not any(PurePath(name).suffix for name in names) and not (root / names[0]).exists():
        problem = f"has no suffix, and there is no such file in {escape(str(root))}"
        raise DataError(
            f"{rows.location(0)}: {escape(column)} {escape(names[0])!r} {problem}; write whole names, such as "
            f"{escape(names[0])}.png"
        )


def _one_hot(rows: Rows, columns: list[str]) -> list[str]:
    """The column that is 1 in each row."""
    found, problems = [], []
    for i, cells in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
        chosen = []
        for column, cell in zip(columns, cells, strict=True):
            value = _zero_or_one(cell)
            if value is None:
                problems.append(f"{rows.location(i)}: {escape(column)} is {escape(cell)!r}; expected 0 or 1")
            chosen += [column] if value else []
        if len(chosen) != 1:
            problems.append(
                f"{rows.location(i)}: {len(chosen)} of the label columns are 1; one label a picture is expected"
            )
        found += chosen[:1] or [""]
    refuse_problems(problems)
    return found


def _zeros_and_ones(rows: Rows, columns: list[str]) -> Tensor:
    """Whether each cell is 1: bool [N, K]."""
    values = [[_zero_or_one(cell) for cell in rows.columns[column]] for column in columns]
    refuse_problems(
        f"{rows.location(i)}: {escape(column)} is {escape(rows.columns[column][i])!r}; expected 0 or 1"
        for column, of_column in zip(columns, values, strict=True)
        for i, value in enumerate(of_column)
        if value is None
    )
    return torch.tensor(values, dtype=torch.bool).T.contiguous()


def _numbers(rows: Rows, columns: list[str]) -> Tensor:
    """The cells as numbers: float32 [N, T]."""
    values = [[_number(cell) for cell in rows.columns[column]] for column in columns]
    refuse_problems(
        f"{rows.location(i)}: {escape(column)} is {escape(rows.columns[column][i])!r}; expected a number, such as "
        "-1.5 or 2e3"
        for column, of_column in zip(columns, values, strict=True)
        for i, value in enumerate(of_column)
        if value is None
    )
    refuse_problems(
        f"{rows.path}: {problem}"
        for name, each in zip(columns, values, strict=True)
        if (problem := float32_problem(name, each))
    )
    return torch.tensor(values, dtype=torch.float32).T.contiguous()


def _number(cell: str) -> float | None:
    """A number that float32 can hold, with a point; None for all else (Python's own float takes 1_000 and nan too)."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell, re.ASCII):
        return None
    return value if abs(value := float(cell)) < _LARGEST else None


def _zero_or_one(cell: str) -> bool | None:
    if cell.casefold() in _TRUTHS:  # as pandas writes them
        return _TRUTHS[cell.casefold()]
    try:
        return {0.0: False, 1.0: True}.get(float(cell))
    except ValueError:
        return None
