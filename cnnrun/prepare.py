"""Decoding a data set: what is left out of it, what leaks from one split to another, what is measured on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.audit import Columns, Leaks, leaks
from cnnrun.cache import Progress, at_once
from cnnrun.contracts import BadBox, Facts, Indexed, Shape, Split
from cnnrun.dataset import Data, Dataset, Examples, Index, counted, numbers_of, targets_of, told
from cnnrun.errors import DataError, printable
from cnnrun.files import Files
from cnnrun.labelling import MOST_LINES
from cnnrun.pictures import Image
from cnnrun.records import RECORD, digest, statistics, summarize
from cnnrun.store import Stored, content, listing, stored


def prepare(data: Data, indexed: Index, progress: Progress, only: Sequence[str] | None = None) -> Dataset:
    """Decode; leave out what the config lets; measure mean and deviation on the training pictures.

    `only` decodes those splits alone and measures nothing: for evaluating a network that knows its own statistics.
    Raises DataError.
    """
    shape = data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    refuse_bad_boxes(indexed, data.bad_boxes)
    listed = _listed(data, indexed)
    wanted = {name: pair for name, pair in indexed.splits.items() if only is None or name in only}
    once: dict[int, Stored] = {}
    for split, _ in wanted.values():
        if id(split) not in once:
            once[id(split)] = stored(split, shape, data.image, data, listed[id(split)], progress)
    by_name = {name: once[id(split)] for name, (split, _) in wanted.items()}
    splits, left_out = _without_bad(wanted, by_name, data.bad_files)
    facts = Facts(
        classes=indexed.source.classes,
        image=shape,
        class_counts=indexed.class_counts(),
        counts=indexed.counts,
        fingerprint=_fingerprint(indexed.source, listed),
        class_ids=indexed.source.class_ids,
        numbers=indexed.numbers(),
    )
    of_files = [(name, split, listed[id(split)]) for name, split in indexed.source.splits.items()]
    dataset = Dataset(
        facts,
        _examples(splits, by_name, shape, data.image),
        by_name,
        tuple(left_out),
        bad_boxes=indexed.source.bad_boxes,
        listed=tuple((name, split, found) for name, split, found in of_files if found is not None),
    )
    if only is not None:
        return dataset
    apart = data.split.by == "label"
    dataset = replace(dataset, notes=tuple(_remarks(dataset, apart)))
    return _measured(data.image, _without_leaks(dataset, data.leakage, apart))


def fingerprint(data: Data, indexed: Index) -> str:
    """The fingerprint that `prepare` gives the data, without decoding it."""
    return _fingerprint(indexed.source, _listed(data, indexed))


def _listed(data: Data, indexed: Index) -> dict[int, NDArray[np.int64] | None]:
    """Each split's files with their sizes and times, or hashes of their contents."""
    return {id(split): listing(split, data.fingerprint == "content", data.workers) for split in indexed.sources()}


def _examples(
    splits: dict[str, tuple[Split, Tensor]], kept: dict[str, Stored], shape: Shape, image: Image
) -> dict[str, Examples]:
    return {
        name: Examples(kept[name].pictures, rows, targets_of(split, rows, shape, image), split, rows)
        for name, (split, rows) in splits.items()
    }


def _measured(image: Image, dataset: Dataset) -> Dataset:
    """The data set with its final counts and the training pictures' mean and deviation. Raises DataError."""
    train, facts = dataset.splits["train"], dataset.facts
    counts = {name: len(examples) for name, examples in dataset.splits.items()}
    of_class = counted(train.targets, len(facts.classes))
    mean, std = _statistics(image, dataset)
    numbers = numbers_of([each.name for each in facts.numbers], train.targets)
    measured = replace(facts, mean=mean, std=std, counts=counts, class_counts=of_class, numbers=numbers)
    return replace(dataset, facts=measured)


def _without_bad(
    splits: dict[str, tuple[Split, Tensor]], kept: dict[str, Stored], policy: str
) -> tuple[dict[str, tuple[Split, Tensor]], list[dict[str, str]]]:
    """The splits without pictures that could not be decoded, and those; or all of them named in a DataError."""
    left_out: list[dict[str, str]] = []
    made = {}
    for name, (split, rows) in splits.items():
        good = rows[~torch.isin(rows, torch.tensor(list(kept[name].problems), dtype=torch.int64))]
        problems = kept[name].problems | _other_size(split, good, kept[name])
        bad = torch.isin(rows, torch.tensor(list(problems), dtype=torch.int64))
        for row in rows[bad].tolist():
            left_out.append({"split": name, "picture": split.name(row), "reason": problems[row]})
        made[name] = (split, rows[~bad])
        if bad.all():
            raise DataError(f"no picture of the {name} split can be decoded; the first: {problems[int(rows[0])]}")
    if left_out and policy == "error":
        more = [f"... and {len(left_out) - MOST_LINES} more files"] if len(left_out) > MOST_LINES else []
        lines = [each["reason"] for each in left_out[:MOST_LINES]]
        raise DataError(*lines, *more, "mend or remove them, or leave them out with data.bad_files: skip")
    return made, left_out


