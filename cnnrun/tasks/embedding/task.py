"""Verification and identification of people or things that were not seen in training, by embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError
from cnnrun.base.similarity import SIMILARITIES, SimilarityKind
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.results import ClassScores, Results, View
from cnnrun.contracts.task import Requirements, Task, TaskSpec
from cnnrun.contracts.task_parts import (
    Criterion,
    Direction,
    Learning,
    Matching,
    Measuring,
    Predicting,
    Showing,
    Targets,
)
from cnnrun.tasks.embedding import pair_metrics
from cnnrun.tasks.embedding.losses import ArcFace, EmbeddingLoss, Triplet
from cnnrun.tasks.embedding.meter import VerifyMeter

Far = Annotated[float, Field(gt=0, lt=1)]


class EmbeddingHead(nn.Module):
    """Features [B, F] -> embeddings [B, D] of unit length: linear, batch norm, L2 normalization in float32."""

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.in_features, self.dimension = in_features, dimension
        self.linear = nn.Linear(in_features, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.linear(x)).float())


class EuclideanHead(nn.Module):
    """Features [B, F] -> embeddings [B, D] of any length, in float32: linear, without an offset."""

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.in_features, self.dimension = in_features, dimension
        self.linear = nn.Linear(in_features, dimension, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out.float()


class EmbeddingDecoder(nn.Module):
    """Raw outputs, which are embeddings already -> `embedding` [B, D]."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"embedding": outputs}


class MeanEmbeddingDecoder(nn.Module):
    """Raw outputs, which are means of two unit embeddings -> `embedding` [B, D] of unit length."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"embedding": F.normalize(outputs)}


@dataclass(frozen=True)
class EmbeddingPrediction(Prediction):
    """The embedding of an image."""

    embedding: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        return {"embedding": self.embedding}

    def to_text(self) -> str:
        return f"an embedding of {len(self.embedding)} numbers (--json and --csv give them)"

    def csv_columns(self) -> list[str]:
        return [f"e{index}" for index in range(len(self.embedding))]

    def csv_rows(self) -> list[list[Any]]:
        return [list(self.embedding)]


Point = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]


class FaceLandmarks(Spec):
    """Positions [x, y] of a face's landmarks in the network's input, in pixels. Left is the left of the image."""

    left_eye: Point
    right_eye: Point
    nose: Point | None = None
    left_mouth: Point | None = None
    """The corner of the mouth on the left."""
    right_mouth: Point | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        pairs = [("left_eye", self.left_eye, "right_eye", self.right_eye)]
        if self.left_mouth and self.right_mouth:
            pairs.append(("left_mouth", self.left_mouth, "right_mouth", self.right_mouth))
        for left_name, left, right_name, right in pairs:
            if right[0] - left[0] < 1:
                raise ValueError(f"{left_name} must lie to the left of {right_name} in the image, by a pixel or more")
        return self


class Verify(TaskSpec):
    """Embeddings, similar for images of one person or thing; measured on people not seen in training."""

    kind = "verify"
    main = "dimension"

    dimension: int = Field(128, ge=2, le=65_536)
    """Number of values of an embedding."""
    loss: Annotated[EmbeddingLoss, Kinds()] = ArcFace()
    """The loss that the embedding is trained by."""
    similarity: SimilarityKind = "cosine"
    """`cosine`: embeddings have unit length. `euclidean`: they have any length, thresholds are distances; needs \
`loss: triplet`."""
    mirror: bool = False
    """Average the embeddings of an image and its mirror image, outside of training; takes twice the time."""
    fars: list[Far] = Field([0.1, 0.01, 0.001, 0.0001], min_length=1)
    """False accept rates (shares of the pairs of two people that are accepted), largest first: each is measured, and \
