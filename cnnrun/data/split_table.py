"""Split tables: a split for each of a source's images, as `cnnrun data split` writes them for `source: table`."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import write_new_file
from cnnrun.base.errors import ConfigError, DataError, escape, escape_cell
from cnnrun.base.file_sequences import Files
from cnnrun.base.progress import progress_bar
from cnnrun.base.randomness import derive_key
from cnnrun.contracts.source import Split
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data import manifest
from cnnrun.data.hold_out import assign_folds, group_copies, hold_out_samples
from cnnrun.data.index import HOLD_OUT_KEYS, index_source
from cnnrun.data.prepare import decode_splits
from cnnrun.data.settings import Data, HoldOut

Row = dict[str, str]


@dataclass(frozen=True)
class SplitTableSettings:
    """Settings of a split table: fractions of val and test, or a number of folds; a pattern for groups; the seed."""

    val: float
    test: float
    folds: int
    group_by: str | None
    seed: int


def write_split_table(data: Data, shares: SplitTableSettings, out: Path) -> dict[str, Any]:
    """Write a row for each image file of the source. Splits that the source has already are kept.

    Raises DataError for sources that no table can hold, and ConfigError for settings that do not fit.
    """
    source = data.source
    if source.target_kind is not TargetKind.LABELS:
        raise DataError(
            f"{source.kind} cannot be divided into a table, which has one label for each image; use data.split"
        )
    if data.split.by == "label":
        raise ConfigError(
            "cnnrun data split cannot use data.split.by: label; remove that line, or train with the config as it is"
        )
    source_index = index_source(data.model_copy(update={"split": HoldOut(val=0.0, test=0.0)}))
    splits = source_index.contents.splits
    paths = manifest.list_unique_files(split for split in splits.values() if isinstance(split.images, Files))
    if not paths:
        raise DataError("only sources of image files can be divided: folder and table")
    root, decoded = manifest.common_folder(paths), decode_splits(data, source_index, progress_bar)
    rows: list[Row] = []
    for name, split in splits.items():
        groups, group_names = _read_groups(split, shares.group_by)
        sets = _join_copies(decoded.stored_splits[name].digests(), groups)
        columns = _split_columns(name, split, sets, shares, set(splits))
        rows += _table_rows(split, root, source_index.contents.classes, group_names, columns)
    write_new_file(out, _format_csv(rows))
    split_columns = [column for column in rows[0] if column.startswith("fold_")] or ["split"]
    return {
        "path": str(out),
        "root": str(root),
        "classes": list(source_index.contents.classes),
        "columns": {
            column: {name: sum(row[column] == name for row in rows) for name in ("train", "val", "test")}
            for column in split_columns
        },
        "groups": len({row["group"] for row in rows}) if "group" in rows[0] else None,
    }


def _table_rows(
    split: Split, root: Path, classes: tuple[str, ...], groups: list[str] | None, columns: dict[str, list[str]]
) -> list[Row]:
    """A row for each sample: its path, label, group if there are groups, and split columns."""
    rows = []
    for index in range(len(split)):
        path = _path_cell(os.path.relpath(str(split.images[index]), root))
        label = classes[int(split.targets["labels"][index])]
        group = {"group": groups[index]} if groups else {}
        splits = {name: column[index] for name, column in columns.items()}
        rows.append({"path": path, "label": label, **group, **splits})
    return rows


def _format_csv(rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: escape_cell(cell) for column, cell in row.items()} for row in rows)
    return text.getvalue().encode()


def _path_cell(path: str) -> str:
    """A path as a cell of the table. Raises DataError for a path that no table can hold."""
    if escape(path) != path:
        raise DataError(
            f"{escape(path)}: a table cannot name a file with control characters or bytes that are not text"
        )
    return f"./{path}" if escape_cell(path) != path else path  # `./` keeps spreadsheets from reading a formula


def _join_copies(digests_N: NDArray[np.uint64], groups: Tensor | None) -> Tensor | None:
    """Join groups so that all copies of an image are in one. None if there are neither groups nor copies."""
    if len(np.unique(digests_N)) == len(digests_N):
        return groups
    return torch.from_numpy(group_copies(digests_N, None if groups is None else groups.numpy()))


def _split_columns(
    name: str, split: Split, groups: Tensor | None, shares: SplitTableSettings, existing: set[str]
) -> dict[str, list[str]]:
    """The split of each sample, a column for each fold. Only the source's train split is divided."""
    fold_columns = [f"fold_{number + 1}" for number in range(shares.folds)]
    if name != "train":
        return {column: [name] * len(split) for column in fold_columns or ["split"]}
    labels = split.targets["labels"]
    names_N = np.full(len(split), "train", object)
    rest = torch.arange(len(split))
    for held_out, fraction in (("test", shares.test), ("val", 0.0 if shares.folds else shares.val)):
        if fraction and held_out not in existing:
            seed = derive_key(shares.seed, HOLD_OUT_KEYS[held_out])
            rest_groups = None if groups is None else groups[rest]
            is_held_out = hold_out_samples(labels[rest], rest_groups, fraction, seed)
            names_N[rest[is_held_out].numpy()] = held_out
            rest = rest[~is_held_out]
    if not shares.folds:
        return {"split": names_N.tolist()}
    rest_count = len(rest) if groups is None else len(groups[rest].unique())
    if rest_count < shares.folds:
        unit = "samples" if groups is None else "groups"
        raise DataError(f"{rest_count} {unit} are too few for {shares.folds} folds")
    fold = assign_folds(labels[rest], None if groups is None else groups[rest], shares.folds, shares.seed)
    columns = {}
    for number, column in enumerate(fold_columns):
        columns[column] = names_N.copy()
        columns[column][rest[fold == number].numpy()] = "val"
    return {column: values.tolist() for column, values in columns.items()}


def _read_groups(split: Split, pattern: str | None) -> tuple[Tensor | None, list[str] | None]:
    """Each sample's group as a number and as text: from the source, or the match of a pattern in its path."""
    if pattern is None:
        return split.groups, None if split.groups is None else [str(group) for group in split.groups.tolist()]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {escape(pattern)}: not a pattern ({error})") from None
    names = []
    for index in range(len(split)):
        match = expression.search(str(split.images[index]))
        if not match:
            raise DataError(f"{escape(split.sample_name(index))}: --group-by finds nothing in this path")
        names.append(match.group(1) if expression.groups else match.group())
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names]), names