def _of_boxes(bad: Sequence[BadBox]) -> list[str]:
    """How many boxes are left out, and cut, with an example of each."""
    out, cut = [each for each in bad if not each.cut], [each for each in bad if each.cut]
    return [
        f"{len(found):,} boxes {what}, such as {found[0].name}: {found[0].what}"
        for found, what in ((out, "are left out (data.bad_boxes: skip)"), (cut, "are cut at their pictures' edges"))
        if found
    ]


def refuse_bad_boxes(indexed: Index, policy: str) -> None:
    """Raises DataError with the boxes that cannot be used, unless they are to be left out."""
    wrong = [each for each in indexed.source.bad_boxes if not each.cut]
    if wrong and policy == "error":
        more = [f"... and {len(wrong) - MOST_LINES} more boxes"] if len(wrong) > MOST_LINES else []
        lines = [f"{each.name}: {each.what}" for each in wrong[:MOST_LINES]]
        raise DataError(*lines, *more, "mend or remove them, or leave them out with data.bad_boxes: skip")


def _other_size(split: Split, rows: Tensor, kept: Stored) -> dict[int, str]:
    """The pictures that are not of the size that their boxes are written for."""
    if split.sizes is None or kept.records is None or not isinstance(split.pictures, Files):
        return {}
    records = kept.records()
    real = np.stack([records["height"], records["width"]], 1)[rows.numpy()]
    written = split.sizes[rows.numpy()]
    return {
        int(rows[place]): f"{printable(split.name(int(rows[place])))}: is {real[place][1]}x{real[place][0]} pixels; "
        f"its boxes are written for {written[place][1]}x{written[place][0]}"
        for place in np.flatnonzero((real != written).any(1))
    }


def _remarks(dataset: Dataset, apart: bool) -> list[str]:
    """What else is worth a line before training: classes that a split lacks, files that are not what they are named."""
    lines, classes = _of_boxes(dataset.bad_boxes), dataset.facts.classes
    for split, examples in dataset.splits.items():
        if not apart and (counts := counted(examples.targets, len(classes))):
            missing = [name for name, count in zip(classes, counts, strict=True) if not count]
            what = "picture" if "labels" in examples.targets else "object"
            lines += [f"no {what} of {', '.join(map(printable, missing[:5]))} in {split}"] if missing else []
        kept = dataset.stored[split].records
        misnamed: Any = [] if kept is None else np.flatnonzero(kept()["misnamed"][examples.rows.numpy()])
        if len(misnamed):
            name = printable(examples.name(int(misnamed[0])))
            lines.append(f"{len(misnamed):,} file(s) of {split} are of another format than named, such as {name}")
    return lines


def columns(dataset: Dataset) -> Columns:
    """The samples of all splits as an audit wants them."""
    parts = list(dataset.splits.items())

    def joined(values: list[Any], kind: Any = np.int64) -> NDArray[Any]:
        return np.concatenate([np.asarray(value, kind) for value in values])

    return Columns(
        tuple(name for name, _ in parts),
        joined([np.full(len(each), number) for number, (_, each) in enumerate(parts)]),
        joined([np.arange(len(each)) for _, each in parts]),
        joined([_labels(each) for _, each in parts]),
        joined([_groups(each) for _, each in parts]),
        joined([_digests(each, dataset.stored[name]) for name, each in parts], np.uint64),
    )


def _labels(examples: Examples) -> Tensor:
    """What no picture may have two of; boxes are drawn as people see them, and do not count."""
    return torch.zeros(len(examples)) if "boxes" in examples.targets else told(examples.targets, len(examples))


def _groups(examples: Examples) -> Tensor:
    groups = examples.source.groups
    return torch.full((len(examples),), -1) if groups is None else groups[examples.source_rows]


def _digests(examples: Examples, kept: Stored) -> NDArray[np.uint64]:
    """A hash of each picture's pixels, as the network sees them: uint64 [N]."""
    if kept.records is not None:
        return np.ascontiguousarray(kept.records()["pixels"][examples.rows.numpy()])
    parts = torch.arange(len(examples)).split(at_once(int(np.prod(examples.pictures.shape))))
    return np.array([digest(one.numpy().tobytes()) for part in parts for one in examples.take(part)], np.uint64)


