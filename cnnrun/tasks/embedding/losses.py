"""What an embedding learns by: a direction for each class with a margin between them, or triplets.

Embeddings have unit length, so a product with a unit direction is the cosine of the angle between them. The formulas
are written so that gradients pass through the margin; a well-known implementation computes it without, which scales the
gradient of the true class by cos(theta) / cos(theta + m) and the like.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cnnrun.config.spec import Kind
from cnnrun.contracts.task import Criterion

_TINY = 1e-7  # of a squared sine: float32 cannot tell 1 less the squared cosine from 0 any nearer

Warmup = Annotated[float, Field(ge=0, le=1)]


class EmbeddingLossSpec(Kind):
    """A loss over embeddings."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        """The criterion. `place_K` numbers the classes that are trained on, from 0; others have -1."""
        raise NotImplementedError

    needs_class_batches: ClassVar[bool] = False
    """Whether a batch needs several pictures of a class: train.sampler: identities."""


class CosineCrossEntropy(Criterion):
    """Cross-entropy of `scale` * cosine to each class's centre [P, D]; subclasses lower the true class's by a margin.

    Without a margin it is NormFace (Wang et al. 2017, eq. 4). The margin grows from 0 over the first `warmup` of the
    training: at once, it would ask of random directions what they cannot give.
    """

    def __init__(self, dimension: int, place_K: Tensor, scale: float, margin: float = 0.0, warmup: float = 0.0) -> None:
        super().__init__()
        self.scale, self.full_margin, self.warmup, self.margin = scale, margin, warmup, margin
        self.register_buffer("place", place_K, persistent=False)
        self.centres = nn.Parameter(torch.randn(int(place_K.max()) + 1, dimension))

    place: Tensor

    def set_progress(self, done: float) -> None:
        self.margin = self.full_margin * min(1.0, done / self.warmup) if self.warmup else self.full_margin

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        cosine_BP = outputs @ F.normalize(self.centres).T
        own_B1 = self.place[targets["labels"]][:, None]
        lowered = self.apply_margin(cosine_BP.gather(1, own_B1))
        return {"cross_entropy": F.cross_entropy(self.scale * cosine_BP.scatter(1, own_B1, lowered), own_B1[:, 0])}

    def apply_margin(self, cosine: Tensor) -> Tensor:
        """What stands in the place of the true class's cosine."""
        return cosine


class AngularMargin(CosineCrossEntropy):
    """cos(theta + m) for the true class (ArcFace, Deng et al. 2019, eq. 3).

    Beyond theta = pi - m, where that would rise again, -2 - cos(theta + m): continuous and falling, as SphereFace's psi
    (Liu et al. 2017, section 3.2).
    """

    def apply_margin(self, cosine: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp(min=_TINY).sqrt()
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), turned, -2 - turned)


class CosineMargin(CosineCrossEntropy):
    """cos(theta) - m for the true class (CosFace, Wang et al. 2018, eq. 4)."""

    def apply_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class TripletCriterion(Criterion):
    """max(0, |a - p|^2 - |a - n|^2 + margin), the mean over all pairs (a, p) of a class in the batch.

    n is semi-hard: of the other classes' pictures the nearest that is further than p; where none is, the furthest of
    all (Schroff et al. 2015, section 3.2). Of a batch in micro-batches or over ranks, each part has its own triplets.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = targets["labels"]
        distance_BB = 2 - 2 * outputs @ outputs.T
        same = labels[:, None] == labels
        negatives = (~same).sum(1, keepdim=True)
        far, places = distance_BB.detach().masked_fill(same, math.inf).sort(1)
        # How many negatives are no further than each of the row's pictures: the next one is the semi-hard one.
        nearer = torch.searchsorted(far, distance_BB.detach(), right=True)
        chosen = places.gather(1, torch.minimum(nearer, negatives - 1).clamp(min=0))
        loss = (distance_BB - distance_BB.gather(1, chosen) + self.margin).clamp(min=0)
        pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) & (negatives > 0)
        return {"triplet": (loss * pairs).sum() / pairs.sum().clamp(min=1)}


class ArcFace(EmbeddingLossSpec):
    """An angle added to the true class's (Deng et al. 2019)."""

    kind = "arcface"
    main = "margin"
    margin: float = Field(0.5, ge=0, lt=math.pi / 2)
    """In radians."""
    scale: float = Field(30.0, gt=0)
    """What cosines are multiplied by before the softmax."""
    warmup: Warmup = 0.2
    """The part of the training over which the margin grows from 0."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return AngularMargin(dimension, place_K, self.scale, self.margin, self.warmup)


class CosFace(EmbeddingLossSpec):
    """A number taken from the true class's cosine (Wang et al. 2018)."""

    kind = "cosface"
    main = "margin"
    margin: float = Field(0.35, ge=0, lt=2)
    scale: float = Field(30.0, gt=0)
    """What cosines are multiplied by before the softmax."""
    warmup: Warmup = 0.2
    """The part of the training over which the margin grows from 0."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return CosineMargin(dimension, place_K, self.scale, self.margin, self.warmup)


class NormFace(EmbeddingLossSpec):
    """Directions without a margin (NormFace, Wang et al. 2017)."""

    kind = "softmax"
    main = "scale"
    scale: float = Field(30.0, gt=0)
    """What cosines are multiplied by before the softmax."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return CosineCrossEntropy(dimension, place_K, self.scale)


class Triplet(EmbeddingLossSpec):
    """Two pictures of a class nearer than one of another, semi-hard ones (Schroff et al. 2015)."""

    kind = "triplet"
    main = "margin"
    needs_class_batches = True
    margin: float = Field(0.2, gt=0, le=4)
    """Between squared distances, which are 2 - 2 cos."""

    def build(self, dimension: int, place_K: Tensor) -> Criterion:
        return TripletCriterion(self.margin)


EmbeddingLoss = ArcFace | CosFace | NormFace | Triplet
