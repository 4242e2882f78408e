"""A table with one row for each image: CSV, TSV, or Parquet if pyarrow is installed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems, join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.class_names import clean_cell, missing_value_problem, sort_class_names
from cnnrun.data.sources.table_files import Rows, find_image_column, read_rows
from cnnrun.data.sources.table_targets import read_booleans, read_numbers, read_one_hot
from cnnrun.data.split_names import parse_split_name

_BRACKETS = ("[]", "{}")  # around lists that Python or JSON wrote


class Table(SourceSpec):
    """One row for each image: its path, its label, and, if there are such columns, its split and its group."""

    kind = "table"
    main = "path"
    old_keys = {"picture": "image"}

    path: str
    """A .csv, .tsv or .parquet file with a line of column names."""
    columns: list[str] | None = Field(None, min_length=2)
    """The names of the columns of a file without a line of names."""
    root: str | None = None
    """The folder that the image paths start from; by default the table's own."""
    image_column: str = Field("path", alias="image")
    """The column of image paths; without one named `path`, the one named filename, file_name, file, image or \
image_path."""
    suffix: str = Field("", pattern=r"^[^/\\]*$", max_length=20)
    """What the files' names have after the cells: `.jpg` for a table of ids."""
    label: str | list[str] = Field("label", min_length=1)
    """The column of labels; or several columns, one for each class, with a single 1 in each row and 0 elsewhere."""
    labels: str | list[str] | None = Field(None, min_length=1)
    """For label sets, instead of `label`: the column that lists a row's labels, or several columns of 0 and 1, \
one for each class."""
    separator: str = Field(";", min_length=1, max_length=8)
    """The text between two labels in the column `labels`."""
    numbers: str | list[str] | None = Field(None, min_length=1)
    """For numbers, instead of `label`: their column or columns."""
    split: str | None = None
    """The column that says train, val or test; by default the column `split` if there is one."""
    group: str | None = None
    """The column of groups that stay in one split, such as patients; by default the column `group` if there is one."""
    classes: ClassNames | None = None
    """The classes in the order of their labels; by default the labels sorted."""

    @model_validator(mode="after")
    def _check_target_settings(self) -> Self:
        if (self.label != "label") + (self.labels is not None) + (self.numbers is not None) > 1:
            raise ValueError("give one of label, labels and numbers")
        if repeated := [name for name in self._target_columns if self._target_columns.count(name) > 1]:
            raise ValueError(f"column {repeated[0]!r} is listed twice")
        if self.classes and (self.numbers or isinstance(self.labels, list)):
            raise ValueError("classes does not go with numbers, or with one column per class in labels; remove it")
        if self.separator != ";" and not isinstance(self.labels, str):
            raise ValueError("separator is for a column that lists labels; remove it")
        return self

    @property
    def has_declared_classes(self) -> bool:
        return bool(self.classes) or isinstance(self.labels or self.label, list)

    @property
    def target_kind(self) -> TargetKind:
        if self.labels:
            return TargetKind.LABEL_SETS
        return TargetKind.NUMBERS if self.numbers else TargetKind.LABELS

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        path = Path(self.path)
        root = Path(self.root) if self.root else path.parent
        if not root.is_dir():
            raise DataError(f"{escape(str(root))}: no such folder (data.source.table.root)")
        rows = read_rows(path, self.columns)
        return self._with_image_column(rows)._read_rows(rows, root, has_disjoint_classes)

    def _with_image_column(self, rows: Rows) -> Table:
        """This source or, if its table has no column `path` and one with another usual name, that column's."""
        if "image_column" in self.model_fields_set or self.image_column in rows.columns:
            return self
        if (name := find_image_column(rows, self._target_columns)) is None:
            return self
        say(f"{escape(str(rows.path))}: the images are those of the column {escape(name)!r}")
        return self.model_copy(update={"image_column": name})

    def _read_rows(self, rows: Rows, root: Path, has_disjoint_classes: bool) -> SourceContents:
        path = rows.path
        columns = self._target_columns
        if self.suffix and self.image_column in rows.columns:
            rows.columns[self.image_column] = [
                f"{cell}{self.suffix}" if cell.strip() else cell for cell in rows.columns[self.image_column]
            ]
        split_column = self._find_column(rows, self.split, "split")
        group_column = self._find_column(rows, self.group, "group")
        needed = [self.image_column, *columns, *(column for column in (split_column, group_column) if column)]
        if missing := [column for column in needed if column not in rows.columns]:
            raise DataError(f"{path}: has no column {escape(missing[0])!r} (columns: {join_names(list(rows.columns))})")
        rows = _without_repeats(rows, needed)
        may_be_empty = {self.labels} if isinstance(self.labels, str) else set()  # an image without any of the classes
        non_empty = [column for column in needed if column not in may_be_empty]
        check_problems(_cell_problems(rows, non_empty, self.image_column, path_checker(root)))
        _refuse_bare_names(rows, self.image_column, root)
        for column in dict.fromkeys(needed[1:]):  # ' cat' and 'cat' are one class
            rows.columns[column] = [clean_cell(cell) for cell in rows.columns[column]]
        name_columns = [] if self.has_declared_classes or self.numbers else columns
        check_problems(_missing_value_problems(rows, [*name_columns, *([group_column] if group_column else [])]))
        split_of_row = _row_splits(rows, split_column)
        self._say_unread(rows, split_column, group_column)
        has_classes = [has_disjoint_classes or name == "train" for name in split_of_row]
        classes, targets = self._read_targets(rows, columns, has_classes)
        paths = rows.columns[self.image_column]
        groups = _number_groups(rows.columns[group_column]) if group_column else None
        splits = {}
        for name in ("train", "val", "test"):
            members = [i for i, row_split in enumerate(split_of_row) if row_split == name]
            if members:
                split_targets = {target: values[members] for target, values in targets.items()}
                split_groups = None if groups is None else groups[members]
                files = Files(root / paths[i] for i in members)
                splits[name] = Split(files, split_targets, str(rows.path), split_groups)
        return SourceContents(classes, splits, number_names=tuple(columns) if self.numbers else ())

    def _find_column(self, rows: Rows, setting: str | None, default: str) -> str | None:
        """The column that the config names, else the default one if the table has it and nothing else uses it."""
        used = {self.image_column, *self._target_columns}
        return setting or (default if default in rows.columns and default not in used else None)

    def _say_unread(self, rows: Rows, split_column: str | None, group_column: str | None) -> None:
        """Say which columns look like splits or groups but are not read."""
        used = {self.image_column, *self._target_columns, split_column, group_column}
        unread = [name for name in rows.columns if name not in used]
        splits = [name for name in unread if name.strip().casefold() == "split" or _are_splits(rows.columns[name])]
        groups = [name for name in unread if name.strip().casefold() == "group"]
        for setting, names in (("split", [] if split_column else splits), ("group", [] if group_column else groups)):
            for name in map(escape, names):
                advice = f"if it holds the {setting}, write `{setting}: {name}` (data.source.table)"
                say(f"{escape(str(rows.path))}: column {name!r} is not read; {advice}")

    @property
    def _target_columns(self) -> list[str]:
        columns = self.labels or self.numbers or self.label
        return [columns] if isinstance(columns, str) else columns

    def _read_targets(
        self, rows: Rows, columns: list[str], is_class_row: list[bool]
    ) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """The classes, and the targets of every row. Undeclared classes are collected from the class rows."""
        if self.numbers:
            return (), {"numbers": read_numbers(rows, columns)}
        if isinstance(self.labels, list):
            return tuple(self.labels), {"present": read_booleans(rows, columns)}
        if self.labels:
            return self._read_label_sets(rows, rows.columns[self.labels], is_class_row)
        labels = read_one_hot(rows, columns) if isinstance(self.label, list) else rows.columns[columns[0]]
        collected = sort_class_names(label for label, is_used in zip(labels, is_class_row, strict=True) if is_used)
        classes = self.classes or (self.label if isinstance(self.label, list) else collected)
        label_index = {name: i for i, name in enumerate(classes)}
        self._refuse_unknown_labels(rows, [[label] for label in labels], label_index)
        return tuple(classes), {"labels": torch.tensor([label_index[label] for label in labels])}

    def _read_label_sets(
        self, rows: Rows, cells: list[str], is_class_row: list[bool]
    ) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """The classes and targets of a column that lists the labels of each row."""
        sets = [[label for text in cell.split(self.separator) if (label := clean_cell(text))] for cell in cells]
        if repeated := [i for i, labels in enumerate(sets) if len(set(labels)) < len(labels)]:
            count = format_count(len(repeated), "row lists", "rows list")
            say(f"{rows.location(repeated[0])}: {count} a label twice, which counts once")
            sets = [list(dict.fromkeys(labels)) for labels in sets]
        collected = (label for labels, is_used in zip(sets, is_class_row, strict=True) if is_used for label in labels)
        classes = self.classes or sort_class_names(collected)
        if not classes:
            raise DataError(f"{rows.path}: no training row has a label in {escape(str(self.labels))!r}")
        if not self.classes:
            check_problems(self._list_problems(rows, sets))
            self._say_joined_classes(rows, set(classes))
        label_index = {name: i for i, name in enumerate(classes)}
        self._refuse_unknown_labels(rows, sets, label_index)
        present = torch.zeros(len(rows), len(classes), dtype=torch.bool)
        for i, labels in enumerate(sets):
            present[i, [label_index[label] for label in labels]] = True
        return tuple(classes), {"present": present}

    def _refuse_unknown_labels(self, rows: Rows, sets: Sequence[Sequence[str]], label_index: dict[str, int]) -> None:
        problem = "is not in data.source.table.classes" if self.classes else "is not a class of the training rows"
        check_problems(
            f"{rows.location(i)}: {escape(label)!r} {problem}"
            for i, labels in enumerate(sets)
            for label in labels
            if label not in label_index
        )

    def _list_problems(self, rows: Rows, sets: list[list[str]]) -> Iterator[str]:
        """Yield a line for each label that is a list itself: with another separator, or in Python's or JSON's brackets.

        A separator counts if one of the parts occurs in several labels.
        """
        part_counts = Counter(
            part for label in {label for labels in sets for label in labels} for part in _parts(label)
        )
        for i, labels in enumerate(sets):
            for label in labels:
                parts = _parts(label)
                has_known_part = len(parts) > 1 and max(part_counts[part] for part in parts) > 1
                if label[0] + label[-1] in _BRACKETS or has_known_part:
                    problem = f"is a list, and labels are separated by {self.separator!r} here (separator)"
                    yield f"{rows.location(i)}: {escape(label)!r} {problem}; or give `classes` if it is one label"

    def _say_joined_classes(self, rows: Rows, classes: set[str]) -> None:
        """Say which classes may be lists joined by blanks, + or &. No error: class names may contain these too."""
        parts_of_class = {name: [part for part in re.split(r"[\s+&]+", name) if part] for name in sorted(classes)}
        counts = Counter(part for parts in parts_of_class.values() for part in set(parts))
        joined = [
            name for name, parts in parts_of_class.items() if len(parts) > 1 and min(counts[part] for part in parts) > 1
        ]
        if joined:
            say(
                f"{escape(str(rows.path))}: {len(joined):,} classes such as {escape(joined[0])!r} look like "
                f"lists of others, and labels are separated by {self.separator!r} here (separator)"
            )