def _without_leaks(dataset: Dataset, policy: str, apart: bool) -> Dataset:
    """The data set once its leaks are dealt with as the config says. Raises DataError."""
    table = columns(dataset)
    found = leaks(table, apart)
    if not found:
        count, more = len(table.split_N), ", no class in two splits" if apart else ""
        note = (
            f"{count:,} pictures: none in two splits, none under two labels{more} (`cnnrun data check` looks further)"
        )
        return replace(dataset, notes=(note, *dataset.notes))
    lines = _described(dataset, table, found)
    if policy == "error":
        raise DataError(
            *lines, "mend the data, leave such pictures out of training (data.leakage: skip), or keep them (keep)"
        )
    if policy == "keep":
        return replace(dataset, notes=(*lines, *dataset.notes))
    test = table.split_N != table.splits.index("train")
    if apart_still := [group for group in found.shared if len(set(table.split_N[group][test[group]])) > 1]:
        raise DataError(*lines, f"{len(apart_still):,} class(es) are both in val and in test: mend the data")
    groups = [*found.across, *found.conflicts, *found.torn, *found.shared]
    drop = np.unique(np.concatenate([table.in_train(group) for group in groups]))
    train = dataset.splits["train"]
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[torch.from_numpy(table.index_N[drop])] = False
    if not kept.any():
        raise DataError(*lines, "no training picture is left without them")
    out = [{"split": "train", "picture": train.name(int(table.index_N[i])), "reason": "leakage"} for i in drop]
    splits = dataset.splits | {"train": train.only(kept)}
    notes = (*lines, *dataset.notes, f"{len(out):,} of them are left out of training (data.leakage: skip)")
    return replace(dataset, splits=splits, left_out=(*dataset.left_out, *out), notes=notes)


def _described(dataset: Dataset, table: Columns, found: Leaks) -> list[str]:
    """A line a kind of leak, with how many and an example."""

    def shown(sample: int) -> str:
        split, number = table.place(sample)
        each = dataset.splits[split]
        label = int(table.label_N[sample])
        name = dataset.facts.classes[label] if "labels" in each.targets and dataset.facts.classes else ""
        return printable(f"{each.name(number)} ({split}{', ' if name else ''}{name})")

    def pair(group: NDArray[np.int64], over: NDArray[np.int64]) -> str:
        other = group[over[group] != over[group[0]]][0]
        return f"{shown(int(group[0]))} and {shown(int(other))}"

    kinds = (
        (found.across, table.split_N, "picture(s) in more than one split"),
        (found.conflicts, table.label_N, "picture(s) under more than one label"),
        (found.torn, table.split_N, "group(s) in more than one split"),
        (found.shared, table.split_N, "class(es), such as people, in more than one split"),
    )
    return [f"{len(groups):,} {what}, such as {pair(groups[0], over)}" for groups, over, what in kinds if groups]


def _statistics(image: Image, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation as the config gives them, or else as measured on the training pictures."""
    if image.mean is not None and image.std is not None:
        return tuple(image.mean), tuple(image.std)
    mean, std = statistics_of(dataset)
    if min(std) == 0:
        raise DataError("every training picture has one and the same colour; there is nothing to learn from")
    return tuple(image.mean or mean), tuple(image.std or std)


def statistics_of(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over the training pictures."""
    train, kept = dataset.splits["train"], dataset.stored["train"]
    if kept.records is None:
        total, squares = _sums(train)
    else:
        records, channels = kept.records()[train.rows.numpy()], train.pictures.shape[0]
        total, squares = records["total"][:, :channels], records["squares"][:, :channels]
    return statistics(total, squares, int(np.prod(train.pictures.shape[1:])))


def _sums(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums over the pixels of each picture and channel, and of their squares: int64 [N, C] each."""
    made = np.zeros(len(examples), RECORD)
    for part in torch.arange(len(examples)).split(at_once(int(np.prod(examples.pictures.shape)))):
        summarize(made[part[0] : part[-1] + 1], examples.take(part).numpy())
    channels = examples.pictures.shape[0]
    return made["total"][:, :channels], made["squares"][:, :channels]


def _fingerprint(indexed: Indexed, listed: dict[int, NDArray[np.int64] | None]) -> str:
    """A digest of what the data is: names, sizes and times of files, or the pixels themselves, and every target."""
    made = hashlib.sha256(repr(indexed.classes + indexed.numbers).encode())
    for name, split in sorted(indexed.splits.items()):
        made.update(name.encode() + content(split, listed[id(split)]))
        for target, values in sorted(split.targets.items()):
            made.update(target.encode() + values.numpy().tobytes())
    return made.hexdigest()
