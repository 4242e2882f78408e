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
NEAR_LEVELS, NEAR_PART = 4.0, 0.065
_LEAST = 0.25  # grey levels
_AT_ONCE = 256  # samples whose neighbours are looked for together
_DIRECTIONS = 8  # principal directions in which neighbours are looked for


@dataclass(frozen=True)
class Columns:
    """The samples of all splits, one after the other: split and number in it, label, group (-1: none), digest."""

    splits: tuple[str, ...]
    split_N: NDArray[np.int64]
    index_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    group_N: NDArray[np.int64]
    pixels_N: NDArray[np.uint64]

    def place(self, sample: int) -> tuple[str, int]:
        """The split's name and the sample's number in it."""
        return self.splits[int(self.split_N[sample])], int(self.index_N[sample])

    def in_train(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the training split."""
        kept: NDArray[np.int64] = samples[self.split_N[samples] == self.splits.index("train")]
        return kept


def twins(values_N: NDArray[Any]) -> list[NDArray[np.int64]]:
    """The samples that share a value, a group of two or more each, in the samples' order."""
    order = np.argsort(values_N, kind="stable")
    ordered = values_N[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(order)])
    return [order[start : start + n] for start, n in zip(starts, lengths, strict=True) if n > 1]


def spread(groups: Sequence[NDArray[np.int64]], over_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Those groups whose samples are not all of one kind in `over_N`: of several splits, or under several labels."""
    return [group for group in groups if (over_N[group] != over_N[group[0]]).any()]


@dataclass(frozen=True)
class Leaks:
    """Sets of samples: a picture in several splits, a picture under several labels, a group in several splits.

    And a class in several splits, where each is to be in one.
    """

    across: list[NDArray[np.int64]]
    conflicts: list[NDArray[np.int64]]
    torn: list[NDArray[np.int64]]
    shared: list[NDArray[np.int64]]

    def __bool__(self) -> bool:
        return bool(self.across or self.conflicts or self.torn or self.shared)


def leaks(columns: Columns, apart: bool = False) -> Leaks:
    """What makes a measurement on val or test, or the labels themselves, untrue; `apart`: no class is in two splits."""
    same = twins(columns.pixels_N)
    known = np.flatnonzero(columns.group_N >= 0)
    of_group = [known[members] for members in twins(columns.group_N[known])]
    shared = spread(twins(columns.label_N), columns.split_N) if apart else []
    return Leaks(
        spread(same, columns.split_N), spread(same, columns.label_N), spread(of_group, columns.split_N), shared
    )


def near(thumbs_NF: NDArray[np.uint8], limit: int = 5_000_000) -> tuple[NDArray[np.int64], bool]:
    """Pairs of samples [P, 2] whose thumbs differ by no more than re-encoding and resizing make them differ.

    Neighbours are found exactly in the thumbs' first principal directions, where no pair is further apart than in all,
    and then compared in all. After `limit` neighbours the search ends; returns whether it went through.
    """
    from scipy.spatial import cKDTree

    values = thumbs_NF.astype(np.float32)
    # Where the contrast is less than a grey level's worth of it, nothing can be near.
    kept = np.flatnonzero(values.std(1) * NEAR_PART > _LEAST)
    values = values[kept]
    if len(values) < 2:
        return np.empty((0, 2), np.int64), True
    sample = values[:: max(1, len(values) // 20_000)]
    _, directions = np.linalg.eigh(np.cov(sample, rowvar=False))
    flat = (values - sample.mean(0)) @ directions[:, -_DIRECTIONS:]
    tree, radius, looked = cKDTree(flat), NEAR_LEVELS * values.shape[1] ** 0.5, 0
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
        made[first : first + chunk] = (apart <= NEAR_LEVELS) & (apart <= NEAR_PART * contrast)
    return made
