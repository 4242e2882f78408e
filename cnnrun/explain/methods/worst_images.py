"""The pictures that a network serves worst: those of the largest loss, or most like another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.contracts.prediction_text import describe_prediction
from cnnrun.contracts.results import View
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.explain.subject import Subject, compute_class_scores, sample_evenly

_MOST = 4000  # pictures that are looked through
_LIKER = "how much more it is like another's picture than like its own"


@dataclass(frozen=True)
class Mistake:
    """A picture of a split that the network serves badly: what is true, what is said, and how badly."""

    sample: int
    target_text: str
    prediction_text: str
    badness: float


@dataclass(frozen=True)
class WorstImages:
    """The worst pictures, worst first, what they are ordered by, and how many were looked at."""

    mistakes: list[Mistake]
    badness_name: str
    sample_count: int
    prediction_title: str = "said"  # how what stands in `said` comes to be said


def find_worst_images(subject: Subject, examples: Examples, count: int, batch: int) -> WorstImages:
    """The pictures of a split that are served worst; of a large split some are looked at, at equal distances."""
    given = subject.trained
    part, numbers = sample_evenly(examples, _MOST)
    if given.task.is_open_set:
        return WorstImages(_strangers(subject, numbers, part, count, batch), _LIKER, len(part), "another most like it")
    losses = _losses(subject, part, batch)
    order = losses.argsort(descending=True, stable=True)[:count]
    results = given.results(part.load_images(order).to(given.device).float())
    true = given.task.describe_targets(part.batch_targets(order, given.device), given.facts)
    views = [View((given.facts.image[1], given.facts.image[2]))] * len(order)
    said = [describe_prediction(row) for row in given.task.result_rows(results, given.facts, views)]
    found = [
        Mistake(int(numbers[place]), its, told, float(losses[place]))
        for place, its, told in zip(order.tolist(), true, said, strict=True)
    ]
    return WorstImages(found, "loss", len(part))


def _losses(subject: Subject, examples: Examples, batch: int) -> Tensor:
    """What the criterion says of each picture alone."""
    criterion, found = subject.trained.criterion, []
    with torch.inference_mode():
        for part in batches_in_order(examples, batch, subject.trained.device):
            outputs = subject.trained.network(part.images).float()
            for place in range(len(outputs)):
                own = {name: values[place : place + 1] for name, values in part.targets.items()}
                found.append(torch.stack(list(criterion(outputs[place : place + 1], own).values())).sum())
    return torch.stack(found).cpu()


def _strangers(subject: Subject, numbers: Tensor, examples: Examples, count: int, batch: int) -> list[Mistake]:
    """Pictures that another's picture resembles more than any of their own does, or nearly; people with one aside."""
    given, targets = subject.trained, examples.targets
    with torch.inference_mode():
        parts = [
            compute_class_scores(given, part.images).display_BK
            for part in batches_in_order(examples, batch, given.device)
        ]
    said, labels = torch.cat(parts).cpu(), targets["labels"]
    likeness = said @ said.T
    same = labels[:, None] == labels
    others, nearest = likeness.masked_fill(same, -2.0).max(1)
    own = likeness.fill_diagonal_(-2.0).masked_fill(~same, -2.0).amax(1)
    apart = (others - own).masked_fill((same.sum(1) < 2) | same.all(1), -torch.inf)
    order = apart.argsort(descending=True, stable=True)[:count]
    true = subject.trained.task.describe_targets(targets, subject.trained.facts)
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
