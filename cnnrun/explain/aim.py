"""The score that a method explains: a direction in the network's scores, such as one class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, escape
from cnnrun.config.messages import nearest_suggestion
from cnnrun.contracts.results import ClassScores
from cnnrun.explain.backward_rules import relu_modules
from cnnrun.explain.subject import ExplainedNetwork, ImagesToExplain


@dataclass(frozen=True)
class ScoreDirection:
    """A direction in the scores of each image, such as one class; `quantity` says what is measured along it."""

    direction_BK: Tensor
    names: list[str]
    quantity: str
    is_local: bool = False  # the score comes from one position of the image alone

    def scores(self, scores_BK: Tensor) -> Tensor:
        """Project scores onto the direction: [B]."""
        return (scores_BK * self.direction_BK).sum(1)

    def select(self, start: int, count: int = 1) -> ScoreDirection:
        """Select the directions of some images; the direction of a single image also fits any number of images."""
        selected = slice(start, start + count)
        return replace(self, direction_BK=self.direction_BK[selected], names=self.names[selected])


def choose_direction(
    class_scores: ClassScores, class_name: str | None, images: ImagesToExplain, compare_with_itself: bool = False
) -> ScoreDirection:
    """Choose what to explain: the class `class_name`, else each image's predicted class. Raises ConfigError.

    For a network that gives embeddings, choose the similarity to the most similar of the other images, or to the image
    itself if `compare_with_itself`.
    """
    if class_scores.names:
        if class_name is not None and class_name not in class_scores.names:
            suggestion = nearest_suggestion(class_name, class_scores.names)
            known = f"known: {join_names(class_scores.names)}"
            raise ConfigError(f"--class {escape(class_name)}: the network has no such class{suggestion} ({known})")
        class_B = class_scores.default_B
        if class_name is not None:
            class_B = torch.full_like(class_B, class_scores.names.index(class_name))
        direction_BK = torch.nn.functional.one_hot(class_B, len(class_scores.names)).to(class_scores.raw_BK.dtype)
        names = [class_scores.names[index] for index in class_B.tolist()]
        return ScoreDirection(direction_BK, names, class_scores.quantity, class_scores.is_local)
    if class_name is not None:
        raise ConfigError("--class: this network gives embeddings, which have no classes; leave the option out")
    vectors = class_scores.display_BK.detach()
    if compare_with_itself:
        return ScoreDirection(vectors, ["the unchanged image"] * len(images), class_scores.quantity)
    if len(images) < 2:
        raise ConfigError("this network gives embeddings: give two or more images, whose similarity is explained")
    most_similar = (vectors @ vectors.T).fill_diagonal_(-2.0).argmax(1)
    names = [f"like {images.title(index)}" for index in most_similar.tolist()]
    return ScoreDirection(vectors[most_similar], names, class_scores.quantity)


def no_relu_note(subject: ExplainedNetwork) -> str:
    """Note for a caption if the network has no ReLU, to which the deconvnet and guided backpropagation would apply."""
    return "" if relu_modules(subject.trained.network) else " No activation is a ReLU, so plain gradients are used."
