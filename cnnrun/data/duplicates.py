"""What is wrong with a data set as a whole: the same picture twice, in two splits, under two labels; groups torn apart.

Everything here works on columns, a row a sample, made from what was remembered when the pictures were decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Near duplicates: the root mean square difference of two thumbs (grey levels), in absolute terms and in parts of their
# own deviation. Chosen on Fashion-MNIST's training pictures, reported on others (benchmarks/README.md).
MAX_LEVEL_DIFFERENCE, MAX_RELATIVE_DIFFERENCE = 4.0, 0.065
_LEAST = 0.25  # grey levels
_AT_ONCE = 256  # samples whose neighbours are looked for together
_DIRECTIONS = 8  # principal directions in which neighbours are looked for


@dataclass(frozen=True)
class SampleTable:
    """The samples of all splits, one after the other: split and number in it, label, group (-1: none), digest."""

    splits: tuple[str, ...]
    split_N: NDArray[np.int64]
    index_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    group_N: NDArray[np.int64]
    digest_N: NDArray[np.uint64]

    def locate(self, sample: int) -> tuple[str, int]:
        """The split's name and the sample's number in it."""
        return self.splits[int(self.split_N[sample])], int(self.index_N[sample])

    def select_train(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the training split."""
        kept: NDArray[np.int64] = samples[self.split_N[samples] == self.splits.index("train")]
        return kept


def group_by_value(values_N: NDArray[Any]) -> list[NDArray[np.int64]]:
    """The samples that share a value, a group of two or more each, in the samples' order."""
    order = np.argsort(values_N, kind="stable")
    ordered = values_N[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(order)])
    return [order[start : start + n] for start, n in zip(starts, lengths, strict=True) if n > 1]


def mixed_groups(groups: Sequence[NDArray[np.int64]], over_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Those groups whose samples are not all of one kind in `over_N`: of several splits, or under several labels."""
    return [group for group in groups if (over_N[group] != over_N[group[0]]).any()]


@dataclass(frozen=True)
class Leaks:
    """Sets of samples: a picture in several splits, a picture under several labels, a group in several splits.

    And a class in several splits, where each is to be in one.
    """

    copies_across_splits: list[NDArray[np.int64]]
    label_conflicts: list[NDArray[np.int64]]
    groups_across_splits: list[NDArray[np.int64]]
    classes_across_splits: list[NDArray[np.int64]]

    def __bool__(self) -> bool:
        return bool(
            self.copies_across_splits or self.label_conflicts or self.groups_across_splits or self.classes_across_splits
        )


def find_leaks(columns: SampleTable, apart: bool = False) -> Leaks:
    """What makes a measurement on val or test, or the labels themselves, untrue; `apart`: no class is in two splits."""
    same = group_by_value(columns.digest_N)
    known = np.flatnonzero(columns.group_N >= 0)
    of_group = [known[members] for members in group_by_value(columns.group_N[known])]
    shared = mixed_groups(group_by_value(columns.label_N), columns.split_N) if apart else []
    return Leaks(
        mixed_groups(same, columns.split_N),
        mixed_groups(same, columns.label_N),
        mixed_groups(of_group, columns.split_N),
        shared,
    )


def find_near_duplicates(thumbs_NF: NDArray[np.uint8], limit: int = 5_000_000) -> tuple[NDArray[np.int64], bool]:
    """Pairs of samples [P, 2] whose thumbs differ by no more than re-encoding and resizing make them differ.

    Neighbours are found exactly in the thumbs' first principal directions, where no pair is further apart than in all,
    and then compared in all. After `limit` neighbours the search ends; returns whether it went through.
    """
    from scipy.spatial import cKDTree

    values = thumbs_NF.astype(np.float32)
    # Where the contrast is less than a grey level's worth of it, nothing can be near.
    kept = np.flatnonzero(values.std(1) * MAX_RELATIVE_DIFFERENCE > _LEAST)
    values = values[kept]
    if len(values) < 2:
        return np.empty((0, 2), np.int64), True
    sample = values[:: max(1, len(values) // 20_000)]
    _, directions = np.linalg.eigh(np.cov(sample, rowvar=False))
    flat = (values - sample.mean(0)) @ directions[:, -_DIRECTIONS:]
    tree, radius, looked = cKDTree(flat), MAX_LEVEL_DIFFERENCE * values.shape[1] ** 0.5, 0
    found = [np.empty((0, 2), np.int64)]
    for first in range(0, len(flat), _AT_ONCE):
        neighbours = tree.query_ball_point(flat[first : first + _AT_ONCE], radius)
        one = np.repeat(np.arange(first, first + len(neighbours)), [len(each) for each in neighbours])
        pairs = np.stack([one, np.concatenate([np.array(each, np.int64) for each in neighbours])], 1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        found.append(pairs[_close(values, pairs)])
        looked += len(pairs)
        if looked > limit:
            return kept[np.concatenate(found)], False
    return kept[np.concatenate(found)], True


def _close(values: NDArray[np.float32], pairs: NDArray[np.int64], chunk: int = 100_000) -> NDArray[np.bool_]:
    """Which pairs differ by little, both in grey levels and against the contrast that the pictures have."""
    deviation = values.std(1)
    made = np.empty(len(pairs), bool)
    for first in range(0, len(pairs), chunk):
        a, b = pairs[first : first + chunk].T
        apart = np.sqrt(np.square(values[a] - values[b]).mean(1))
        contrast = np.minimum(deviation[a], deviation[b])
        made[first : first + chunk] = (apart <= MAX_LEVEL_DIFFERENCE) & (apart <= MAX_RELATIVE_DIFFERENCE * contrast)
    return made
