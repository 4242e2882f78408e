"""What the commands about data do, as functions that return plain data; the command line prints it."""

from __future__ import annotations

import csv
import io
import os
import re
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import Folder, make_folder, storage_errors, write_new
from cnnrun.base.errors import ConfigError, DataError, UserError, printable, safe_cell
from cnnrun.base.file_list import Files, Members
from cnnrun.base.progress import bar
from cnnrun.base.randomness import key, permutation
from cnnrun.contracts.layer import Facts, Split
from cnnrun.contracts.task import TaskSpec
from cnnrun.data import cache, manifest
from cnnrun.data.audit import Finding, look_through
from cnnrun.data.dataset import HOLD_OUT_KEYS, HoldOut, Index, index
from cnnrun.data.hold_out import folds, held_out, sets_of_copies
from cnnrun.data.prepare import MOVED, Decoded, decode, prepare, settle
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.experiment.assemble import initial
from cnnrun.experiment.learnable import refuse_unlearnable
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.contact_sheet import sheet, write_png
from cnnrun.explain.figures.panels import marked, picture_of
from cnnrun.training.event_file import EventFile


def checked(experiment: Experiment, verify: Path | None, write: Path | None) -> dict[str, Any]:
    """The data looked through, and against a manifest where one is given."""
    try:
        indexed = index(experiment.data)
    except DataError:
        initial(experiment)  # training looks at the weights first, and says what is wrong with them alone
        raise
    found: dict[str, Any] = {"name": experiment.name}
    if verify or write:
        paths = manifest.files_of(_files(split) for split in indexed.sources())
        if not paths:
            raise DataError("this source has no files to list")
        root = _root(paths)
        if write:
            write_new(write, manifest.written(paths, root))
            found["manifest"] = str(write)
        if verify:
            found["differences"] = manifest.differences(verify, paths, root)
    # Everything is looked at, whatever the config would stop for.
    lenient = experiment.data.model_copy(update={"bad_files": "skip", "bad_boxes": "skip", "leakage": "keep"})
    decoded = decode(lenient, indexed, bar)
    refused = _refusal(experiment, indexed, decoded)
    try:
        dataset = settle(lenient, indexed, decoded)
    except DataError:
        refuse({"refused": refused, "findings": []})  # in the words of training, which may stop for another reason
        raise
    found |= look_through(experiment.data, dataset, bar)
    if decoded.moved:
        found["findings"].append(asdict(Finding("note", f"pictures {MOVED}", decoded.moved, [])))
    return found | {"refused": refused}


def _refusal(experiment: Experiment, indexed: Index, decoded: Decoded) -> dict[str, Any] | None:
    """What training would say and leave with, if it would not begin; None where it would."""
    try:
        given = initial(experiment)
        experiment = experiment.with_weights_of(given.facts if given else None)
        refuse_unlearnable(experiment, settle(experiment.data, indexed, decoded), given)
    except UserError as error:
        return {"lines": list(error.lines), "exit_code": error.exit_code}
    return None


def refuse(found: dict[str, Any]) -> None:
    """Raises DataError for a report with what training would refuse, or with files that are not the manifest's."""
    if refused := found["refused"]:
        error = DataError(*refused["lines"])
        error.exit_code = refused["exit_code"]
        raise error
    if any(found.get("differences", {}).values()) or any(each["level"] == "error" for each in found["findings"]):
        raise DataError("the data is not fit as it is: see above")


def shown(experiment: Experiment, count: int, times: int, out: Path, board: Path | None) -> dict[str, Any]:
    """Write a sheet of training pictures, as they are and as `times` epochs would see them."""
    data = prepare(experiment.data, index(experiment.data), bar)
    examples = data.splits["train"]
    samples = permutation(experiment.seed, 0, len(examples))[:count]
    batches = TrainingBatches(
        examples,
        experiment.data.augment,
        len(samples),
        1,
        experiment.seed,
        torch.device("cpu"),
        order=lambda seed, epoch: (samples, samples),
        blend=partial(experiment.task.blend, facts=data.facts),
    )
    own = examples.targets_of(samples, torch.device("cpu"))
    seen = [("as it is", examples.take(samples).float(), own)]
    for epoch in range(times):
        batch = batches.at(epoch)
        seen.append((f"epoch {epoch + 1}", batch.pictures, batch.targets))
    columns = [
        (title, _marked(pictures, targets, experiment.task, data.facts), experiment.task.words(targets, data.facts))
        for title, pictures, targets in seen
    ]
    made = sheet(columns)
    write_png(out, made, "cnnrun data show")
    if board:
        make_folder(board)
        with storage_errors(board, made.nbytes), closing(EventFile(Folder(board))) as writer:
            writer.add_image("data/sheet", made, 0)
    return {"path": str(out), "pictures": len(samples), "times": times, "tensorboard": str(board) if board else None}


def _marked(pictures: Tensor, targets: dict[str, Tensor], task: TaskSpec, facts: Facts) -> Tensor:
    """The pictures with the boxes of their targets drawn on, where the task has boxes."""
    marks = task.true_marks(targets, facts)
    if marks is None:
        return pictures
    drawn = [
        marked(picture_of(one), [replace(mark, text="") for mark in own])
        for one, own in zip(pictures, marks, strict=True)
    ]
    return torch.from_numpy(np.stack([np.asarray(one) for one in drawn])).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Parts:
    """How `data split` divides."""

    val: float
    test: float
    folds: int
    group_by: str | None
    seed: int


