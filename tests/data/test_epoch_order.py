from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.data.epoch_order import Identities, balanced_order, identities_order, repetitions_per_class, uniform_order

labels = st.lists(st.integers(0, 4), min_size=6, max_size=120).map(torch.tensor)


def test_the_balanced_order_shows_classes_and_samples_equally_often():
    labels_N = torch.tensor([0] * 70 + [1] * 25 + [2] * 6)
    order = balanced_order(labels_N)
    for epoch in range(4):
        samples, numbers = order(5, epoch)
        assert len(samples) == len(labels_N)
        counts = torch.bincount(labels_N[samples])
        assert int(counts.max() - counts.min()) <= 1
        shown = torch.bincount(samples, minlength=len(labels_N))
        for label in range(3):
            of_class = shown[labels_N == label]
            assert int(of_class.max() - of_class.min()) <= 1
        assert len(numbers.unique()) == len(numbers)  # a repeated sample gets different augmentations
        assert torch.equal(numbers % len(labels_N), samples)
    assert not torch.equal(order(5, 0)[0], order(5, 1)[0])
    assert repetitions_per_class(labels_N, 4) == [101 / 3 / 70, 101 / 3 / 25, 101 / 3 / 6, 0.0]


def test_the_remainder_of_a_balanced_epoch_goes_to_each_class_in_turn():
    labels_N = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)  # 11 places: four, four and three
    order = balanced_order(labels_N)
    total = sum(torch.bincount(labels_N[order(5, epoch)[0]], minlength=3) for epoch in range(3))
    assert total.tolist() == [11, 11, 11]


def test_the_uniform_order_is_a_permutation():
    samples, numbers = uniform_order(50)(1, 2)
    assert sorted(samples.tolist()) == list(range(50))
    assert torch.equal(samples, numbers)


@given(labels, st.integers(2, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_an_identity_batch_has_equally_many_images_of_each_person(labels_N, pictures, people, epoch, seed):
    batch, classes = pictures * people, len(labels_N.unique())
    samples, numbers = identities_order(labels_N, batch, pictures)(seed, epoch)
    assert len(samples) == len(labels_N)
    assert len(numbers.unique()) == len(numbers)  # a repeated image gets different augmentations
    assert torch.equal(numbers % len(labels_N), samples)
    for part in samples.split(batch):
        if len(part) == batch and people <= classes:
            counts = torch.bincount(labels_N[part])
            assert sorted(counts[counts > 0].tolist()) == [pictures] * people
            if all(int((labels_N == label).sum()) >= pictures for label in labels_N.unique()):
                assert len(part.unique()) == batch  # no image is paired with itself
    # Every image of a class is shown before any is repeated.
    for label in labels_N.unique():
        shown, own = samples[labels_N[samples] == label], int((labels_N == label).sum())
        for cycle in shown.split(own):
            assert len(cycle.unique()) == len(cycle)


def test_all_people_are_shown_before_any_is_repeated_and_epochs_differ():
    labels_N = torch.arange(12).repeat_interleave(6)
    order = identities_order(labels_N, 16, 4)
    samples, _ = order(0, 0)
    groups = labels_N[samples].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:12, 0].tolist()) == list(range(12))
    assert not torch.equal(samples, order(0, 1)[0])
    assert torch.equal(samples, order(0, 0)[0])


def test_each_round_of_people_has_its_own_order():
    labels_N = torch.arange(12).repeat_interleave(40)
    samples, _ = identities_order(labels_N, 16, 4)(0, 0)
    rounds = labels_N[samples].view(10, 12, 4)[:, :, 0].tolist()  # three batches a round
    assert [sorted(each) for each in rounds] == [list(range(12))] * 10
    assert len({tuple(each) for each in rounds}) == 10


def test_a_persons_images_are_reshuffled_each_round_and_epoch():
    labels_N = torch.arange(3).repeat_interleave(12)
    seen = []
    for epoch in range(2):
        samples, _ = identities_order(labels_N.repeat(4), 12, 4)(0, epoch)
        seen.append(tuple(samples[labels_N.repeat(4)[samples] == 0].tolist()))
    assert seen[0] != seen[1]
    few = torch.tensor([0] * 2 + [1] * 60 + [2] * 60)  # the first person has only two images, which repeat
    samples, _ = identities_order(few, 12, 4)(0, 0)
    own = samples[few[samples] == 0].view(-1, 2)
    assert {tuple(each) for each in own.tolist()} <= {(0, 1), (1, 0)}
    rich = torch.arange(2).repeat_interleave(torch.tensor([8, 200]))
    samples, _ = identities_order(rich, 8, 4)(0, 0)
    cycles = samples[rich[samples] == 0].split(8)
    whole = [tuple(each.tolist()) for each in cycles if len(each) == 8]
    assert len(set(whole)) > len(whole) / 2 > 3


@pytest.mark.parametrize("own", [4, 5, 7, 9])
@pytest.mark.parametrize("pictures", [2, 3, 4])
def test_consecutive_images_of_a_person_all_differ(own, pictures):
    labels_N = torch.tensor([0] * own + [1] * 200)
    samples, _ = identities_order(labels_N, 2 * pictures, pictures)(0, 0)
    shown = samples[labels_N[samples] == 0]
    assert len(shown) > 5 * own
    assert all(len(set(window)) == pictures for window in shown.unfold(0, pictures, 1).tolist())


def test_the_last_images_of_a_round_change_from_round_to_round():
    """A former fault: the last three images of a round came last in every later round and always shared a batch."""
    labels_N = torch.tensor([0] * 8 + [1] * 200)
    samples, _ = identities_order(labels_N, 8, 4)(0, 0)
    rounds = samples[labels_N[samples] == 0][:104].view(13, 8)
    assert len({tuple(sorted(each[-3:].tolist())) for each in rounds}) > 6
    assert len({tuple(each.tolist()) for each in rounds}) == 13


def test_batch_sizes_that_identities_cannot_fill_are_refused():
    assert Identities(images=4).batch_problem([5] * 8, 32) is None
    assert (
        Identities(images=4).batch_problem([5] * 8, 30)
        == "train.batch 30 is not a multiple of 4 images of each class; use 32"
    )
    assert Identities(images=4).batch_problem([5] * 7 + [0], 32) == (
        "a batch needs 8 classes of 4 images, but train has 7 classes; use a smaller batch or more images of each class"
    )