def _without_repeats(rows: Rows, columns: Sequence[str]) -> Rows:
    """Rows that repeat an earlier one in all `columns` say nothing new: they are left out, and said."""
    first_rows: dict[tuple[str, ...], int] = {}
    for i, cells in enumerate(zip(*(rows.columns[column] for column in columns), strict=True)):
        first_rows.setdefault(cells, i)
    if len(first_rows) == len(rows):
        return rows
    kept = list(first_rows.values())
    repeated = next(i for i, first in enumerate([*kept, len(rows)]) if i != first)
    count = format_count(len(rows) - len(kept), "row is left out, because it repeats", "rows are left out: they repeat")
    say(f"{rows.location(repeated)}: {count} an earlier one")
    cells_by_column = {name: [cells[i] for i in kept] for name, cells in rows.columns.items()}
    return Rows(rows.path, cells_by_column, [rows.lines[i] for i in kept])


def _are_splits(cells: Sequence[str]) -> bool:
    """Return whether all cells are names of splits, and name two splits or more."""
    return None not in (names := {parse_split_name(cell) for cell in set(cells)}) and len(names) > 1


def _parts(label: str) -> list[str]:
    """The parts of a label between common separators; the label alone if it has none of them."""
    return [part.strip() for part in re.split(r"[;,|/\t]", label) if part.strip()]


