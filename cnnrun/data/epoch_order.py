"""The samples of an epoch and their order, as pure functions of (seed, epoch): `train.sampler` of the YAML."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.randomness import derive_key, permutation
from cnnrun.config.spec import Kind

# (seed, epoch) -> the samples in order, int64 [N], and for each an augmentation id that is unique in the epoch. The id
# seeds the augmentation, so that repeated samples in an epoch get different augmentations.
EpochOrder = Callable[[int, int], tuple[Tensor, Tensor]]


def uniform_order(count: int) -> EpochOrder:
    """Make an order that has each of `count` samples once."""

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        samples = permutation(seed, epoch, count)
        return samples, samples

    return order


def balanced_order(labels_N: Tensor) -> EpochOrder:
    """Make an order in which all classes are equally frequent, with as many places as there are samples.

    Samples of rare classes are repeated, and of frequent ones some are left out. All samples of a class are shown
    before one is repeated.
    """
    members = [torch.nonzero(labels_N == label)[:, 0] for label in labels_N.unique()]
    count, classes = len(labels_N), len(members)

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        samples, ids = [], []
        for index, class_members in enumerate(members):
            # The places that do not divide evenly go to other classes in each epoch.
            class_count = count // classes + ((index + epoch) % classes < count % classes)
            for cycle in range(-(-class_count // len(class_members))):
                class_samples = class_members[permutation(derive_key(seed, index, cycle), epoch, len(class_members))]
                class_samples = class_samples[: class_count - cycle * len(class_members)]
                samples.append(class_samples)
                ids.append(class_samples + cycle * count)
        shuffled = permutation(seed, epoch, count)
        return torch.cat(samples)[shuffled], torch.cat(ids)[shuffled]

    return order


def repetitions_per_class(labels_N: Tensor, classes: int) -> list[float]:
    """Average number of times that a balanced epoch shows a sample of each class; 0 for an empty class."""
    counts = torch.bincount(labels_N, minlength=classes)
    share = len(labels_N) / int((counts > 0).sum())
    return [share / count if count else 0.0 for count in counts.tolist()]


def identities_order(labels_N: Tensor, batch: int, images_per_class: int) -> EpochOrder:
    """Make an order whose batches have `images_per_class` images of each of batch / `images_per_class` classes.

    There are as many places as samples. All classes are shown before one is repeated. No class is twice in a batch,
    unless there are fewer classes than a batch needs. A class with fewer images than `images_per_class` repeats some.
    """
    members = [torch.nonzero(labels_N == label)[:, 0] for label in labels_N.unique()]
    count, classes = len(labels_N), len(members)

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        streams = [
            _cycle_samples(seed, epoch, index, class_members, images_per_class)
            for index, class_members in enumerate(members)
        ]
        waiting, rounds, ids = list[int](), 0, list[int]()
        while len(ids) < count:
            end, in_batch = min(len(ids) + batch, count), set[int]()
            while len(ids) < end:
                if not waiting:  # classes of this batch come last (`pop` takes from the end), so that none comes twice
                    shuffled = permutation(derive_key(seed, classes, rounds), epoch, classes).tolist()
                    waiting, rounds = sorted(shuffled, key=lambda index: index not in in_batch), rounds + 1
                index = waiting.pop()
                in_batch.add(index)
                for _ in range(min(images_per_class, end - len(ids))):
                    sample, cycle = next(streams[index])
                    ids.append(sample + cycle * count)
        ids_N = torch.tensor(ids)
        return ids_N % count, ids_N

    return order


def _cycle_samples(
    seed: int, epoch: int, class_index: int, members: Tensor, min_distance: int
) -> Iterator[tuple[int, int]]:
    """Yield a class's samples without end, reshuffled in each cycle, with the number of the cycle.

    No sample occurs twice within `min_distance` successive ones, if the class has that many.
    """
    recent: deque[int] = deque(maxlen=min_distance - 1)
    for cycle in itertools.count():
        shuffled = permutation(derive_key(seed, class_index, cycle), epoch, len(members))
        waiting: list[int] = members[shuffled].tolist()
        # After the first `min_distance` - 1 places no sample of the cycle before is too near.
        for _ in range(min(min_distance - 1, len(waiting))):
            sample = next((sample for sample in waiting if sample not in recent), waiting[0])
            waiting.remove(sample)
            recent.append(sample)
            yield sample, cycle
        recent.extend(waiting)
        for sample in waiting:
            yield sample, cycle


class SamplerSpec(Kind):
    """The order of an epoch's samples."""

    needs_labels: ClassVar[bool] = True
    """True if the order depends on each image having one label."""

    @property
    def images_per_class(self) -> int:
        """Images of each class in a batch; 0 if the sampler does not fix it."""
        return 0

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        """The order of samples with these targets in batches of `batch`, or None for the uniform order."""
        raise NotImplementedError

    def batch_problem(self, counts: Sequence[int], batch: int) -> str | None:
        """Reason that batches of `batch` cannot be made of classes with `counts` images, or None."""
        return None

    def repetitions_per_class(self, labels_N: Tensor, classes: int) -> list[float] | None:
        """Average number of times that an epoch shows a sample of each class, or None if always once."""
        return None


class Uniform(SamplerSpec):
    """Every image once."""

    kind = "uniform"
    needs_labels = False

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return None


class Balanced(SamplerSpec):
    """Every class equally often: samples of rare classes are repeated, with different augmentations."""

    kind = "balanced"

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return balanced_order(targets["labels"])

    def repetitions_per_class(self, labels_N: Tensor, classes: int) -> list[float] | None:
        return repetitions_per_class(labels_N, classes)


class Identities(SamplerSpec):
    """Batches of `images` images from each of batch / `images` classes, such as people; all classes equally often."""

    kind = "identities"
    main = "images"
    old_keys = {"pictures": "images"}

    images: int = Field(4, ge=2, le=10_000)
    """Images of each class in a batch."""

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return identities_order(targets["labels"], batch, self.images)

    @property
    def images_per_class(self) -> int:
        return self.images

    def batch_problem(self, counts: Sequence[int], batch: int) -> str | None:
        classes = sum(count > 0 for count in counts)
        if batch % self.images:
            nearest = max(1, round(batch / self.images)) * self.images
            return f"train.batch {batch} is not a multiple of {self.images} images of each class; use {nearest}"
        if batch // self.images > classes:
            return (
                f"a batch needs {batch // self.images} classes of {self.images} images, but train has "
                f"{format_count(classes, 'class', 'classes')}; use a smaller batch or more images of each class"
            )
        return None


Sampler = Uniform | Balanced | Identities
