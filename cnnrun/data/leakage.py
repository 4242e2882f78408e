"""Leaks of a decoded data set from one split to another, and what the config wants done about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.source import Split
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.duplicates import Leaks, SampleTable, find_leaks, group_by_value
from cnnrun.data.hold_out import group_copies, keep_sets_together
from cnnrun.data.index import SourceIndex
from cnnrun.data.storage import StoredSplit
from cnnrun.data.targets import labels_or_zeros, target_codes


def build_sample_table(dataset: Dataset) -> SampleTable:
    """The samples of all splits as an audit wants them."""
    parts = list(dataset.splits.items())

    def joined(values: list[Any], kind: Any = np.int64) -> NDArray[Any]:
        return np.concatenate([np.asarray(value, kind) for value in values])

    return SampleTable(
        tuple(name for name, _ in parts),
        joined([np.full(len(each), number) for number, (_, each) in enumerate(parts)]),
        joined([np.arange(len(each)) for _, each in parts]),
        joined([_labels(each) for _, each in parts]),
        joined([_groups(each) for _, each in parts]),
        joined([dataset.stored_splits[name].digests()[each.rows.numpy()] for name, each in parts], np.uint64),
    )


def _labels(examples: Examples) -> Tensor:
    """A number for each picture that its copies must share; 0 with boxes, which people draw as they see them."""
    return (
        torch.zeros(len(examples))
        if examples.objects is not None
        else target_codes(examples.targets, None, len(examples))
    )


def _groups(examples: Examples) -> Tensor:
    groups = examples.source.groups
    return torch.full((len(examples),), -1) if groups is None else groups[examples.source_rows]


def find_differing_boxes(dataset: Dataset, table: SampleTable) -> list[NDArray[np.int64]]:
    """Sets of samples that are one picture, with other boxes each: what one is taught is background to the other."""
    if dataset.splits["train"].objects is None:
        return []
    return [
        group
        for group in group_by_value(table.digest_N)
        if len({_objects_of(dataset, table, int(n)) for n in group}) > 1
    ]


def _objects_of(dataset: Dataset, table: SampleTable, sample: int) -> bytes:
    split, number = table.locate(sample)
    objects = dataset.splits[split].objects
    assert objects is not None
    own = objects.select(torch.tensor([number])).columns
    return b"".join(own[name].numpy().tobytes() for name in ("boxes", "objects"))


def apply_leakage_policy(dataset: Dataset, policy: str, apart: bool) -> Dataset:
    """The data set once its leaks are dealt with as the config says. Raises DataError."""
    table = build_sample_table(dataset)
    if differing := find_differing_boxes(dataset, table):
        example = " and ".join(_named(dataset, table, int(sample)) for sample in differing[0][:2])
        note = f"{len(differing):,} picture(s) stand again with other boxes, such as {example}"
        dataset = replace(dataset, notes=(note, *dataset.notes))
    found = find_leaks(table, apart)
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
    if apart_still := [
        group for group in found.classes_across_splits if len(set(table.split_N[group][test[group]])) > 1
    ]:
        raise DataError(*lines, f"{len(apart_still):,} class(es) are both in val and in test: mend the data")
    groups = [
        *found.copies_across_splits,
        *found.label_conflicts,
        *found.groups_across_splits,
        *found.classes_across_splits,
    ]
    drop = np.unique(np.concatenate([table.select_train(group) for group in groups]))
    train = dataset.splits["train"]
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[torch.from_numpy(table.index_N[drop])] = False
    if not kept.any():
        raise DataError(*lines, "no training picture is left without them")
    out = [{"split": "train", "picture": train.sample_name(int(table.index_N[i])), "reason": "leakage"} for i in drop]
    splits = dataset.splits | {"train": train.select(kept)}
    notes = (*lines, *dataset.notes, f"{len(out):,} of them are left out of training (data.leakage: skip)")
    return replace(dataset, splits=splits, skipped_samples=(*dataset.skipped_samples, *out), notes=notes)


def _named(dataset: Dataset, table: SampleTable, sample: int) -> str:
    split, number = table.locate(sample)
    each = dataset.splits[split]
    label = int(table.label_N[sample])
    name = dataset.facts.classes[label] if "labels" in each.targets and dataset.facts.classes else ""
    return escape(f"{each.sample_name(number)} ({split}{', ' if name else ''}{name})")


def _described(dataset: Dataset, table: SampleTable, found: Leaks) -> list[str]:
    """A line a kind of leak, with how many and an example."""

    def pair(group: NDArray[np.int64], over: NDArray[np.int64]) -> str:
        other = group[over[group] != over[group[0]]][0]
        return f"{_named(dataset, table, int(group[0]))} and {_named(dataset, table, int(other))}"

    kinds = (
        (found.copies_across_splits, table.split_N, "picture(s) in more than one split"),
        (found.label_conflicts, table.label_N, "picture(s) under more than one label"),
        (found.groups_across_splits, table.split_N, "group(s) in more than one split"),
        (found.classes_across_splits, table.split_N, "class(es), such as people, in more than one split"),
    )
    return [f"{len(groups):,} {what}, such as {pair(groups[0], over)}" for groups, over, what in kinds if groups]


def move_copies_together(
    indexed: SourceIndex, wanted: dict[str, tuple[Split, Tensor]], stored: dict[int, StoredSplit]
) -> tuple[dict[str, tuple[Split, Tensor]], int]:
    """The splits that we hold out of train, with all copies of a picture on one side; and how many pictures moved.

    Whoever divides pictures by chance puts some copies on both sides, and what is measured there has been learned.
    """
    names = ["train", *sorted(indexed.held_out_splits)]
    if len(names) < 2 or indexed.has_held_out_classes or not any(name in wanted for name in names):
        return wanted, 0
    split, _ = indexed.splits["train"]
    side_N = np.full(len(split), -1)
    for number, name in enumerate(names):
        side_N[indexed.splits[name][1].numpy()] = number
    kept = stored[id(split)]
    sets_N = group_copies(kept.digests(), None if split.groups is None else split.groups.numpy())
    together_N = keep_sets_together(side_N, sets_N, labels_or_zeros(split).numpy())
    moved = int((together_N != side_N).sum())
    if not moved:
        return wanted, 0
    made = {name: (split, torch.from_numpy(np.flatnonzero(together_N == n))) for n, name in enumerate(names)}
    return {name: made.get(name, pair) for name, pair in wanted.items()}, moved