def _missing_value_problems(rows: Rows, columns: list[str]) -> Iterator[str]:
    """Yield a line for each cell that stands for a missing value, such as `nan`."""
    for column in columns:
        for i, cell in enumerate(rows.columns[column]):
            if problem := missing_value_problem(cell):
                yield f"{rows.location(i)}: {escape(column)} is {cell!r}, which {problem}"


def _row_splits(rows: Rows, column: str | None) -> list[str]:
    """The split of each row; train if there is no column. Raises DataError for other words, and if train is empty."""
    cells = rows.columns[column] if column else ["train"] * len(rows)
    splits = [parse_split_name(cell) for cell in cells]
    check_problems(
        f"{rows.location(i)}: split is {escape(cells[i])!r}; use train, val or test"
        for i, split in enumerate(splits)
        if split is None
    )
    if "train" not in splits:
        raise DataError(f"{rows.path}: no row is of the train split")
    return [split for split in splits if split]


def _number_groups(names: list[str]) -> Tensor:
    """A number for each name, int64 [N]; equal names have equal numbers."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def _cell_problems(
    rows: Rows, columns: list[str], image_column: str, path_problem: Callable[[str], str | None]
) -> Iterator[str]:
    """Yield a line for each empty cell in `columns`, and each image path that may not be used or is repeated."""
    for column in columns:
        for i, cell in enumerate(rows.columns[column]):
            if not cell.strip():
                yield f"{rows.location(i)}: {escape(column)} is empty"
    first_row: dict[str, int] = {}
    for i, path in enumerate(rows.columns[image_column]):
        if path.strip() and (problem := path_problem(path)):
            yield f"{rows.location(i)}: {escape(path)!r} {problem}"
        elif path in first_row:
            yield f"{rows.location(i)}: {escape(path)!r} is already in line {rows.lines[first_row[path]]}"
        first_row.setdefault(path, i)


def _refuse_bare_names(rows: Rows, column: str, root: Path) -> None:
    """Raise DataError if the paths are names without a suffix, such as Kaggle's ids, and not the names of files."""
    names = rows.columns[column]
    if not any(PurePath(name).suffix for name in names) and not (root / names[0]).exists():
        problem = f"has no suffix, and there is no such file in {escape(str(root))}"
        advice = "write the whole file name, or give what it lacks, such as `suffix: .png` (data.source.table)"
        raise DataError(f"{rows.location(0)}: {escape(column)} {escape(names[0])!r} {problem}; {advice}")
