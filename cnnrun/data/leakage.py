"""Leaks between the splits of a decoded data set, and the policy of the config for them: refuse, skip or keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.source import Split
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.duplicates import Leaks, SampleTable, find_leaks, group_by_value
from cnnrun.data.hold_out import group_copies, keep_sets_together
from cnnrun.data.index import SourceIndex
from cnnrun.data.storage import StoredSplit
from cnnrun.data.targets import labels_or_zeros, target_codes


def build_sample_table(dataset: Dataset) -> SampleTable:
    """Make a table of the samples of all splits, for the search for leaks and duplicates."""
    splits = list(dataset.splits.items())

    def join(columns: list[Any], dtype: Any = np.int64) -> NDArray[Any]:
        return np.concatenate([np.asarray(column, dtype) for column in columns])

    return SampleTable(
        tuple(name for name, _ in splits),
        join([np.full(len(examples), index) for index, (_, examples) in enumerate(splits)]),
        join([np.arange(len(examples)) for _, examples in splits]),
        join([_labels(examples) for _, examples in splits]),
        join([_groups(examples) for _, examples in splits]),
        join([dataset.stored_splits[name].digests()[examples.rows.numpy()] for name, examples in splits], np.uint64),
    )


def _labels(examples: Examples) -> Tensor:
    """Code of each sample's targets, equal for equal targets; 0 for boxes: annotators never draw a box twice alike."""
    return (
        torch.zeros(len(examples))
        if examples.objects is not None
        else target_codes(examples.targets, None, len(examples))
    )


def _groups(examples: Examples) -> Tensor:
    """Each sample's group, or -1 for samples without groups."""
    groups = examples.source.groups
    return torch.full((len(examples),), -1) if groups is None else groups[examples.source_rows]


def find_differing_boxes(dataset: Dataset, table: SampleTable) -> list[NDArray[np.int64]]:
    """Find copies of an image that have different boxes, so that an object of one copy is background in another."""
    if dataset.splits["train"].objects is None:
        return []
    return [
        group
        for group in group_by_value(table.digest_N)
        if len({_object_bytes(dataset, table, int(sample)) for sample in group}) > 1
    ]


def _object_bytes(dataset: Dataset, table: SampleTable, sample: int) -> bytes:
    """The boxes and classes of a sample's objects as bytes, to compare them."""
    split, index = table.locate(sample)
    objects = dataset.splits[split].objects
    assert objects is not None
    columns = objects.select(torch.tensor([index])).columns
    return b"".join(columns[name].numpy().tobytes() for name in ("boxes", "objects"))


def apply_leakage_policy(dataset: Dataset, policy: str, has_disjoint_classes: bool) -> Dataset:
    """Apply `data.leakage` to the leaks of a data set. Raises DataError for leaks that the policy does not allow."""
    table = build_sample_table(dataset)
    if differing := find_differing_boxes(dataset, table):
        example = " and ".join(describe_sample(dataset, table, int(sample)) for sample in differing[0][:2])
        images = format_count(len(differing), "image occurs", "images occur")
        note = f"{images} more than once with different boxes, such as {example}"
        dataset = replace(dataset, notes=(note, *dataset.notes))
    leaks = find_leaks(table, has_disjoint_classes)
    if not leaks:
        classes = ", no class in two splits" if has_disjoint_classes else ""
        note = (
            f"{format_count(len(table.split_N), 'image')}: none in two splits, none under two labels{classes} "
            "(`cnnrun data check` looks further)"
        )
        return replace(dataset, notes=(note, *dataset.notes))
    lines = _describe_leaks(dataset, table, leaks)
    if policy == "error":
        raise DataError(
            *lines, "fix the data, leave such images out of training (data.leakage: skip), or keep them (keep)"
        )
    if policy == "keep":
        return replace(dataset, notes=(*lines, *dataset.notes))
    return _skip_leaks(dataset, table, leaks, lines)