a threshold is chosen for it on val."""
    far: Far = 0.01
    """The one of `fars` whose threshold `cnnrun verify` and `identify` use."""
    threshold: float | None = None
    """Threshold that was published with the weights; used if none was chosen on val."""
    gallery: int = Field(1, ge=1)
    """How many images of each person, the first ones, are enrolled to measure identification."""
    landmarks: FaceLandmarks | None = None
    """For networks of aligned faces: where the landmarks are. `verify`, `enroll` and `identify` then find and align \
the faces of photos."""

    @field_validator("fars")
    @classmethod
    def _check_falling(cls, fars: list[float]) -> list[float]:
        if sorted(set(fars), reverse=True) != fars:
            raise ValueError("give each once, the largest first")
        return fars

    @model_validator(mode="after")
    def _check_far(self) -> Self:
        if self.far not in self.fars:
            raise ValueError(f"far is {self.far:g}; give one of fars ({', '.join(f'{far:g}' for far in self.fars)})")
        return self

    @model_validator(mode="after")
    def _check_comparison(self) -> Self:
        if self.similarity == "euclidean" and not isinstance(self.loss, Triplet):
            raise ValueError(
                f"similarity: euclidean needs loss: triplet; {self.loss.kind} ignores an embedding's length"
            )
        measure = SIMILARITIES[self.similarity]
        if self.threshold is not None and measure.from_display(self.threshold) > measure.largest:
            raise ValueError(f"threshold: no {measure.name} is a match at {self.threshold:g}")
        return self

    def requirements(self) -> Requirements:
        return Requirements(
            needs_class_batches=self.loss.needs_class_batches,
            has_unseen_classes=True,
            averages_mirror=self.mirror,
        )

    def metrics(self) -> dict[str, Direction]:
        names = ("auc", "accuracy", *(f"tar_{far:g}" for far in self.fars), "rank_1", "rank_5")
        directions: dict[str, Direction] = {"eer": "min"}
        return directions | dict.fromkeys(names, "max")

    def check_data(self, facts: DataFacts) -> None:
        if facts.class_counts and sum(count > 0 for count in facts.class_counts) < 2:
            raise DataError("task: verify needs two or more people to learn from; train has one")

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self,
            facts,
            VerifyLearning(self, facts),
            VerifyMeasuring(self),
            VerifyPredicting(self),
            VerifyShowing(self, facts),
            matching=VerifyMatching(self),
        )

    def find_operating_point(self, choices: Choices, far: float | None = None) -> OperatingPoint | None:
        """Find the threshold that was chosen on val for a FAR, by default `far`; None if none was chosen."""
        far = self.far if far is None else far
        return next((point for point in choices.operating_points if point.is_for(far)), None)


@dataclass(frozen=True)
class VerifyLearning(Learning):
    """An embedding, and a loss with margins between people."""

    spec: Verify
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        (in_shape,) = in_shapes
        head = EmbeddingHead if self.spec.similarity == "cosine" else EuclideanHead
        return head(require_vector("its embedding", in_shape), self.spec.dimension)

    def build_criterion(self) -> Criterion:
        counts = torch.tensor(self.facts.class_counts or [1] * len(self.facts.classes))
        return self.spec.loss.build(self.spec.dimension, torch.where(counts > 0, (counts > 0).cumsum(0) - 1, -1))


@dataclass(frozen=True)
class VerifyMeasuring(Measuring):
    """Verification of pairs, and identification against a gallery, of people that training never saw."""

    spec: Verify

    def build_meter(self, choices: Choices) -> VerifyMeter:
        similarity = SIMILARITIES[self.spec.similarity]
        return VerifyMeter(self.spec.fars, self.spec.gallery, choices.operating_points, similarity)

    def split_problem(self, targets: Targets) -> str | None:
        counts, gallery = targets["labels"].unique(return_counts=True)[1], self.spec.gallery
        if len(counts) < 2 or len(targets["labels"]) < 4:
            return "verify needs images of two or more people, and four images or more"
        if int((counts * (counts - 1) // 2).sum()) < 2 or int((counts > gallery).sum()) < 1:
            images = format_count(gallery, "image")
            return f"verify needs two pairs of one person, and a person with more than {images}"
        return None

    def comparison_key(self) -> list[Any]:
        return []  # the people of the training split do not matter: others are measured


@dataclass(frozen=True)
class VerifyPredicting(Predicting):
    """Embeddings."""

    spec: Verify

    def build_decoder(self, choices: Choices) -> nn.Module:
        needs_normalization = self.spec.mirror and self.spec.similarity == "cosine"
        return MeanEmbeddingDecoder() if needs_normalization else EmbeddingDecoder()

    def result_shapes(self) -> dict[str, Shape]:
        return {"embedding": (self.spec.dimension,)}

    def metadata(self, choices: Choices) -> dict[str, Any]:
        point, similarity = self.spec.find_operating_point(choices), SIMILARITIES[self.spec.similarity]
        text, condition = {
            "cosine": ("of unit length: the product of two is their cosine", "at least"),
            "euclidean": ("compared by Euclidean distance", "at most"),
        }[self.spec.similarity]
        landmarks = self.spec.landmarks
        faces = {"landmarks": landmarks.model_dump(exclude_none=True)} if landmarks else {}
        if point is None and self.spec.threshold is None:
            return {"embedding": f"{text}; no threshold was chosen for this checkpoint", **faces}
        text = f"{text}, {condition} threshold for one person"
        if point is None:
            return {"embedding": text, "threshold": self.spec.threshold, **faces}
        points = (
            replace(point, threshold=similarity.to_display(point.threshold)) for point in choices.operating_points
        )
        shown = replace(choices, operating_points=tuple(points)).by_description()
        threshold = similarity.to_display(point.threshold)
        return {"embedding": text, "threshold": threshold, "far": point.far, **shown, **faces}

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[EmbeddingPrediction]:
        return [EmbeddingPrediction(row) for row in results["embedding"].tolist()]

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        cosines = F.cosine_similarity(expected["embedding"].double(), actual["embedding"].double())
        if not cosines.min() >= 1 - 1e-5:
            return f"an embedding's cosine with the network's is {float(cosines.min()):.6f} (at least 0.99999)"
        gap = self.largest_difference(expected, actual)
        return None if gap <= 1e-4 else f"similarities differ by up to {gap:.2e} (allowed 1e-4)"

    def largest_difference(self, expected: Results, actual: Results) -> float:
        """The largest difference of the similarity of two images."""
        similarity = SIMILARITIES[self.spec.similarity]
        embeddings = (results["embedding"].double().cpu().numpy() for results in (expected, actual))
        expected_BB, actual_BB = (similarity.compare_all(values, values) for values in embeddings)
        return float(np.abs(expected_BB - actual_BB).max())


@dataclass(frozen=True)
class VerifyShowing(Showing):
    """Names of people, and the embedding to explain."""

    spec: Verify
    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        return [self.facts.classes[label] for label in targets["labels"].tolist()]

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        first = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        has_unit_length = self.spec.similarity == "cosine" and not self.spec.mirror
        directions = outputs if has_unit_length else F.normalize(outputs)
        return ClassScores((), directions, directions, "cosine", first)


class VerifyMatching(Matching):
    """Comparison of embeddings."""

    def __init__(self, spec: Verify) -> None:
        self._spec, self.dimension, self.fars = spec, spec.dimension, spec.fars
        self.similarity = SIMILARITIES[spec.similarity]
        self.published_threshold = None if spec.threshold is None else self.similarity.from_display(spec.threshold)
        self.landmarks = spec.landmarks.model_dump(exclude_none=True) if spec.landmarks else {}

    def embeddings(self, results: Results) -> Tensor:
        return results["embedding"]

    def find_operating_point(self, choices: Choices, far: float | None = None) -> OperatingPoint | None:
        return self._spec.find_operating_point(choices, far)

    def operating_point_note(self, point: OperatingPoint) -> str:
        return pair_metrics.far_note(point.impostor_pairs, point.far)
