from __future__ import annotations

import pytest
import torch

from cnnrun import batches
from cnnrun.augment import Augment
from cnnrun.batch import Batch
from cnnrun.batches import TrainingBatches, in_order
from cnnrun.dataset import Data, index
from cnnrun.prepare import prepare
from cnnrun.progress import bar

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples():
    data = Data.model_validate({"source": "digits"})
    return prepare(data, index(data), bar).splits["train"]


def made(examples, batch=32, seed=3, augment=None, drop_last=True):
    steps = len(examples) // batch if drop_last else -(-len(examples) // batch)
    return TrainingBatches(examples, augment or Augment(shift=0.2, rotate=9), batch, steps, seed, CPU)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.pictures, b.pictures) and torch.equal(a.targets["labels"], b.targets["labels"])


def test_any_step_from_anywhere_is_the_same_batch(examples):
    steps = 2 * made(examples).steps_per_epoch + 3
    one = made(examples)
    walked = [one.at(step) for step in range(steps)]
    for step in (0, 5, steps // 2, steps - 1, 1):
        assert same(made(examples).at(step), walked[step])


@pytest.mark.parametrize("ahead", [1, 50_000, 10**9])
def test_how_many_are_prepared_at_once_changes_no_bit(examples, ahead, monkeypatch):
    expected = [made(examples).at(step) for step in range(60)]
    monkeypatch.setattr(batches, "AHEAD_BYTES", ahead)
    other = made(examples)
    assert all(same(other.at(step), batch) for step, batch in enumerate(expected))


def test_an_epoch_has_every_sample_at_most_once(examples):
    one = made(examples)
    for epoch in range(2):
        seen = torch.cat([one.indices(epoch * one.steps_per_epoch + i) for i in range(one.steps_per_epoch)])
        assert len(seen.unique()) == len(seen) == one.steps_per_epoch * 32
    whole = made(examples, drop_last=False)
    seen = torch.cat([whole.indices(i) for i in range(whole.steps_per_epoch)])
    assert sorted(seen.tolist()) == list(range(len(examples)))


def test_labels_stay_with_their_pictures(examples):
    batch = made(examples, augment=Augment()).at(4)
    for picture, label, i in zip(batch.pictures, batch.targets["labels"], batch.index_B, strict=True):
        assert torch.equal(picture, examples.take(i[None])[0].float())
        assert label == examples.targets["labels"][i]


def test_in_order_has_each_sample_once(examples):
    parts = list(in_order(examples, 50, CPU))
    assert torch.cat([part.index_B for part in parts]).tolist() == list(range(len(examples)))


@pytest.mark.parametrize("parts", [1, 3, 32, 40])
def test_split_is_a_partition(examples, parts):
    batch = made(examples).at(0)
    pieces = batch.split(parts)
    assert len(pieces) == min(parts, 32)
    assert torch.equal(torch.cat([piece.pictures for piece in pieces]), batch.pictures)
    assert torch.equal(torch.cat([piece.index_B for piece in pieces]), batch.index_B)
