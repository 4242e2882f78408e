"""Index of a source before anything is decoded: its splits, held-out ones included, and their targets."""

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
from cnnrun.data.class_names import check_class_names, implausible_class_names, quote_names, similar_names
from cnnrun.data.hold_out import assign_folds, hold_out_classes, hold_out_samples, label_combinations
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.settings import Data, Fold, HoldOut
from cnnrun.data.targets import count_classes, flatten_targets, labels_or_zeros, measure_numbers, select_targets

_MANY_CLASSES = 30  # the warning about classes with one image needs more classes than this


@dataclass(frozen=True)
class SourceIndex:
    """The contents of a source, and its splits, held-out ones included, as (source split, indices of their samples)."""

    contents: SourceContents
    splits: dict[str, tuple[Split, Tensor]]
    held_out_splits: frozenset[str]
    has_held_out_classes: bool = False  # val and test hold whole classes (`data.split.by: label`)
    has_fold: bool = False  # val is a fold (`data.split.val: {fold: 1, of: 5}`)

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples in each split."""
        return {name: len(rows) for name, (_, rows) in self.splits.items()}

    def source_splits(self) -> list[Split]:
        """The splits that the source itself has."""
        return list(self.contents.splits.values())

    def targets(self, name: str, shape: Shape, image_settings: ImageSettings) -> dict[str, Tensor]:
        """All targets of a split, with boxes in the network's pixels: see `flatten_targets`."""
        split, rows = self.splits[name]
        return flatten_targets(*select_targets(split, rows, shape, image_settings))

    def class_counts(self) -> tuple[int, ...]:
        """Training images of each class, or objects of each class; empty if the targets have no classes."""
        split, rows = self.splits["train"]
        objects = {} if split.objects is None else split.objects.select(rows).columns
        targets = {name: values[rows] for name, values in split.targets.items()}
        return count_classes(targets | objects, len(self.contents.classes))

    def numbers(self) -> tuple[NumberStatistics, ...]:
        """Statistics of the regression targets over the training images."""
        split, rows = self.splits["train"]
        return measure_numbers(
            self.contents.number_names, {name: values[rows] for name, values in split.targets.items()}
        )


def class_warnings(source_index: SourceIndex) -> list[str]:
    """Warnings about doubtful class names, one line each: similar names, and numbers that may mean a missing label."""
    names = source_index.contents.classes
    lines = [f"classes {' and '.join(quote_names(group))} differ only in spelling" for group in similar_names(names)]
    has_labels = "labels" in source_index.splits["train"][0].targets
    counts = source_index.class_counts() if has_labels and not source_index.has_held_out_classes else ()
    if warning := many_classes_warning(counts):
        lines.append(f"{len(names):,} {warning}")
    if odd := implausible_class_names(names):
        lines.append(f"the classes are numbers, and {join_names(odd)} is far from the others: is it a label?")
    return lines


def many_classes_warning(counts: Sequence[int]) -> str | None:
    """Warning that most of many classes have one training image, to be written after the number of classes; or None.

    `counts` are the training images of each class.
    """
    if len(counts) <= _MANY_CLASSES or sum(count == 1 for count in counts) <= len(counts) / 2:
        return None
    problem = f"classes for {sum(counts):,} training images, most of them with one"
    return f"{problem}: is the label a number (task: regress), or another name for each image?"


HOLD_OUT_KEYS = {"test": 1, "val": 2}  # part of the seed with which each split is drawn


