"""Which samples go where: parts held out and folds, stratified by class, groups kept together, by a seed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.randomness import permutation


def hold_out_samples(labels_N: Tensor, groups_N: Tensor | None, part: float, seed: int) -> Tensor:
    """Which samples to hold out: bool [N], `part` of every class; with groups, whole groups alone."""
    if groups_N is not None:
        if not part:
            return torch.zeros(len(labels_N), dtype=torch.bool)
        return _grouped(labels_N, groups_N, seed, [1 - part, part]) == 1
    order = permutation(seed, 0, len(labels_N))
    held = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        members = order[labels_N[order] == label]
        count = round(part * len(members))
        # A class of two or more is on both sides: what is held out can be learned, and is measured.
        held[members[: min(max(count, 1), len(members) - 1) if part and len(members) > 1 else count]] = True
    return held


def group_copies(pixels_N: NDArray[np.uint64], groups_N: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The set that each sample is in, as the number of the first in it: copies of one picture, and whole groups."""
    _, copy_N = np.unique(pixels_N, return_inverse=True)
    first_N = np.arange(len(pixels_N))
    while True:
        before = first_N
        for of_one in (copy_N, groups_N):
            if of_one is not None:
                first_N = _least_of_each(first_N, of_one)
        if groups_N is None or np.array_equal(before, first_N):
            return first_N


def keep_sets_together(
    side_N: NDArray[np.int64], set_N: NDArray[np.int64], labels_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The sides with every set on one of them: those that were torn are divided anew, in the same shares.

    No side is left empty: where there are too few sets for that, they stay as they are.
    """
    low, high = np.full(len(set_N), side_N.max()), np.full(len(set_N), side_N.min())
    np.minimum.at(low, set_N, side_N)
    np.maximum.at(high, set_N, side_N)
    torn = (low != high)[set_N]
    if not torn.any():
        return side_N
    sides, counts = np.unique(side_N[torn], return_counts=True)
    numbers, sets = torch.from_numpy(labels_N[torn]), torch.from_numpy(set_N[torn])
    made = side_N.copy()
    made[torn] = sides[_grouped(numbers, sets, 0, (counts / counts.sum()).tolist()).numpy()]
    return made if len(np.unique(made)) == len(np.unique(side_N)) else side_N


def _least_of_each(values_N: NDArray[np.int64], sets_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each sample the smallest value in its set."""
    least = np.full(int(sets_N.max()) + 1, len(values_N))
    np.minimum.at(least, sets_N, values_N)
    return least[sets_N]


def label_combinations(present_NK: Tensor, least: int) -> Tensor:
    """A label for each set of labels, int64 [N]: sets of fewer than `least` samples are one."""
    _, labels, counts = present_NK.unique(dim=0, return_inverse=True, return_counts=True)
    return torch.where(counts[labels] < least, -1, labels)


def hold_out_classes(labels_N: Tensor, part: float, seed: int) -> Tensor:
    """All samples of some classes: bool [N], `part` of the classes; one at least, and not all."""
    classes = labels_N.unique()
    count = min(max(1, round(part * len(classes))), len(classes) - 1) if part else 0
    return torch.isin(labels_N, classes[permutation(seed, 0, len(classes))[:count]])


def assign_folds(labels_N: Tensor, groups_N: Tensor | None, count: int, seed: int) -> Tensor:
    """The fold of each sample: int64 [N] in 0..count - 1, each fold with its share of every class."""
    if groups_N is not None:
        return _grouped(labels_N, groups_N, seed, [1 / count] * count)
    order = permutation(seed, 0, len(labels_N))
    made = torch.empty(len(labels_N), dtype=torch.int64)
    start = 0
    for label in labels_N.unique():
        members = order[labels_N[order] == label]
        # Each class goes on where the one before ended, so that the folds' sizes differ by one at most.
        made[members] = (torch.arange(len(members)) + start) % count
        start += len(members)
    return made


def _grouped(labels_N: Tensor, groups_N: Tensor, seed: int, shares: list[float]) -> Tensor:
    """A side for each sample, the same for all of a group: greedily, large groups first, to where they are missed most.

    What is missed is counted class by class, as scikit-learn's StratifiedGroupKFold does.
    """
    _, labels = labels_N.unique(return_inverse=True)
    names, groups = groups_N.unique(return_inverse=True)
    counts = torch.zeros(len(names), int(labels.max()) + 1, dtype=torch.float64)
    counts.index_put_((groups, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    wanted = torch.tensor(shares, dtype=torch.float64)[:, None] * counts.sum(0)
    have = torch.zeros_like(wanted)
    side = torch.zeros(len(names), dtype=torch.int64)
    order = permutation(seed, 0, len(names))
    order = order[counts.sum(1)[order].argsort(descending=True, stable=True)]
    for group in order.tolist():
        # The squared shortfall, in parts of each class, after giving the group to each side.
        total = counts.sum(0)
        before = ((wanted - have) / total).square().sum(1)
        after = ((wanted - have - counts[group]) / total).square().sum(1)
        gain = after - before
        # Of sides that want it equally the one that has least, for its size.
        fullest = have.sum(1) / wanted.sum(1)
        equal = gain <= gain.min() + 1e-9
        side[group] = int(torch.where(equal, fullest, torch.inf).argmin())
        have[side[group]] += counts[group]
    return side[groups]
