"""A table with a split for each of a source's images, as `cnnrun data split` writes it for `source: table`."""

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
from cnnrun.data import manifest
from cnnrun.data.hold_out import assign_folds, group_copies, hold_out_samples
from cnnrun.data.index import HOLD_OUT_KEYS, index_source
from cnnrun.data.prepare import decode_splits
from cnnrun.data.settings import Data, HoldOut

Row = dict[str, str]


@dataclass(frozen=True)
class Shares:
    """How a table divides: the parts of val and test, or a number of folds; what stays together; the seed."""

    val: float
    test: float
    folds: int
    group_by: str | None
    seed: int


def write_split_table(data: Data, shares: Shares, out: Path) -> dict[str, Any]:
    """Write a row for each image file of the source; a split that the source has already is kept.

    Raises DataError, ConfigError.
    """
    source = data.source
    if source.target_kind != "labels":
        raise DataError(f"{source.kind} cannot be divided into a table, which has one label a picture; use data.split")
    if data.split.by == "label":
        raise ConfigError("data split divides by picture; whole classes are held out by the config's own data.split")
    whole = index_source(data.model_copy(update={"split": HoldOut(val=0.0, test=0.0)}))
    splits = whole.contents.splits
    paths = manifest.list_unique_files(split for split in splits.values() if isinstance(split.images, Files))
    if not paths:
        raise DataError("only sources of picture files can be divided: folder and table")
    root, decoded = manifest.common_folder(paths), decode_splits(data, whole, progress_bar)
    rows: list[Row] = []
    for name, split in splits.items():
        groups, written = _groups(split, shares.group_by)
        together = _with_copies(decoded.stored_splits[name].digests(), groups)
        columns = _columns(name, split, together, shares, set(splits))
        rows += _rows(split, root, whole.contents.classes, written, columns)
    write_new_file(out, _csv(rows))
    chosen = [column for column in rows[0] if column.startswith("fold_")] or ["split"]
    return {
        "path": str(out),
        "root": str(root),
        "classes": list(whole.contents.classes),
        "columns": {
            column: {name: sum(row[column] == name for row in rows) for name in ("train", "val", "test")}
            for column in chosen
        },
        "groups": len({row["group"] for row in rows}) if "group" in rows[0] else None,
    }


def _rows(
    split: Split, root: Path, classes: tuple[str, ...], groups: list[str] | None, columns: dict[str, list[str]]
) -> list[Row]:
    """A row for each sample: its path, label, group if there are groups, and split columns."""
    rows = []
    for number in range(len(split)):
        path = _path_cell(os.path.relpath(str(split.images[number]), root))
        label = classes[int(split.targets["labels"][number])]
        group = {"group": groups[number]} if groups else {}
        rows.append({"path": path, "label": label, **group, **{name: each[number] for name, each in columns.items()}})
    return rows


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: escape_cell(cell) for column, cell in row.items()} for row in rows)
    return text.getvalue().encode()


def _path_cell(path: str) -> str:
    """A path as a table holds it. Raises DataError for one that no table can name."""
    if escape(path) != path:
        raise DataError(f"{escape(path)}: a table cannot name a file with control characters or bytes that are no text")
    return f"./{path}" if escape_cell(path) != path else path  # the same file, and no formula


def _with_copies(digests_N: NDArray[np.uint64], groups: Tensor | None) -> Tensor | None:
    """The groups, such that all copies of a picture are in one; None where there is neither a group nor a copy."""
    if len(np.unique(digests_N)) == len(digests_N):
        return groups
    return torch.from_numpy(group_copies(digests_N, None if groups is None else groups.numpy()))


def _columns(
    name: str, split: Split, groups: Tensor | None, shares: Shares, existing: set[str]
) -> dict[str, list[str]]:
    """The columns of splits for one of the source's own: where a source has a val or test, that is kept."""
    of_folds = [f"fold_{number + 1}" for number in range(shares.folds)]
    if name != "train":
        return {column: [name] * len(split) for column in of_folds or ["split"]}
    labels = split.targets["labels"]
    made = np.full(len(split), "train", object)
    rest = torch.arange(len(split))
    for part, share in (("test", shares.test), ("val", 0.0 if shares.folds else shares.val)):
        if share and part not in existing:
            held = hold_out_samples(
                labels[rest],
                None if groups is None else groups[rest],
                share,
                derive_key(shares.seed, HOLD_OUT_KEYS[part]),
            )
            made[rest[held].numpy()] = part
            rest = rest[~held]
    if not shares.folds:
        return {"split": made.tolist()}
    left = len(rest) if groups is None else len(groups[rest].unique())
    if left < shares.folds:
        raise DataError(f"{left} {'samples' if groups is None else 'groups'} are too few for {shares.folds} folds")
    fold = assign_folds(labels[rest], None if groups is None else groups[rest], shares.folds, shares.seed)
    columns = {}
    for number, column in enumerate(of_folds):
        columns[column] = made.copy()
        columns[column][rest[fold == number].numpy()] = "val"
    return {column: values.tolist() for column, values in columns.items()}


def _groups(split: Split, pattern: str | None) -> tuple[Tensor | None, list[str] | None]:
    """Each sample's group as a number and as text: the source's own, or what a pattern finds in its path."""
    if pattern is None:
        return split.groups, None if split.groups is None else [str(group) for group in split.groups.tolist()]
    try:
        find = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {escape(pattern)}: not a pattern ({error})") from None
    written = []
    for number in range(len(split)):
        found = find.search(str(split.images[number]))
        if not found:
            raise DataError(f"{escape(split.sample_name(number))}: --group-by finds nothing in this path")
        written.append(found.group(1) if find.groups else found.group())
    numbers = {name: number for number, name in enumerate(dict.fromkeys(written))}
    return torch.tensor([numbers[name] for name in written]), written
