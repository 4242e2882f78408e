"""Which samples an epoch shows and in which order: pure functions of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cnnrun.randomness import key, permutation

# (seed, epoch) -> the samples in order, int64 [N], and beside each a number that no other place of the epoch has: by it
# a sample that is shown twice is changed in two ways.
Order = Callable[[int, int], tuple[Tensor, Tensor]]


def uniform_order(count: int) -> Order:
    """Each of `count` samples once."""

    def order(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        samples = permutation(seed, epoch, count)
        return samples, samples

    return order


def balanced_order(labels_N: Tensor) -> Order:
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
                chosen = of_class[permutation(key(seed, place, cycle), epoch, len(of_class))]
                chosen = chosen[: wanted - cycle * len(of_class)]
                samples.append(chosen)
                numbers.append(chosen + cycle * count)
        shuffled = permutation(seed, epoch, count)
        return torch.cat(samples)[shuffled], torch.cat(numbers)[shuffled]

    return order


def times_shown(labels_N: Tensor, classes: int) -> list[float]:
    """How often the balanced order shows a sample of each class in an epoch, on average; 0 where a class has none."""
    counts = torch.bincount(labels_N, minlength=classes)
    share = len(labels_N) / int((counts > 0).sum())
    return [share / count if count else 0.0 for count in counts.tolist()]
