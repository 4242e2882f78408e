"""A source listed before anything is decoded: its splits, held-out ones included, and their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import DataError
from cnnrun.base.randomness import derive_key
from cnnrun.base.user_paths import read_errors
from cnnrun.config.messages import did_you_mean
from cnnrun.contracts.facts import NumberStatistics
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.source import SourceContents, SourceSpec, Split
from cnnrun.data.class_names import alike_names, check_class_names, questionable_numbers, quote_names
from cnnrun.data.hold_out import hold_out_classes, hold_out_samples, label_combinations
from cnnrun.data.image_files import ImageSettings
from cnnrun.data.settings import Data, HoldOut
from cnnrun.data.targets import count_classes, flatten_targets, labels_or_zeros, measure_numbers, select_targets


@dataclass(frozen=True)
class SourceIndex:
    """A source looked through: its splits as (source split, rows), held-out ones included."""

    contents: SourceContents
    splits: dict[str, tuple[Split, Tensor]]
    held_out_splits: frozenset[str]
    has_held_out_classes: bool = False  # whole classes are held out

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, (_, rows) in self.splits.items()}

    def source_splits(self) -> list[Split]:
        """The source's own splits."""
        return list(self.contents.splits.values())

    def targets(self, name: str, shape: Shape, image: ImageSettings) -> dict[str, Tensor]:
        """All targets of one of its splits, boxes where they lie in the network's pictures: see `flat`."""
        split, rows = self.splits[name]
        return flatten_targets(*select_targets(split, rows, shape, image))

    def class_counts(self) -> tuple[int, ...]:
        """Training pictures of each class, or objects; empty where the targets are neither."""
        split, rows = self.splits["train"]
        objects = {} if split.objects is None else split.objects.select(rows).columns
        own = {name: values[rows] for name, values in split.targets.items()}
        return count_classes(own | objects, len(self.contents.classes))

    def numbers(self) -> tuple[NumberStatistics, ...]:
        """The numbers that are known of each picture, as they are over the training pictures."""
        split, rows = self.splits["train"]
        return measure_numbers(
            self.contents.number_names, {name: values[rows] for name, values in split.targets.items()}
        )


def class_remarks(indexed: SourceIndex) -> list[str]:
    """What of the classes is worth a line: names that look alike, numbers that may stand for no label."""
    names = indexed.contents.classes
    lines = [f"classes {' and '.join(quote_names(group))} differ in writing alone" for group in alike_names(names)]
    counts = (
        indexed.class_counts()
        if "labels" in indexed.splits["train"][0].targets and not indexed.has_held_out_classes
        else ()
    )
    lines += many_classes_warning(names, counts)
    if odd := questionable_numbers(names):
        lines.append(f"the classes are numbers, and {join_names(odd)} is far from the others: a label, or none?")
    return lines


def many_classes_warning(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The question that is asked of many classes, most of which have one training picture; nothing else."""
    if len(names) <= _MANY_CLASSES or sum(count == 1 for count in counts) <= len(names) / 2:
        return []
    what = f"{len(names):,} classes for {sum(counts):,} training pictures, most of them with one"
    return [f"{what}: is the label a number (task: regress), or another name for each picture?"]


_MANY_CLASSES = 30  # from here on one with a single picture each is asked about


HOLD_OUT_KEYS = {"test": 1, "val": 2}


def index_source(data: Data) -> SourceIndex:
    """Look through the source and hold out what it does not split itself. Raises DataError."""
    source: SourceSpec = data.source
    with read_errors():
        indexed = source.read(data.split.by == "label")
    check_class_names(indexed.classes, f"data.source.{source.kind}", are_declared=source.has_declared_classes)
    splits = {name: (split, torch.arange(len(split))) for name, split in indexed.splits.items()}
    wanted = {name: getattr(data.split, name) for name in HOLD_OUT_KEYS if name not in indexed.splits}
    away = frozenset(name for name, part in wanted.items() if part)
    _refuse_unknown(indexed, data.split)
    for name in sorted(away):
        split, rows = splits["train"]
        if not len(rows):
            break
        held = _held(data.split, name, split, rows, indexed.classes)
        splits["train"] = (split, rows[~held])
        splits[name] = (split, rows[held])
    for name, (_, rows) in splits.items():
        if len(rows) == 0:
            raise DataError(f"the {name} split is empty; change data.split")
    return SourceIndex(indexed, splits, away, data.split.by == "label")


def _held(how: HoldOut, name: str, split: Split, rows: Tensor, classes: Sequence[str]) -> Tensor:
    """Which of these rows of train become the split `name`: bool [N]."""
    part, labels, seed = getattr(how, name), labels_or_zeros(split)[rows], derive_key(how.seed, HOLD_OUT_KEYS[name])
    if "present" in split.targets and isinstance(part, float) and part:
        labels = label_combinations(split.targets["present"][rows], math.ceil(1 / part))
    if isinstance(part, list):
        return torch.isin(labels, torch.tensor([classes.index(each) for each in part]))
    if how.by == "label":
        # A part of all classes, whatever was held out before.
        return hold_out_classes(
            labels, min(1.0, part * len(labels_or_zeros(split).unique()) / len(labels.unique())), seed
        )
    return hold_out_samples(labels, None if split.groups is None else split.groups[rows], part, seed)


def _refuse_unknown(indexed: SourceContents, how: HoldOut) -> None:
    """Raises DataError where classes are to be held out that are not there, or twice, or that stand aside already."""
    classes = indexed.classes
    named = {name: part for name in HOLD_OUT_KEYS if isinstance(part := getattr(how, name), list)}
    for name, part in named.items():
        if name in indexed.splits:
            raise DataError(f"data.split.{name}: the source says itself which pictures are {name}; remove the line")
        if unknown := [each for each in part if each not in classes]:
            raise DataError(f"data.split.{name}: no class {unknown[0]!r}{did_you_mean(unknown[0], list(classes))}")
    if both := set(named.get("val", ())) & set(named.get("test", ())):
        raise DataError(f"data.split: class {min(both)!r} is held out both for val and for test")
