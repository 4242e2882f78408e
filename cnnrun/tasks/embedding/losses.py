"""Losses over embeddings: softmax losses with a margin between class centres, and triplets.

The softmax losses need embeddings of unit length, so that the product of two is the cosine of the angle between them.
Gradients pass through the margin, as in the papers' formulas. A well-known implementation computes the margin without
gradients, which scales the gradient of the true class, for ArcFace by cos(theta) / cos(theta + m).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cnnrun.config.spec import Kind
from cnnrun.contracts.task_parts import Criterion

_MIN_SQUARED_SINE = 1e-7  # about the rounding error of 1 - cosine^2 in float32; keeps the root's slope finite

Warmup = Annotated[float, Field(ge=0, le=1)]


class EmbeddingLossSpec(Kind):
    """Base class of losses over embeddings."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        """Build the criterion. `place_K` numbers the classes that have training images, from 0; others have -1."""
        raise NotImplementedError

    needs_class_batches: ClassVar[bool] = False
    """True if a batch needs several images of a class, as from `train.sampler: identities`."""


class CosineCrossEntropy(Criterion):
    """Cross-entropy of `scale` times the cosines to the class centres [P, D]; subclasses add a margin.

    Without a margin it is NormFace (Wang et al. 2017, eq. 4). The margin grows from 0 over the first share `warmup` of
    the training, because random embeddings cannot learn the full margin.
    """

    def __init__(self, dimension: int, place_K: Tensor, scale: float, margin: float = 0.0, warmup: float = 0.0) -> None:
        super().__init__()
        self.scale, self.full_margin, self.warmup, self.margin = scale, margin, warmup, margin
        self.register_buffer("place", place_K, persistent=False)
        self.centres = nn.Parameter(torch.randn(int(place_K.max()) + 1, dimension))

    place: Tensor

    def set_progress(self, fraction: float) -> None:
        self.margin = self.full_margin * min(1.0, fraction / self.warmup) if self.warmup else self.full_margin

    @property
    def depends_on_progress(self) -> bool:
        return self.warmup > 0

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        cosine_BP = outputs @ F.normalize(self.centres).T
        label_B1 = self.place[targets["labels"]][:, None]
        target_cosine_B1 = self.apply_margin(cosine_BP.gather(1, label_B1))
        logits_BP = self.scale * cosine_BP.scatter(1, label_B1, target_cosine_B1)
        return {"cross_entropy": F.cross_entropy(logits_BP, label_B1[:, 0])}

    def apply_margin(self, cosine: Tensor) -> Tensor:
        """Lower the true class's cosine by the margin."""
        return cosine


class AngularMargin(CosineCrossEntropy):
    """ArcFace's margin: cos(theta + m) for the true class (Deng et al. 2019, eq. 3).

    Beyond theta = pi - m, where cos(theta + m) would rise again, it is -2 - cos(theta + m): continuous and falling,
    like SphereFace's psi (Liu et al. 2017, section 3.2).
    """

    def apply_margin(self, cosine: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp(min=_MIN_SQUARED_SINE).sqrt()
        rotated = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), rotated, -2 - rotated)


class CosineMargin(CosineCrossEntropy):
    """CosFace's margin: cos(theta) - m for the true class (Wang et al. 2018, eq. 4)."""

    def apply_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class TripletCriterion(Criterion):
    """Triplet loss max(0, |a - p|^2 - |a - n|^2 + margin): the mean over all pairs (a, p) of a class in the batch.

    The negative n is semi-hard: the nearest image of another class that is farther from a than p is; if there is none,
    the farthest image of another class (Schroff et al. 2015, section 3.2). Triplets are formed within a micro-batch on
    one rank.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = targets["labels"]
        distance_BB = _squared_distances(outputs)
        same = labels[:, None] == labels
        negatives_B1 = (~same).sum(1, keepdim=True)
        sorted_BB, order_BB = distance_BB.detach().masked_fill(same, math.inf).sort(1)
        # The number of negatives that are at most as far as each image of the row is the index of the semi-hard one.
        semi_hard_BB = torch.searchsorted(sorted_BB, distance_BB.detach(), right=True)
        negative_BB = order_BB.gather(1, torch.minimum(semi_hard_BB, negatives_B1 - 1).clamp(min=0))
        loss = (distance_BB - distance_BB.gather(1, negative_BB) + self.margin).clamp(min=0)
        pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) & (negatives_B1 > 0)
        return {"triplet": (loss * pairs).sum() / pairs.sum().clamp(min=1)}


def _squared_distances(embeddings_BD: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs: [B, B]."""
    squares_B = embeddings_BD.square().sum(1)
    return squares_B[:, None] + squares_B - 2 * embeddings_BD @ embeddings_BD.T


class ArcFace(EmbeddingLossSpec):
    """Softmax over cosines with a margin added to the true class's angle (Deng et al. 2019)."""

    kind = "arcface"
    main = "margin"
    margin: float = Field(0.5, ge=0, lt=math.pi / 2)
    """Angle in radians that is added to the true class's."""
    scale: float = Field(30.0, gt=0)
    """Factor on the cosines before the softmax."""
    warmup: Warmup = 0.2
    """The share of the training over which the margin grows from 0."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return AngularMargin(dimension, place_K, self.scale, self.margin, self.warmup)


class CosFace(EmbeddingLossSpec):
    """Softmax over cosines with a margin subtracted from the true class's cosine (Wang et al. 2018)."""

    kind = "cosface"
    main = "margin"
    margin: float = Field(0.35, ge=0, lt=2)
    """Number that is subtracted from the true class's cosine."""
    scale: float = Field(30.0, gt=0)
    """Factor on the cosines before the softmax."""
    warmup: Warmup = 0.2
    """The share of the training over which the margin grows from 0."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return CosineMargin(dimension, place_K, self.scale, self.margin, self.warmup)


class NormFace(EmbeddingLossSpec):
    """Softmax over cosines without a margin (NormFace, Wang et al. 2017)."""

    kind = "softmax"
    main = "scale"
    scale: float = Field(30.0, gt=0)
    """Factor on the cosines before the softmax."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return CosineCrossEntropy(dimension, place_K, self.scale)


class Triplet(EmbeddingLossSpec):
    """Triplets: two images of a class should be nearer than a semi-hard image of another (Schroff et al. 2015)."""

    kind = "triplet"
    main = "margin"
    needs_class_batches = True
    margin: float = Field(0.2, gt=0, le=4)
    """Margin between the squared distances, which are 2 - 2 cos for embeddings of unit length."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return TripletCriterion(self.margin)


EmbeddingLoss = ArcFace | CosFace | NormFace | Triplet
