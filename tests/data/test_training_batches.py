from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnnrun.base.errors import DataError
from cnnrun.base.progress import progress_bar
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.objects import ObjectTable
from cnnrun.contracts.source import Split
from cnnrun.data import training_batches
from cnnrun.data.augment.random_slots import Draws
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Examples
from cnnrun.data.epoch_order import balanced_order
from cnnrun.data.image_stores import MemoryStore
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches, batches_in_order
from cnnrun.tasks.classification import Classify

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples():
    data = Data.model_validate({"source": "digits"})
    return build_dataset(data, index_source(data), progress_bar).splits["train"]


def make_batches(examples, batch=32, seed=3, augment=None, drop_last=True, mix_targets=None, prefetch=0, **plan):
    steps = len(examples) // batch if drop_last else -(-len(examples) // batch)
    made, reading = BatchPlan(batch, steps, seed, **plan), BatchReading(CPU, prefetch)
    return TrainingBatches(examples, augment or Augment(shift=0.2, rotate=9), made, reading, mix_targets)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.targets["labels"], b.targets["labels"])


def test_a_step_gives_the_same_batch_wherever_training_starts(examples):
    steps = 2 * make_batches(examples).steps_per_epoch + 3
    one = make_batches(examples)
    walked = [one.at(step) for step in range(steps)]
    for step in (0, 5, steps // 2, steps - 1, 1):
        assert same(make_batches(examples).at(step), walked[step])


@pytest.mark.parametrize("ahead", [1, 50_000, 10**9])
def test_the_number_of_batches_prepared_at_once_changes_no_bit(examples, ahead, monkeypatch):
    expected = [make_batches(examples).at(step) for step in range(60)]
    monkeypatch.setattr(training_batches, "AHEAD_BYTES", ahead)
    other = make_batches(examples)
    assert all(same(other.at(step), batch) for step, batch in enumerate(expected))


def test_an_epoch_has_every_sample_at_most_once(examples):
    one = make_batches(examples)
    for epoch in range(2):
        seen = torch.cat([one.sample_indices(epoch * one.steps_per_epoch + i) for i in range(one.steps_per_epoch)])
        assert len(seen.unique()) == len(seen) == one.steps_per_epoch * 32
    whole = make_batches(examples, drop_last=False)
    seen = torch.cat([whole.sample_indices(i) for i in range(whole.steps_per_epoch)])
    assert sorted(seen.tolist()) == list(range(len(examples)))


def test_labels_stay_with_their_images(examples):
    batch = make_batches(examples, augment=Augment()).at(4)
    for picture, label, i in zip(batch.images, batch.targets["labels"], batch.index_B, strict=True):
        assert torch.equal(picture, examples.load_images(i[None])[0].float())
        assert label == examples.targets["labels"][i]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_batch_is_augmented_with_its_own_epochs_draws(examples, epoch):
    augment = Augment(shift=0.2, rotate=9)
    batches_of_run = make_batches(examples, augment=augment)
    batch = batches_of_run.at(epoch * batches_of_run.steps_per_epoch + 2)
    draws = Draws(3, epoch, batch.index_B, augment.slots())
    assert torch.equal(batch.images, augment.apply(examples.load_images(batch.index_B), draws))


def test_mixing_blends_each_image_and_label_with_the_next_of_the_batch(examples):
    augment, task = Augment(shift=0.2, mixup=0.4), Classify().bind(DataFacts(tuple("0123456789"), (1, 8, 8)))
    batch = make_batches(examples, augment=augment, mix_targets=task.learning.mix_targets).at(3)
    draws, partner = Draws(3, 0, batch.index_B, augment.slots()), torch.arange(32).roll(-1)
    pictures, own = augment.mix(augment.apply(examples.load_images(batch.index_B), draws).float(), partner, draws)
    assert torch.equal(batch.images, pictures)
    labels = F.one_hot(examples.targets["labels"][batch.index_B], 10).double()
    expected = own[:, None].double() * labels + (1 - own[:, None].double()) * labels[partner]
    torch.testing.assert_close(batch.targets["labels"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_sample_repeated_in_an_epoch_gets_its_own_augmentation(examples):
    augment = Augment(shift=0.3, rotate=20)
    rare = examples.select((examples.targets["labels"] > 0) | (torch.arange(len(examples)) < 100))
    order = balanced_order(rare.targets["labels"])
    batches_of_run = make_batches(rare, augment=augment, order=order)
    samples, numbers = order(3, 0)
    again = False
    for step in range(10):
        here = slice(32 * step, 32 * step + 32)
        expected = augment.apply(rare.load_images(samples[here]), Draws(3, 0, numbers[here], augment.slots()))
        assert torch.equal(batches_of_run.at(step).images, expected)
        again |= bool((samples[here] != numbers[here]).any())
    assert again


def test_cutting_into_micro_batches_takes_effect_at_the_next_step(examples):
    batches_of_run, whole = make_batches(examples), make_batches(examples)
    assert batches_of_run.at(0).micro_sizes == (32,)
    batches_of_run.set_micro_batches(4)
    for step in (1, 2, 40):
        batch = batches_of_run.at(step)
        assert batch.micro_sizes == (8, 8, 8, 8)
        assert same(batch, whole.at(step))


def test_batches_in_order_have_each_sample_once(examples):
    parts = list(batches_in_order(examples, 50, CPU))
    assert torch.cat([part.index_B for part in parts]).tolist() == list(range(len(examples)))


class StreamedImages:
    """Images that are read at each use; notes which rows were read, and in which thread."""

    is_in_memory = False

    def __init__(self, store):
        self._store, self.shape, self.reads = store, store.shape, []

    def __len__(self):
        return len(self._store)

    def take(self, rows):
        self.reads.append((rows.tolist(), threading.current_thread().name))
        return self._store.take(rows)

    def rows_being_read(self):
        return []


def test_evaluation_reads_the_next_batch_ahead_and_no_further(examples):
    """While the network computes a batch, a thread reads the next one; the batches are those without it."""
    images = StreamedImages(examples.images)
    batches, expected = batches_in_order(replace(examples, images=images), 50, CPU), batches_in_order(examples, 50, CPU)
    for number, batch in enumerate(batches, 1):
        assert same(batch, next(expected))
        deadline = time.monotonic() + 10
        last = -(-len(examples) // 50)
        while len(images.reads) < min(number + 1, last) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(images.reads) == min(number + 1, last)
    assert not list(expected)
    assert {name.split("_")[0] for _, name in images.reads} == {"read ahead"}
    assert [row for rows, _ in images.reads for row in rows] == examples.rows.tolist()


def test_images_in_memory_are_not_read_by_a_thread(examples, monkeypatch):
    monkeypatch.setattr(training_batches, "ThreadPoolExecutor", pytest.fail)
    assert len(list(batches_in_order(examples, 50, CPU))) == -(-len(examples) // 50)


def test_an_evaluation_that_ends_early_ends_its_reading(examples):
    batches = batches_in_order(replace(examples, images=StreamedImages(examples.images)), 20, CPU)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("read ahead") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def test_a_rank_without_a_batch_reads_nothing(examples):
    class Fifth(Ranks):
        rank, world_size = 4, 5

    images = StreamedImages(examples.images)
    few = replace(examples, images=images, rows=examples.rows[:30], targets={"labels": examples.targets["labels"][:30]})
    assert not list(batches_in_order(few, 10, CPU, Fifth()))
    assert not images.reads


@pytest.mark.parametrize("parts", [1, 3, 32, 40])
def test_micro_batches_partition_the_batch(examples, parts):
    batch = make_batches(examples, micro_batch_count=parts).at(0)
    pieces = batch.micro_batches()
    assert len(pieces) == min(parts, 32)
    assert {piece.global_size for piece in pieces} == {32}
    assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
    assert torch.equal(torch.cat([piece.index_B for piece in pieces]), batch.index_B)


EVERY = {
    "colour": {"brightness": 0.5, "contrast": 1.0, "saturation": 0.5, "hue": 0.2, "grayscale": 0.2},
    "geometry": {
        "rotate": 20.0,
        "scale": 0.2,
        "shear": 5.0,
        "shift": 0.2,
        "flip": "both",
        "crop": {"scale": [0.5, 1.0]},
    },
    "copies": {"shift": 0.2, "flip": "both"},
    "pixels": {"blur": 1.0, "noise": 9.0, "erase": 0.5},
    "mixing": {"mixup": 0.4, "cutmix": 1.0},
    "policy": {"policy": "trivial_augment"},
}


@pytest.mark.parametrize("asked", EVERY.values(), ids=EVERY.keys())
@pytest.mark.parametrize(("size", "drop_last"), [(5, True), (33, False)])
def test_starting_at_any_step_changes_no_bit(asked, size, drop_last):
    """As in a resume: at steps inside a prepared block, and with batch sizes that do not fill a vector register."""
    pixels = np.random.default_rng(0).integers(0, 256, (203, 3, 17, 17), dtype=np.uint8)
    rows = torch.arange(203)
    split = Split(pixels.transpose(0, 2, 3, 1), {"labels": rows % 3}, "noise")
    coloured = Examples(MemoryStore(pixels), rows, split.targets, split, rows)

    def fresh() -> TrainingBatches:
        augment, steps = Augment.model_validate(asked), 203 // size + (not drop_last)
        task = Classify().bind(DataFacts(("a", "b", "c"), (3, 17, 17)))
        plan = BatchPlan(size, steps, 3)
        return TrainingBatches(coloured, augment, plan, BatchReading(CPU), task.learning.mix_targets)

    walked = fresh()
    expected = [walked.at(step) for step in range(2 * walked.steps_per_epoch)]
    for begin in (1, 2, 3, walked.steps_per_epoch + 1):
        other = fresh()
        for step in range(begin, min(begin + 3, len(expected))):
            assert same(other.at(step), expected[step]), (begin, step)


@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_prefetching_gives_the_same_batches_and_reports_read_errors(examples, ahead, monkeypatch):
    monkeypatch.setattr(training_batches, "AHEAD_BYTES", 1)
    plain = make_batches(examples)
    with closing(make_batches(examples, prefetch=ahead)) as reading:
        for step in (*range(plain.steps_per_epoch + 3), 2, 3, 40):
            assert same(reading.at(step), make_batches(examples).at(step))

        def fails(rows):
            raise DataError("pets/1.png: gone")

        shape = examples.images.shape
        gone = SimpleNamespace(shape=shape, is_in_memory=True, take=fails, rows_being_read=list)
        broken = replace(examples, images=gone)
    reading = TrainingBatches(broken, Augment(), BatchPlan(32, 5, 3), BatchReading(CPU, ahead))
    with closing(reading), pytest.raises(DataError, match="pets/1.png: gone"):
        reading.at(0)


@pytest.fixture(scope="module")
def crowded_scenes():
    """Scenes, one of which has fifty times as many objects as any other."""
    data = Data.model_validate({"source": {"digit_scenes": {"train": 60, "held_out": 10}}})
    split = build_dataset(data, index_source(data), progress_bar).splits["train"]
    counts = split.objects.counts_N.clone()
    counts[7] = 300
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    box = torch.tensor([2.0, 2.0, 9.0, 9.0])
    columns = {
        "boxes": box.expand(int(ends[-1]), 4).contiguous(),
        "objects": torch.arange(int(ends[-1])) % 10,
        "roles": torch.zeros(int(ends[-1]), dtype=torch.uint8),
        "areas": torch.full((int(ends[-1]),), 49.0),
    }
    return replace(split, objects=ObjectTable(columns, ends))


@pytest.mark.parametrize("mosaic", [0.0, 0.7])
def test_targets_are_padded_to_their_own_batch_wherever_training_starts(crowded_scenes, mosaic, monkeypatch):
    augment = Augment(mosaic=mosaic)
    walked = [make_batches(crowded_scenes, batch=5, augment=augment).at(step) for step in range(24)]
    widths = {batch.targets["boxes"].shape[1] for batch in walked}
    assert max(widths) >= 300 > 10 * sorted(widths)[len(widths) // 2]
    assert not mosaic or len(widths) > 3
    monkeypatch.setattr(training_batches, "AHEAD_BYTES", 10**9)
    whole = make_batches(crowded_scenes, batch=5, augment=augment)
    for step, batch in enumerate(walked):
        again = whole.at(step)
        assert torch.equal(again.images, batch.images)
        assert {name: values.tolist() for name, values in again.targets.items()} == {
            name: values.tolist() for name, values in batch.targets.items()
        }
        if not mosaic:
            own = crowded_scenes.objects.counts_N[batch.index_B]
            assert batch.targets["boxes"].shape[1] == own.max()
            assert torch.equal((batch.targets["objects"] >= 0).sum(1), own)


def test_an_object_table_gives_each_image_its_own_objects(crowded_scenes):
    table, order = crowded_scenes.objects, torch.tensor([7, 3, 3, 59, 0])
    padded = table.pad(order)
    for row, number in enumerate(order.tolist()):
        own = slice(int(table.offsets_N1[number]), int(table.offsets_N1[number + 1]))
        count = own.stop - own.start
        for name, values in table.columns.items():
            assert torch.equal(padded[name][row, :count], values[own])
        assert (padded["objects"][row, count:] == -1).all()
        assert not padded["boxes"][row, count:].any()
    assert all(torch.equal(table.select(order).pad()[name], values) for name, values in padded.items())
    mask = torch.zeros(len(table), dtype=torch.bool)
    mask[[0, 3]] = True
    assert torch.equal(table.select(mask).offsets_N1, table.select(torch.tensor([0, 3])).offsets_N1)
    blocks = list(table.padded_blocks())
    assert torch.equal(torch.cat([block["boxes"] for block in blocks]), table.pad()["boxes"])
