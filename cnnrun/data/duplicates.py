"""Duplicates and leaks: copies of an image, in two splits or under two labels, and groups that are in two splits.

Everything here works on a table with a row per sample. It needs the records made at decoding, not the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Near duplicates: limits on the root mean square difference of two thumbnails, in grey levels and relative to the
# thumbnails' own standard deviation. Chosen on Fashion-MNIST's training images, measured on others
# (benchmarks/README.md).
MAX_LEVEL_DIFFERENCE, MAX_RELATIVE_DIFFERENCE = 4.0, 0.065
_MIN_TOLERANCE = 0.25  # grey levels
_QUERY_SIZE = 256  # samples whose neighbours are searched together
_DIRECTIONS = 8  # principal directions in which neighbours are searched


@dataclass(frozen=True)
class SampleTable:
    """The samples of all splits, concatenated: split, index in it, label, group (-1: none), and hash of the pixels."""

    splits: tuple[str, ...]
    split_N: NDArray[np.int64]
    index_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    group_N: NDArray[np.int64]
    digest_N: NDArray[np.uint64]

    def locate(self, sample: int) -> tuple[str, int]:
        """A sample's split, and its index in the split."""
        return self.splits[int(self.split_N[sample])], int(self.index_N[sample])

    def select_train(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples among these that are in the training split."""
        train: NDArray[np.int64] = samples[self.split_N[samples] == self.splits.index("train")]
        return train


def group_by_value(values_N: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Groups of two or more samples with the same value, each in the samples' order."""
    order = np.argsort(values_N, kind="stable")
    ordered = values_N[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(order)])
    return [order[start : start + n] for start, n in zip(starts, lengths, strict=True) if n > 1]


def mixed_groups(groups: Sequence[NDArray[np.int64]], values_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The groups whose samples have different values in `values_N`, such as several splits or several labels."""
    return [group for group in groups if (values_N[group] != values_N[group[0]]).any()]


@dataclass(frozen=True)
class Leaks:
    """Groups of samples that leak between splits, or that contradict each other's labels.

    Copies of an image in several splits or under several labels, groups in several splits, and, if each class should
    be in one split only, classes in several splits.
    """

    copies_across_splits: list[NDArray[np.int64]]
    label_conflicts: list[NDArray[np.int64]]
    groups_across_splits: list[NDArray[np.int64]]
    classes_across_splits: list[NDArray[np.int64]]

    def __bool__(self) -> bool:
        return bool(
            self.copies_across_splits or self.label_conflicts or self.groups_across_splits or self.classes_across_splits
        )


def find_leaks(table: SampleTable, has_disjoint_classes: bool = False) -> Leaks:
    """Find all leaks in a data set. With `has_disjoint_classes`, a class in two splits is a leak too."""
    copies = group_by_value(table.digest_N)
    grouped = np.flatnonzero(table.group_N >= 0)
    groups = [grouped[members] for members in group_by_value(table.group_N[grouped])]
    classes = group_by_value(table.label_N) if has_disjoint_classes else []
    return Leaks(
        copies_across_splits=mixed_groups(copies, table.split_N),
        label_conflicts=mixed_groups(copies, table.label_N),
        groups_across_splits=mixed_groups(groups, table.split_N),
        classes_across_splits=mixed_groups(classes, table.split_N),
    )


def find_near_duplicates(
    thumbs_NF: NDArray[np.uint8], max_candidates: int = 5_000_000
) -> tuple[NDArray[np.int64], bool]:
    """Find pairs [P, 2] of near duplicates, and return them with True if the search was complete.

    Candidates are neighbours in the first principal components of the thumbnails, where no distance is larger than
    between the thumbnails themselves. Each candidate is then compared exactly. The search stops after about
    `max_candidates` pairs.
    """
    from scipy.spatial import cKDTree

    values = thumbs_NF.astype(np.float32)
    # Images of low contrast are left out: their tolerance would be smaller than rounding errors.
    rows = np.flatnonzero(values.std(1) * MAX_RELATIVE_DIFFERENCE > _MIN_TOLERANCE)
    values = values[rows]
    if len(values) < 2:
        return np.empty((0, 2), np.int64), True
    subset = values[:: max(1, len(values) // 20_000)]
    _, directions = np.linalg.eigh(np.cov(subset, rowvar=False))
    projected = (values - subset.mean(0)) @ directions[:, -_DIRECTIONS:]
    tree, radius, compared_count = cKDTree(projected), MAX_LEVEL_DIFFERENCE * values.shape[1] ** 0.5, 0
    near_pairs = [np.empty((0, 2), np.int64)]
    for first in range(0, len(projected), _QUERY_SIZE):
        neighbours = tree.query_ball_point(projected[first : first + _QUERY_SIZE], radius)
        sources = np.repeat(np.arange(first, first + len(neighbours)), [len(row) for row in neighbours])
        pairs = np.stack([sources, np.concatenate([np.array(row, np.int64) for row in neighbours])], 1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        near_pairs.append(pairs[_is_near(values, pairs)])
        compared_count += len(pairs)
        if compared_count > max_candidates:
            return rows[np.concatenate(near_pairs)], False
    return rows[np.concatenate(near_pairs)], True


def _is_near(values: NDArray[np.float32], pairs: NDArray[np.int64], chunk: int = 100_000) -> NDArray[np.bool_]:
    """Return for each pair whether it differs little, both in grey levels and relative to the lower contrast."""
    deviation = values.std(1)
    is_near = np.empty(len(pairs), bool)
    for first in range(0, len(pairs), chunk):
        a, b = pairs[first : first + chunk].T
        difference = np.sqrt(np.square(values[a] - values[b]).mean(1))
        contrast = np.minimum(deviation[a], deviation[b])
        is_near[first : first + chunk] = (difference <= MAX_LEVEL_DIFFERENCE) & (
            difference <= MAX_RELATIVE_DIFFERENCE * contrast
        )
    return is_near
