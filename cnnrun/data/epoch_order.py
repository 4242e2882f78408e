"""Which samples an epoch shows and in which order: pure functions of (seed, epoch). `train.sampler` of the YAML."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cnnrun.base.randomness import derive_key, permutation
from cnnrun.config.spec import Kind

# (seed, epoch) -> the samples in order, int64 [N], and beside each a number that no other place of the epoch has: by it
# a sample that is shown twice is changed in two ways.
EpochOrder = Callable[[int, int], tuple[Tensor, Tensor]]


def uniform_order(count: int) -> EpochOrder:
    """Each of `count` samples once."""

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        samples = permutation(seed, epoch, count)
        return samples, samples

    return order


def balanced_order(labels_N: Tensor) -> EpochOrder:
    """As many places as samples, as many for each class: of rare ones samples are shown again, of others left out.

    Within a class everything is shown before anything is shown again.
    """
    members = [torch.nonzero(labels_N == label)[:, 0] for label in labels_N.unique()]
    count, classes = len(labels_N), len(members)

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        samples, numbers = [], []
        for place, of_class in enumerate(members):
            # What does not divide evenly goes to other classes each epoch.
            wanted = count // classes + ((place + epoch) % classes < count % classes)
            for cycle in range(-(-wanted // len(of_class))):
                chosen = of_class[permutation(derive_key(seed, place, cycle), epoch, len(of_class))]
                chosen = chosen[: wanted - cycle * len(of_class)]
                samples.append(chosen)
                numbers.append(chosen + cycle * count)
        shuffled = permutation(seed, epoch, count)
        return torch.cat(samples)[shuffled], torch.cat(numbers)[shuffled]

    return order


def repetitions_per_class(labels_N: Tensor, classes: int) -> list[float]:
    """How often the balanced order shows a sample of each class in an epoch, on average; 0 where a class has none."""
    counts = torch.bincount(labels_N, minlength=classes)
    share = len(labels_N) / int((counts > 0).sum())
    return [share / count if count else 0.0 for count in counts.tolist()]


def identities_order(labels_N: Tensor, batch: int, pictures: int) -> EpochOrder:
    """As many places as samples; each batch has `pictures` of each of batch / `pictures` classes, none of them twice.

    All classes are shown before any is shown again. Of a class with fewer pictures some are shown again; where there
    are fewer classes than a batch takes, classes are.
    """
    members = [torch.nonzero(labels_N == label)[:, 0] for label in labels_N.unique()]
    count, classes = len(labels_N), len(members)

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        streams = [_again_and_again(seed, epoch, place, each, pictures) for place, each in enumerate(members)]
        waiting, rounds, numbers = list[int](), 0, list[int]()
        while len(numbers) < count:
            end, here = min(len(numbers) + batch, count), set[int]()
            while len(numbers) < end:
                if not waiting:  # those of this batch last, so that none comes twice
                    fresh = permutation(derive_key(seed, classes, rounds), epoch, classes).tolist()
                    waiting, rounds = sorted(fresh, key=lambda place: place not in here), rounds + 1
                place = waiting.pop()
                here.add(place)
                for _ in range(min(pictures, end - len(numbers))):
                    sample, cycle = next(streams[place])
                    numbers.append(sample + cycle * count)
        made = torch.tensor(numbers)
        return made % count, made

    return order


def _again_and_again(seed: int, epoch: int, place: int, members: Tensor, apart: int) -> Iterator[tuple[int, int]]:
    """A class's samples in an order of their own, with how often all were shown before; then in another one.

    Of `apart` that follow each other none is shown twice, where there are so many.
    """
    recent: deque[int] = deque(maxlen=apart - 1)
    for cycle in itertools.count():
        waiting: list[int] = members[permutation(derive_key(seed, place, cycle), epoch, len(members))].tolist()
        # Beyond the first `apart` - 1 places every picture was last shown long enough ago.
        for _ in range(min(apart - 1, len(waiting))):
            sample = next((each for each in waiting if each not in recent), waiting[0])
            waiting.remove(sample)
            recent.append(sample)
            yield sample, cycle
        recent.extend(waiting)
        for sample in waiting:
            yield sample, cycle


class SamplerSpec(Kind):
    """An epoch's order."""

    needs_labels: ClassVar[bool] = True
    """Whether it goes by one label a picture."""

    @property
    def images_per_class(self) -> int:
        """Pictures of a class that come together; 0 where that is left to chance."""
        return 0

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        """The order over samples with these targets in batches of so many; None for each once."""
        raise NotImplementedError

    def batch_problem(self, counts: Sequence[int], batch: int) -> str | None:
        """Why batches of so many cannot be made of classes with so many pictures each, or None."""
        return None

    def repetitions_per_class(self, labels_N: Tensor, classes: int) -> list[float] | None:
        """How often an epoch shows a sample of each class, on average, where that is worth telling."""
        return None


class Uniform(SamplerSpec):
    """Every picture once."""

    kind = "uniform"
    needs_labels = False

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return None


class Balanced(SamplerSpec):
    """Every class equally often: samples of rare ones again, changed otherwise."""

    kind = "balanced"

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return balanced_order(targets["labels"])

    def repetitions_per_class(self, labels_N: Tensor, classes: int) -> list[float] | None:
        return repetitions_per_class(labels_N, classes)


class Identities(SamplerSpec):
    """In each batch `pictures` of each of batch / `pictures` classes, such as people; every class equally often."""

    kind = "identities"
    main = "pictures"

    pictures: int = Field(4, ge=2, le=10_000)
    """Of each class in a batch."""

    def order(self, targets: dict[str, Tensor], batch: int) -> EpochOrder | None:
        return identities_order(targets["labels"], batch, self.pictures)

    @property
    def images_per_class(self) -> int:
        return self.pictures

    def batch_problem(self, counts: Sequence[int], batch: int) -> str | None:
        classes = sum(count > 0 for count in counts)
        if batch % self.pictures:
            return f"a batch of {batch} is not made of {self.pictures} pictures of each class"
        if batch // self.pictures > classes:
            return f"{batch // self.pictures} classes of {self.pictures} pictures a batch; train has {classes}"
        return None


Sampler = Uniform | Balanced | Identities
