"""The pictures that a network serves worst: those of the largest loss, or most like another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.contracts.prediction_text import describe_prediction
from cnnrun.contracts.results import View
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import in_order
from cnnrun.explain.subject import Subject, said_of, some

_MOST = 4000  # pictures that are looked through
_LIKER = "how much more it is like another's picture than like its own"


@dataclass(frozen=True)
class Mistake:
    """A picture of a split that the network serves badly: what is true, what is said, and how badly."""

    sample: int
    true: str
    said: str
    badness: float


@dataclass(frozen=True)
class Worst:
    """The worst pictures, worst first, what they are ordered by, and how many were looked at."""

    mistakes: list[Mistake]
    by: str
    looked_at: int
    verb: str = "said"  # how what stands in `said` comes to be said


def worst(subject: Subject, examples: Examples, count: int, batch: int) -> Worst:
    """The pictures of a split that are served worst; of a large split some are looked at, at equal distances."""
    given = subject.given
    part, numbers = some(examples, _MOST)
    if given.task.open_set:
        return Worst(_strangers(subject, numbers, part, count, batch), _LIKER, len(part), "another most like it")
    losses = _losses(subject, part, batch)
    order = losses.argsort(descending=True, stable=True)[:count]
    results = given.results(part.take(order).to(given.device).float())
    true = given.task.words(part.targets_of(order, given.device), given.facts)
    views = [View((given.facts.image[1], given.facts.image[2]))] * len(order)
    said = [describe_prediction(row) for row in given.task.rows(results, given.facts, views)]
    found = [
        Mistake(int(numbers[place]), its, told, float(losses[place]))
        for place, its, told in zip(order.tolist(), true, said, strict=True)
    ]
    return Worst(found, "loss", len(part))


def _losses(subject: Subject, examples: Examples, batch: int) -> Tensor:
    """What the criterion says of each picture alone."""
    criterion, found = subject.given.criterion, []
    with torch.inference_mode():
        for part in in_order(examples, batch, subject.given.device):
            outputs = subject.given.network(part.pictures).float()
            for place in range(len(outputs)):
                own = {name: values[place : place + 1] for name, values in part.targets.items()}
                found.append(torch.stack(list(criterion(outputs[place : place + 1], own).values())).sum())
    return torch.stack(found).cpu()


def _strangers(subject: Subject, numbers: Tensor, examples: Examples, count: int, batch: int) -> list[Mistake]:
    """Pictures that another's picture resembles more than any of their own does, or nearly; people with one aside."""
    given, targets = subject.given, examples.targets
    with torch.inference_mode():
        parts = [said_of(given, part.pictures).shown_BK for part in in_order(examples, batch, given.device)]
    said, labels = torch.cat(parts).cpu(), targets["labels"]
    likeness = said @ said.T
    same = labels[:, None] == labels
    others, nearest = likeness.masked_fill(same, -2.0).max(1)
    own = likeness.fill_diagonal_(-2.0).masked_fill(~same, -2.0).amax(1)
    apart = (others - own).masked_fill((same.sum(1) < 2) | same.all(1), -torch.inf)
    order = apart.argsort(descending=True, stable=True)[:count]
    true = subject.given.task.words(targets, subject.given.facts)
    return [
        Mistake(
            int(numbers[place]),
            true[place],
            f"{true[int(nearest[place])]}, cosine {float(others[place]):.3f}; its own at most {float(own[place]):.3f}",
            float(apart[place]),
        )
        for place in order.tolist()
        if torch.isfinite(apart[place])
    ]