def _skip_leaks(dataset: Dataset, table: SampleTable, leaks: Leaks, lines: list[str]) -> Dataset:
    """Leave the training samples of all leaks out.

    Raises DataError with `lines` if a class is in both val and test, or if no training sample is left. Other leaks
    between val and test are only noted.
    """
    is_measured = table.split_N != table.splits.index("train")
    if in_val_and_test := [
        group for group in leaks.classes_across_splits if len(set(table.split_N[group][is_measured[group]])) > 1
    ]:
        classes = format_count(len(in_val_and_test), "class is", "classes are")
        raise DataError(*lines, f"{classes} both in val and in test: fix the data")
    groups = [
        *leaks.copies_across_splits,
        *leaks.label_conflicts,
        *leaks.groups_across_splits,
        *leaks.classes_across_splits,
    ]
    dropped = np.unique(np.concatenate([table.select_train(group) for group in groups]))
    train = dataset.splits["train"]
    is_kept = torch.ones(len(train), dtype=torch.bool)
    is_kept[torch.from_numpy(table.index_N[dropped])] = False
    if not is_kept.any():
        raise DataError(*lines, "every training image is part of a leak, so none would be left: fix the data")
    skipped = [
        {"split": "train", "picture": train.sample_name(int(table.index_N[sample])), "reason": "leakage"}
        for sample in dropped
    ]
    splits = dataset.splits | {"train": train.select(is_kept)}
    left_out = format_count(len(skipped), "training image is", "training images are")
    notes = (*lines, f"{left_out} left out because of this (data.leakage: skip)", *dataset.notes)
    return replace(dataset, splits=splits, skipped_samples=(*dataset.skipped_samples, *skipped), notes=notes)


def describe_sample(dataset: Dataset, table: SampleTable, sample: int) -> str:
    """Describe a sample by its file (or its index in the source), its split and its class."""
    split, index = table.locate(sample)
    examples = dataset.splits[split]
    label = int(table.label_N[sample])
    class_name = dataset.facts.classes[label] if "labels" in examples.targets and dataset.facts.classes else ""
    return escape(f"{examples.sample_name(index)} ({split}{', ' if class_name else ''}{class_name})")


def _describe_leaks(dataset: Dataset, table: SampleTable, leaks: Leaks) -> list[str]:
    """A line for each kind of leak, with a count and an example."""

    def describe_pair(group: NDArray[np.int64], values_N: NDArray[np.int64]) -> str:
        second = group[values_N[group] != values_N[group[0]]][0]
        first_name, second_name = (describe_sample(dataset, table, int(sample)) for sample in (group[0], second))
        return f"{first_name} and {second_name}"

    kinds = (
        (leaks.copies_across_splits, table.split_N, "image", "images", "in more than one split"),
        (leaks.label_conflicts, table.label_N, "image", "images", "under more than one label"),
        (leaks.groups_across_splits, table.split_N, "group", "groups", "in more than one split"),
        (leaks.classes_across_splits, table.split_N, "class", "classes", "in more than one split"),
    )
    return [
        f"{format_count(len(groups), noun, plural)} {place}, such as {describe_pair(groups[0], values_N)}"
        for groups, values_N, noun, plural, place in kinds
        if groups
    ]


def move_copies_together(
    source_index: SourceIndex, splits: dict[str, tuple[Split, Tensor]], stored: dict[int, StoredSplit]
) -> tuple[dict[str, tuple[Split, Tensor]], int]:
    """Move all copies of an image to one of the held-out splits; returns the splits and the number of moved images.

    Otherwise an image in val or test may be a copy of a training image. Only splits held out of train are changed.
    """
    names = ["train", *sorted(source_index.held_out_splits)]
    if len(names) < 2 or source_index.has_held_out_classes or not any(name in splits for name in names):
        return splits, 0
    split, _ = source_index.splits["train"]
    split_N = np.full(len(split), -1)
    for number, name in enumerate(names):
        split_N[source_index.splits[name][1].numpy()] = number
    units_N = group_copies(stored[id(split)].digests(), None if split.groups is None else split.groups.numpy())
    if source_index.has_fold:  # by the unit's first sample, which is in one fold: no copy is in two folds, or in none
        together_N = split_N[units_N]
    else:
        together_N = keep_sets_together(split_N, units_N, labels_or_zeros(split).numpy())
    moved_count = int((together_N != split_N).sum())
    if not moved_count:
        return splits, 0
    new_splits = {
        name: (split, torch.from_numpy(np.flatnonzero(together_N == number))) for number, name in enumerate(names)
    }
    return {name: new_splits.get(name, pair) for name, pair in splits.items()}, moved_count