def index_source(data: Data, contents: SourceContents | None = None) -> SourceIndex:
    """List a source, unless its `contents` are given, and hold out the splits that it does not have itself.

    Raises DataError if the source cannot be read, a class name cannot be used, or a split is empty.
    """
    source: SourceSpec = data.source
    if contents is None:
        with read_errors():
            contents = source.read(has_disjoint_classes=data.split.by == "label")
    check_class_names(contents.classes, f"data.source.{source.kind}", are_declared=source.has_declared_classes)
    splits = {name: (split, torch.arange(len(split))) for name, split in contents.splits.items()}
    parts = {name: getattr(data.split, name) for name in HOLD_OUT_KEYS if name not in contents.splits}
    held_out_splits = frozenset(name for name, part in parts.items() if part)
    _refuse_wrong_class_names(contents, data.split)
    for name in sorted(held_out_splits):
        split, rows = splits["train"]
        if not len(rows):
            break
        is_held_out = _choose_held_out(data.split, name, split, rows, contents.classes)
        splits["train"] = (split, rows[~is_held_out])
        splits[name] = (split, rows[is_held_out])
    for name, (_, rows) in splits.items():
        if len(rows) == 0:
            raise DataError(f"the {name} split is empty; change data.split")
    has_fold = "val" in held_out_splits and isinstance(data.split.val, Fold)
    return SourceIndex(contents, splits, held_out_splits, data.split.by == "label", has_fold)


def _choose_held_out(settings: HoldOut, name: str, split: Split, rows: Tensor, classes: Sequence[str]) -> Tensor:
    """Choose the training rows that become the split `name`: bool [N]."""
    part, labels, seed = getattr(settings, name), labels_or_zeros(split)[rows], _hold_out_seed(settings, name)
    if "present" in split.targets and isinstance(part, float) and part:
        labels = label_combinations(split.targets["present"][rows], math.ceil(1 / part))
    if isinstance(part, Fold):
        return _choose_fold(settings, part, split, rows)
    if isinstance(part, list):
        return torch.isin(labels, torch.tensor([classes.index(class_name) for class_name in part]))
    if settings.by == "label":
        # `part` counts all classes, but some may have been held out before.
        rest = part * len(labels_or_zeros(split).unique()) / len(labels.unique())
        return hold_out_classes(labels, min(1.0, rest), seed)
    return hold_out_samples(labels, None if split.groups is None else split.groups[rows], part, seed)


def _choose_fold(settings: HoldOut, part: Fold, split: Split, rows: Tensor) -> Tensor:
    """Choose the rows of a fold: bool [N]. Raises DataError if there are too few samples, groups or classes."""
    labels, groups = labels_or_zeros(split)[rows], None if split.groups is None else split.groups[rows]
    if settings.by == "label":
        labels, groups = torch.zeros_like(labels), labels
    elif "present" in split.targets:
        labels = label_combinations(split.targets["present"][rows], part.of)
    count = len(rows) if groups is None else len(groups.unique())
    if count < part.of:
        unit = "classes" if settings.by == "label" else "samples" if groups is None else "groups"
        raise DataError(f"{count} {unit} are too few for {part.of} folds")
    return assign_folds(labels, groups, part.of, settings.seed) == part.fold - 1


def _hold_out_seed(settings: HoldOut, name: str) -> int:
    return derive_key(settings.seed, HOLD_OUT_KEYS[name])


def _refuse_wrong_class_names(contents: SourceContents, settings: HoldOut) -> None:
    """Raise DataError for classes to hold out that do not exist, are in both parts, or are in a split of the source.

    A fold of a split that the source has itself is refused too.
    """
    classes = contents.classes
    if isinstance(settings.val, Fold) and "val" in contents.splits:
        raise DataError("data.split.val: the source has a val split of its own, so it cannot be divided into folds")
    named_parts = {name: part for name in HOLD_OUT_KEYS if isinstance(part := getattr(settings, name), list)}
    for name, part in named_parts.items():
        if name in contents.splits:
            raise DataError(f"data.split.{name}: the source has a {name} split of its own; remove this line")
        if unknown := [class_name for class_name in part if class_name not in classes]:
            raise DataError(f"data.split.{name}: no class {unknown[0]!r}{did_you_mean(unknown[0], list(classes))}")
    if in_both := set(named_parts.get("val", ())) & set(named_parts.get("test", ())):
        raise DataError(f"data.split: class {min(in_both)!r} is held out both for val and for test")
