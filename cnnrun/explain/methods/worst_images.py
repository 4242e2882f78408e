"""Worst images of a network: those with the largest loss, or most similar to images of another identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.contracts.results import View
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.explain.subject import ExplainedNetwork, compute_class_scores, sample_evenly

_MAX_SEARCHED = 4000  # images of a split that are searched
_SIMILARITY_EXCESS = "similarity to another identity minus that to its own"


@dataclass(frozen=True)
class WorstImage:
    """An image of a split with its target, the network's prediction and a measure of how bad that is."""

    sample: int
    target_text: str
    prediction_text: str
    measure: float


@dataclass(frozen=True)
class WorstImages:
    """The worst images, worst first, the measure that orders them, and the number of images searched."""

    images: list[WorstImage]
    measure_name: str
    sample_count: int
    prediction_title: str = "predicted"  # label of the prediction text


def find_worst_images(subject: ExplainedNetwork, examples: Examples, count: int, batch: int) -> WorstImages:
    """Find the worst images of a split; of a large split, only evenly spaced images are searched."""
    trained = subject.trained
    sample, indices = sample_evenly(examples, _MAX_SEARCHED)
    if trained.task.matching:
        mistakes = _most_confused(subject, indices, sample, count, batch)
        return WorstImages(mistakes, _SIMILARITY_EXCESS, len(sample), "most similar other")
    losses = _losses(subject, sample, batch)
    order = losses.argsort(descending=True, stable=True)[:count]
    results = trained.results(sample.load_images(order).to(trained.device).float())
    target_texts = trained.task.showing.describe_targets(sample.batch_targets(order, trained.device))
    views = [View((trained.facts.image_shape[1], trained.facts.image_shape[2]))] * len(order)
    prediction_texts = [prediction.to_text() for prediction in trained.predictions(results, views)]
    mistakes = [
        WorstImage(int(indices[position]), target_text, prediction_text, float(losses[position]))
        for position, target_text, prediction_text in zip(order.tolist(), target_texts, prediction_texts, strict=True)
    ]
    return WorstImages(mistakes, "loss", len(sample))


def _losses(subject: ExplainedNetwork, examples: Examples, batch_size: int) -> Tensor:
    """Compute the loss of each image alone."""
    criterion, losses = subject.trained.criterion, []
    with torch.inference_mode():
        for batch in batches_in_order(examples, batch_size, subject.trained.device):
            outputs = subject.trained.network(batch.images).float()
            losses.append(criterion.sample_losses(outputs, batch.targets))
    return torch.cat(losses).cpu()


def _most_confused(
    subject: ExplainedNetwork, indices: Tensor, examples: Examples, count: int, batch_size: int
) -> list[WorstImage]:
    """Find images that are more similar to another identity than to their own; skip identities with one image."""
    trained, targets = subject.trained, examples.targets
    with torch.inference_mode():
        scores = [
            compute_class_scores(trained, batch.images).display_BK
            for batch in batches_in_order(examples, batch_size, trained.device)
        ]
    embeddings, labels = torch.cat(scores).cpu(), targets["labels"]
    similarity = embeddings @ embeddings.T
    is_same = labels[:, None] == labels
    other_similarity, nearest = similarity.masked_fill(is_same, -2.0).max(1)
    own_similarity = similarity.fill_diagonal_(-2.0).masked_fill(~is_same, -2.0).amax(1)
    excess = (other_similarity - own_similarity).masked_fill((is_same.sum(1) < 2) | is_same.all(1), -torch.inf)
    order = excess.argsort(descending=True, stable=True)[:count]
    target_texts = subject.trained.task.showing.describe_targets(targets)
    return [
        WorstImage(
            int(indices[position]),
            target_texts[position],
            f"{target_texts[int(nearest[position])]}, cosine {float(other_similarity[position]):.3f}; its own at most "
            f"{float(own_similarity[position]):.3f}",
            float(excess[position]),
        )
        for position in order.tolist()
        if torch.isfinite(excess[position])
    ]
