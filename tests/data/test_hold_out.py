from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from cnnrun.data.hold_out import (
    assign_folds,
    group_copies,
    hold_out_classes,
    hold_out_samples,
    keep_sets_together,
    label_combinations,
)

labels = st.lists(st.integers(0, 4), min_size=6, max_size=120).map(torch.tensor)


@given(labels, st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_folds_are_even_in_size_and_in_each_class(labels_N, count, seed):
    fold = assign_folds(labels_N, None, count, seed)
    sizes = torch.bincount(fold, minlength=count)
    assert int(sizes.max() - sizes.min()) <= 1
    for label in labels_N.unique():
        of_class = torch.bincount(fold[labels_N == label], minlength=count)
        assert int(of_class.max() - of_class.min()) <= 1
    assert torch.equal(fold, assign_folds(labels_N, None, count, seed))


@given(labels, st.integers(2, 5), st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_groups_are_never_split(labels_N, count, seed, data):
    size = len(labels_N)
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))
    for side in (assign_folds(labels_N, groups, count, seed), hold_out_samples(labels_N, groups, 0.25, seed)):
        for group in groups.unique():
            assert len(side[groups == group].unique()) == 1


def test_groups_are_spread_as_evenly_as_by_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 60, (600,), generator=generator)
    labels_N = (groups * 7 % 3 + torch.randint(0, 2, (600,), generator=generator)) % 3

    def unevenness(fold) -> float:
        shares = torch.stack([torch.bincount(labels_N[fold == k], minlength=3) for k in range(5)]).double()
        return float((shares / torch.bincount(labels_N) - 0.2).abs().max())

    theirs = torch.empty(600, dtype=torch.int64)
    for number, (_, part) in enumerate(StratifiedGroupKFold(5).split(labels_N, labels_N, groups)):
        theirs[part] = number
    assert unevenness(assign_folds(labels_N, groups, 5, 0)) <= unevenness(theirs) + 0.02
    part = hold_out_samples(labels_N, groups, 0.2, 0)
    assert 0.15 < float(part.float().mean()) < 0.25


def test_groups_of_one_class_each_are_spread_over_the_folds():
    groups = torch.arange(12).repeat_interleave(4)
    sizes = torch.bincount(assign_folds(groups % 4, groups, 5, 0), minlength=5)
    assert sorted(sizes.tolist()) == [8, 8, 8, 12, 12]
    assert len(assign_folds(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1]), 2, 0).unique()) == 2


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_are_placed_before_small_ones(seed):
    groups = torch.tensor([0] * 10 + list(range(1, 11)))
    sizes = torch.bincount(assign_folds(torch.zeros(20, dtype=torch.int64), groups, 2, seed), minlength=2)
    assert sizes.tolist() == [10, 10]


def test_a_held_out_part_contains_every_class_of_two_or_more_samples():
    labels_N = torch.tensor([0] * 90 + [1] * 8 + [2] * 2 + [3])
    part = hold_out_samples(labels_N, None, 0.1, 3)
    assert torch.bincount(labels_N[part], minlength=4).tolist() == [9, 1, 1, 0]
    most = hold_out_samples(labels_N, None, 0.9, 3)
    assert torch.bincount(labels_N[~most], minlength=3)[:3].min() >= 1  # training keeps some of each class


@given(labels, st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_hold_out_classes_takes_whole_classes(labels_N, part, seed):
    held = hold_out_classes(labels_N, part, seed)
    out, kept = set(labels_N[held].tolist()), set(labels_N[~held].tolist())
    assert not out & kept
    classes = len(labels_N.unique())
    assert len(out) == min(max(1, round(part * classes)), classes - 1)
    assert torch.equal(held, hold_out_classes(labels_N, part, seed))
    assert not hold_out_classes(labels_N, 0.0, seed).any()


def test_label_sets_are_held_out_in_proportion():
    draw = torch.Generator().manual_seed(0)
    present = torch.rand(4000, 5, generator=draw) < torch.tensor([0.5, 0.3, 0.1, 0.05, 0.02])
    held = hold_out_samples(label_combinations(present, 10), None, 0.1, 0)
    assert int(held.sum()) == pytest.approx(400, rel=0.05)
    assert present[held].float().mean(0).tolist() == pytest.approx(present.float().mean(0).tolist(), rel=0.15)
    # Rare label sets are pooled: otherwise each of many rare sets would give one sample.
    rare = torch.arange(512)[:, None].bitwise_and(2 ** torch.arange(9)) > 0
    assert int(hold_out_samples(label_combinations(rare, 10), None, 0.1, 0).sum()) == 51


@given(st.data())
def test_copies_and_groups_stay_on_one_side_and_nothing_else_moves(data):
    count = data.draw(st.integers(2, 40))
    side = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    pixels = np.array(data.draw(st.lists(st.integers(0, 15), min_size=count, max_size=count)), np.uint64)
    groups = np.array(data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))
    groups = groups if data.draw(st.booleans()) else None
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    sets = group_copies(pixels, groups)
    assert (sets <= np.arange(count)).all()
    for same in (pixels, *([groups] if groups is not None else [])):
        for value in np.unique(same):
            assert len(np.unique(sets[same == value])) == 1
    made = keep_sets_together(side, sets, labels)
    if len(np.unique(made)) == len(np.unique(side)) and (made != side).any():
        assert all(len(np.unique(made[sets == each])) == 1 for each in np.unique(sets))
    whole = [each for each in np.unique(sets) if len(np.unique(side[sets == each])) == 1]
    assert (made == side)[np.isin(sets, whole)].all()


def test_rejoining_divided_sets_keeps_the_split_sizes():
    pixels = np.repeat(np.arange(50), 4).astype(np.uint64)
    side = (np.random.default_rng(0).random(200) < 0.2).astype(int)
    made = keep_sets_together(side, group_copies(pixels, None), np.repeat(np.arange(2), 100))
    assert abs(made.mean() - side.mean()) < 0.05
    assert (made.reshape(50, 4) == made.reshape(50, 4)[:, :1]).all()


def test_rejoining_sets_never_empties_a_split():
    side = np.array([0, 0, 1])
    assert keep_sets_together(side, group_copies(np.ones(3, np.uint64), None), np.zeros(3, int)).tolist() == [0, 0, 1]


def test_label_sets_with_enough_samples_get_their_own_stratum():
    present = torch.tensor([[1, 0]] * 4 + [[0, 1]] * 5 + [[1, 1]] * 3).bool()
    labels = label_combinations(present, 4)
    assert (labels[9:] == -1).all()
    assert len(labels[:4].unique()) == len(labels[4:9].unique()) == 1
    assert len({*labels.tolist()}) == 3