def divided(experiment: Experiment, parts: Parts, out: Path) -> dict[str, Any]:
    """Write a table with a split for each of the source's files; what it splits already stays so."""
    source = experiment.data.source
    if source.targets != "labels":
        raise DataError(f"{source.kind} cannot be divided into a table, which has one label a picture; use data.split")
    if experiment.data.split.by == "label":
        raise ConfigError("data split divides by picture; whole classes are held out by the config's own data.split")
    looked = index(experiment.data.model_copy(update={"split": HoldOut(val=0.0, test=0.0)}))
    indexed = looked.source
    paths = manifest.files_of(_files(each) for each in indexed.splits.values() if isinstance(each.pictures, Files))
    if not paths:
        raise DataError("only sources of picture files can be divided: folder and table")
    root, decoded = _root(paths), decode(experiment.data, looked, bar)
    rows: list[dict[str, str]] = []
    for name, split in indexed.splits.items():
        groups, written = _groups(split, parts.group_by)
        digests = decoded.stored[name].digests()
        columns = _columns(name, split, _with_copies(digests, groups), parts, set(indexed.splits))
        for number in range(len(split)):
            path = _path_cell(os.path.relpath(str(split.pictures[number]), root))
            label = indexed.classes[int(split.targets["labels"][number])]
            group = {"group": written[number]} if written else {}
            rows.append({"path": path, "label": label, **group, **{key: each[number] for key, each in columns.items()}})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: safe_cell(cell) for column, cell in row.items()} for row in rows)
    write_new(out, text.getvalue().encode())
    chosen = [column for column in rows[0] if column.startswith("fold_")] or ["split"]
    return {
        "path": str(out),
        "root": str(root),
        "classes": list(indexed.classes),
        "columns": {
            column: {name: sum(row[column] == name for row in rows) for name in ("train", "val", "test")}
            for column in chosen
        },
        "groups": len({row["group"] for row in rows}) if "group" in rows[0] else None,
    }


def _path_cell(path: str) -> str:
    """A path as a table holds it. Raises DataError for one that no table can name."""
    if printable(path) != path:
        raise DataError(
            f"{printable(path)}: a table cannot name a file with control characters or bytes that are no text"
        )
    return f"./{path}" if safe_cell(path) != path else path  # the same file, and no formula


def _with_copies(digests_N: NDArray[np.uint64], groups: Tensor | None) -> Tensor | None:
    """The groups, such that all copies of a picture are in one; None where there is neither a group nor a copy."""
    if len(np.unique(digests_N)) == len(digests_N):
        return groups
    return torch.from_numpy(sets_of_copies(digests_N, None if groups is None else groups.numpy()))


def _columns(name: str, split: Split, groups: Tensor | None, parts: Parts, there: set[str]) -> dict[str, list[str]]:
    """The columns of splits for one of the source's own: where a source has a val or test, that is kept."""
    of_folds = [f"fold_{number + 1}" for number in range(parts.folds)]
    if name != "train":
        return {column: [name] * len(split) for column in of_folds or ["split"]}
    labels = split.targets["labels"]
    made = np.full(len(split), "train", object)
    rest = torch.arange(len(split))
    for part, share in (("test", parts.test), ("val", 0.0 if parts.folds else parts.val)):
        if share and part not in there:
            held = held_out(
                labels[rest], None if groups is None else groups[rest], share, key(parts.seed, HOLD_OUT_KEYS[part])
            )
            made[rest[held].numpy()] = part
            rest = rest[~held]
    if not parts.folds:
        return {"split": made.tolist()}
    there_are = len(rest) if groups is None else len(groups[rest].unique())
    if there_are < parts.folds:
        raise DataError(f"{there_are} {'samples' if groups is None else 'groups'} are too few for {parts.folds} folds")
    fold = folds(labels[rest], None if groups is None else groups[rest], parts.folds, parts.seed)
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
        raise ConfigError(f"--group-by {printable(pattern)}: not a pattern ({error})") from None
    written = []
    for number in range(len(split)):
        found = find.search(str(split.pictures[number]))
        if not found:
            raise DataError(f"{printable(split.name(number))}: --group-by finds nothing in this path")
        written.append(found.group(1) if find.groups else found.group())
    numbers = {name: number for number, name in enumerate(dict.fromkeys(written))}
    return torch.tensor([numbers[name] for name in written]), written


def _files(split: Split) -> list[Path]:
    pictures = split.pictures
    if isinstance(pictures, Members):
        return list(pictures.shards)
    return [Path(path) for path in pictures] if isinstance(pictures, Files) else []


def _root(paths: list[Path]) -> Path:
    """The folder that all the files are in."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def cached(folder: str | None) -> dict[str, Any]:
    """What the cache holds."""
    where = Path(folder) if folder else cache.home()
    found = cache.entries(where) if where else []
    return {"folder": str(where), "entries": found, "bytes": sum(entry["bytes"] for entry in found)}


def cleared(folder: str | None, keys: list[str], everything: bool) -> dict[str, Any]:
    """Remove data sets from the cache: those whose key begins so, or all. Raises ConfigError."""
    there = cached(folder)
    known = [entry["key"] for entry in there["entries"]]
    if bool(keys) == everything:
        raise ConfigError("give the keys of what to remove (`cnnrun cache list` has them), or --all")
    chosen = known if everything else []
    for each in keys:
        found = [name for name in known if name.startswith(each)]
        if len(found) != 1:
            raise ConfigError(f"{printable(each)}: {len(found)} data sets have a key that begins so")
        chosen += found
    removed, left = cache.clear(Path(there["folder"]), chosen)
    freed = sum(entry["bytes"] for entry in there["entries"] if entry["key"] in removed)
    return {"folder": there["folder"], "removed": removed, "in_use": left, "bytes": freed}
