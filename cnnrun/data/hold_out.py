"""Held-out splits and folds by a seed, stratified by class, with groups kept together."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.randomness import permutation


def hold_out_samples(labels_N: Tensor, groups_N: Tensor | None, fraction: float, seed: int) -> Tensor:
    """Choose samples to hold out: bool [N], `fraction` of every class. With groups, only whole groups are held out."""
    if groups_N is not None:
        if not fraction:
            return torch.zeros(len(labels_N), dtype=torch.bool)
        return _assign_groups(labels_N, groups_N, seed, [1 - fraction, fraction]) == 1
    order = permutation(seed, 0, len(labels_N))
    is_held_out = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        members = order[labels_N[order] == label]
        count = round(fraction * len(members))
        # A class of two or more samples is in both splits, so that it is both trained and measured.
        if fraction and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        is_held_out[members[:count]] = True
    return is_held_out


def group_copies(pixels_N: NDArray[np.uint64], groups_N: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Group samples that share an image or a group into units. Each unit is named by its first sample: int64 [N]."""
    _, copy_N = np.unique(pixels_N, return_inverse=True)
    first_N = np.arange(len(pixels_N))
    while True:
        before = first_N
        for unit_N in (copy_N, groups_N):
            if unit_N is not None:
                first_N = _minimum_per_unit(first_N, unit_N)
        if groups_N is None or np.array_equal(before, first_N):
            return first_N


def keep_sets_together(
    split_N: NDArray[np.int64], unit_N: NDArray[np.int64], labels_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Assign each unit to one split: int64 [N]. Units in several splits are reassigned in the same proportions.

    Returns `split_N` unchanged if a split would become empty because there are too few units.
    """
    low, high = np.full(len(unit_N), split_N.max()), np.full(len(unit_N), split_N.min())
    np.minimum.at(low, unit_N, split_N)
    np.maximum.at(high, unit_N, split_N)
    is_divided = (low != high)[unit_N]
    if not is_divided.any():
        return split_N
    splits, counts = np.unique(split_N[is_divided], return_counts=True)
    labels, units = torch.from_numpy(labels_N[is_divided]), torch.from_numpy(unit_N[is_divided])
    new_split_N = split_N.copy()
    new_split_N[is_divided] = splits[_assign_groups(labels, units, 0, (counts / counts.sum()).tolist()).numpy()]
    return new_split_N if len(np.unique(new_split_N)) == len(np.unique(split_N)) else split_N


def _minimum_per_unit(values_N: NDArray[np.int64], unit_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each sample the smallest value in its unit. The values are below N."""
    minimum = np.full(int(unit_N.max()) + 1, len(values_N))
    np.minimum.at(minimum, unit_N, values_N)
    return minimum[unit_N]


def label_combinations(present_NK: Tensor, min_count: int) -> Tensor:
    """A label for each combination of labels, int64 [N]. Combinations of fewer than `min_count` samples share -1."""
    _, labels, counts = present_NK.unique(dim=0, return_inverse=True, return_counts=True)
    return torch.where(counts[labels] < min_count, -1, labels)


def hold_out_classes(labels_N: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose all samples of `fraction` of the classes: bool [N].

    With a positive fraction at least one class is chosen, and at least one is left if there are two.
    """
    classes = labels_N.unique()
    count = min(max(1, round(fraction * len(classes))), len(classes) - 1) if fraction else 0
    return torch.isin(labels_N, classes[permutation(seed, 0, len(classes))[:count]])


def assign_folds(labels_N: Tensor, groups_N: Tensor | None, count: int, seed: int) -> Tensor:
    """Assign each sample to a fold: int64 [N] in 0..count - 1. Each fold has its share of every class."""
    if groups_N is not None:
        return _assign_groups(labels_N, groups_N, seed, [1 / count] * count)
    order = permutation(seed, 0, len(labels_N))
    fold_N = torch.empty(len(labels_N), dtype=torch.int64)
    start = 0
    for label in labels_N.unique():
        members = order[labels_N[order] == label]
        # Each class starts at the fold after the last one's end, so that the folds' sizes differ by one at most.
        fold_N[members] = (torch.arange(len(members)) + start) % count
        start += len(members)
    return fold_N


def _assign_groups(labels_N: Tensor, groups_N: Tensor, seed: int, fractions: list[float]) -> Tensor:
    """The index of a split for each sample, the same for a whole group: int64 [N].

    Greedy, large groups first: each group goes to the split where it reduces the shortfall most. The shortfall is
    counted by class, as in scikit-learn's StratifiedGroupKFold.
    """
    _, labels = labels_N.unique(return_inverse=True)
    names, groups = groups_N.unique(return_inverse=True)
    counts = torch.zeros(len(names), int(labels.max()) + 1, dtype=torch.float64)
    counts.index_put_((groups, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    target_counts = torch.tensor(fractions, dtype=torch.float64)[:, None] * counts.sum(0)
    split_counts = torch.zeros_like(target_counts)
    split = torch.zeros(len(names), dtype=torch.int64)
    order = permutation(seed, 0, len(names))
    order = order[counts.sum(1)[order].argsort(descending=True, stable=True)]
    for group in order.tolist():
        # The squared shortfall as a share of each class, before and after the group is added to each split.
        total = counts.sum(0)
        before = ((target_counts - split_counts) / total).square().sum(1)
        after = ((target_counts - split_counts - counts[group]) / total).square().sum(1)
        change = after - before
        # Of the splits that gain equally, take the least full one for its size.
        fill_ratio = split_counts.sum(1) / target_counts.sum(1)
        is_best = change <= change.min() + 1e-9
        split[group] = int(torch.where(is_best, fill_ratio, torch.inf).argmin())
        split_counts[split[group]] += counts[group]
    return split[groups]
