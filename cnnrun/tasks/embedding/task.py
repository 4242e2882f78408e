"""Verification and identification of people or things that were not seen in training, by embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, NonFiniteError
from cnnrun.config.spec import Kinds
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.task import Criterion, Direction, TaskSpec
from cnnrun.tasks.embedding import gallery_metrics, pair_metrics
from cnnrun.tasks.embedding.losses import ArcFace, EmbeddingLoss
from cnnrun.tasks.embedding.pair_metrics import Pairs, RankedPairs, RocCurve, all_pairs
from cnnrun.tasks.intervals import bootstrap_interval, metric_bounds

Far = Annotated[float, Field(gt=0, lt=1)]
IMPOSTORS = "pairs of two people"


class EmbeddingHead(nn.Module):
    """Features [B, F] -> embeddings [B, D] of unit length: linear, batch norm, L2 normalization in float32."""

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.in_features, self.dimension = in_features, dimension
        self.linear = nn.Linear(in_features, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.linear(x)).float())


class EmbeddingDecoder(nn.Module):
    """Raw outputs, which are embeddings already -> `embedding` [B, D]."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"embedding": outputs}


class VerifyMeter:
    """Meter of verification over pairs and identification against a gallery; chooses a threshold for each FAR.

    Raises NonFiniteError if an embedding is not finite, and DataError if the pairs that can be read are too few.
    """

    def __init__(self, task: Verify, chosen: dict[str, float]) -> None:
        self._task, self._chosen, self._batches = task, chosen, BatchTensors()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._batches.add(embedding=results["embedding"].float(), **targets)

    def compute(self, tables: bool = True) -> Measurement:
        arrays = self._batches.concatenate()
        embeddings, labels = arrays["embedding"], arrays["labels"]
        if not np.isfinite(embeddings).all():
            raise NonFiniteError("an embedding is not finite; there is no similarity to measure")
        pairs = listed_or_all_pairs(arrays)
        if pairs.same_M.all() or not pairs.same_M.any():
            raise DataError(
                "verify needs pairs of one person and of two people; the readable images have pairs of one kind only"
            )
        scores = pairs.similarities(embeddings)
        ranked = RankedPairs(scores, pairs.same_M)
        folds = pair_metrics.fold_accuracies(ranked, scores, pairs)
        if len(folds) < 2:
            raise DataError("fewer than two folds have readable pairs of both kinds: of one person, and of two people")
        gallery = gallery_metrics.enrol_first(labels, self._task.gallery)
        ranks = gallery_metrics.identification_ranks(embeddings, labels, gallery)
        curve = ranked.roc_curve()
        metrics = {
            **self._curve_metrics(curve),
            "accuracy": float(np.mean([fold["accuracy"] for fold in folds])),
            **{f"rank_{k}": float((ranks <= k).mean()) for k in (1, 5)},
        }
        thresholds = {
            f"threshold at FAR {far:g}": curve.midpoint_threshold(curve.index_at(far)) for far in self._task.fars
        }
        measurement = Measurement(metrics, choices=thresholds | {IMPOSTORS: float((~pairs.same_M).sum())})
        if not tables:
            return measurement
        draws = pair_metrics.bootstrap_over_people(scores, pairs, labels, self._curve_metrics)
        rows = {
            **self._interval_rows(measurement, pairs, draws),
            "folds": folds,
            "at_the_models_thresholds": self._chosen_threshold_rows(scores, pairs),
            "identification": gallery_metrics.cumulative_match_rows(ranks, len(np.unique(labels[gallery.enrolled_G]))),
            "open_set": gallery_metrics.open_set_rows(embeddings, labels, gallery),
        }
        nonempty = {name: table for name, table in rows.items() if table}
        return replace(measurement, tables=nonempty, bootstrap_draws=draws, plots=(_roc_plot(curve),))

    def _curve_metrics(self, curve: RocCurve) -> dict[str, float]:
        tars = {f"tar_{far:g}": float(curve.tar[curve.index_at(far)]) for far in self._task.fars}
        return {"eer": curve.eer(), "auc": curve.auc(), **tars}

    def _interval_rows(
        self, measurement: Measurement, pairs: Pairs, draws: dict[str, NDArray[np.float64]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Tables of EER, AUC and the TAR at each FAR, with 95 % intervals over people and the number of pairs."""
        metrics = {name: value for name, value in measurement.metrics.items() if value is not None}
        impostors = int(measurement.choices[IMPOSTORS])
        counts = {"pairs of one person": f"{len(pairs.same_M) - impostors:,}", IMPOSTORS: f"{impostors:,}"}
        counts |= {"of": f"{pairs.total[0]:,} and {pairs.total[1]:,}"}
        if not draws:
            counts["note"] = f"no intervals: people are fewer than {pair_metrics.MIN_PEOPLE}"
        ends = {}
        for name, values in draws.items():
            low, high = bootstrap_interval(metrics[name], values, metric_bounds(name, metrics[name]))
            ends[name] = {"from": low, "to": high}
        headlines = [
            {"number": name, "value": metrics[name], **ends.get(name, {}), **counts} for name in ("eer", "auc")
        ]
        points = [
            {
                "FAR": f"{far:g}",
                "TAR": metrics[f"tar_{far:g}"],
                **ends.get(f"tar_{far:g}", {}),
                "threshold here": measurement.choices[f"threshold at FAR {far:g}"],
                "note": pair_metrics.far_note(impostors, far),
            }
            for far in self._task.fars
        ]
        return {"verification": headlines, "operating_points": points}

    def _chosen_threshold_rows(self, scores: NDArray[np.float64], pairs: Pairs) -> list[dict[str, Any]]:
        """FAR and TAR here at the thresholds that were chosen on val; empty before they are chosen."""
        rows = []
        for far in self._task.fars:
            threshold = self._chosen.get(f"threshold at FAR {far:g}")
            if threshold is None:
                continue
            is_accepted = scores >= threshold
            rows.append(
                {
                    "FAR wanted": f"{far:g}",
                    "threshold": threshold,
                    "FAR": float(is_accepted[~pairs.same_M].mean()),
                    "TAR": float(is_accepted[pairs.same_M].mean()),
                    "note": pair_metrics.far_note(int(self._chosen[IMPOSTORS]), far),
                }
            )
        return rows


def _roc_plot(curve: RocCurve) -> Plot:
    """Plot of TAR over FAR with at most 1000 points."""
    points = np.unique(np.linspace(0, len(curve.far) - 1, 1000).astype(int))
    return Plot("Verification", "FAR", "TAR", (Series("ROC", curve.far[points].tolist(), curve.tar[points].tolist()),))


def listed_or_all_pairs(arrays: dict[str, NDArray[np.int64]]) -> Pairs:
    """The pairs that the data lists, without those of images that could not be read; all pairs if it lists none."""
    labels = arrays["labels"]
    if "pairs" not in arrays:
        return all_pairs(labels)
    index_of_number = {number: index for index, number in enumerate(arrays["number"].tolist())}
    first, column = (arrays["pairs"][:, :, 0] >= 0).nonzero()
    second_number, fold = arrays["pairs"][first, column].T
    second = np.array([index_of_number.get(number, -1) for number in second_number.tolist()], np.int64)
    is_readable = second >= 0
    first, second, fold = first[is_readable], second[is_readable], fold[is_readable]
    same = labels[first] == labels[second]
    return Pairs(first, second, same, fold, (int(same.sum()), int((~same).sum())))


class Verify(TaskSpec):
    """Embeddings of unit length, similar for images of one person or thing; measured on people not seen in training."""

    kind = "verify"
    main = "dimension"
    is_open_set = True

    def needs_class_batches(self) -> bool:
        return self.loss.needs_class_batches

    dimension: int = Field(128, ge=2, le=65_536)
    """Number of values of an embedding."""
    loss: Annotated[EmbeddingLoss, Kinds()] = ArcFace()
    """The loss that the embedding is trained by."""
    fars: list[Far] = Field([0.1, 0.01, 0.001, 0.0001], min_length=1)
    """False accept rates (shares of the pairs of two people that are accepted), largest first: each is measured, and \
a threshold is chosen for it on val."""
    far: Far = 0.01
    """The one of `fars` whose threshold `cnnrun verify` and `identify` use."""
    gallery: int = Field(1, ge=1)
    """How many images of each person, the first ones, are enrolled to measure identification."""

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

    def metrics(self) -> dict[str, Direction]:
        rising = ("auc", "accuracy", *(f"tar_{far:g}" for far in self.fars), "rank_1", "rank_5")
        directions: dict[str, Direction] = {"eer": "min"}
        return directions | dict.fromkeys(rising, "max")

    def data_problem(self, facts: Facts) -> str | None:
        if facts.class_counts and sum(count > 0 for count in facts.class_counts) < 2:
            return "verify needs two or more people to learn from; train has one"
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        counts = targets["labels"].unique(return_counts=True)[1]
        if len(counts) < 2 or len(targets["labels"]) < 4:
            return "verify needs images of two or more people, and four images or more"
        if int((counts * (counts - 1) // 2).sum()) < 2 or int((counts > self.gallery).sum()) < 1:
            images = format_count(self.gallery, "image")
            return f"verify needs two pairs of one person, and a person with more than {images}"
        return None

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return EmbeddingHead(require_vector("its embedding", in_shape), self.dimension)

    def comparison_key(self, facts: Facts) -> list[Any]:
        return []  # the people of the training split do not matter: others are measured

    def criterion(self, facts: Facts) -> Criterion:
        counts = torch.tensor(facts.class_counts or [1] * len(facts.classes))
        return self.loss.build(self.dimension, torch.where(counts > 0, (counts > 0).cumsum(0) - 1, -1))

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        return [facts.classes[label] for label in targets["labels"].tolist()]

    def decoder(self, facts: Facts) -> nn.Module:
        return EmbeddingDecoder()

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        first = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        return ClassScores((), outputs, outputs, "cosine", first)

    def meter(self, facts: Facts) -> VerifyMeter:
        return VerifyMeter(self, facts.chosen)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        return {"embedding": (self.dimension,)}

    def metadata(self, facts: Facts) -> dict[str, Any]:
        point = find_operating_point(self, facts)
        threshold = {"threshold": point.threshold, "far": self.far} if point else {}
        return {
            "embedding": "of unit length: the product of two is their cosine"
            + (", at least threshold for one person" if point else "; no threshold was chosen for this checkpoint"),
            **threshold,
            **(facts.chosen if point else {}),
        }

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        distance = float((1 - (expected["embedding"] * actual["embedding"]).sum(1)).max())
        if not distance <= 1e-5:
            return f"an embedding's cosine with the network's is {1 - distance:.6f} (at least 0.99999)"
        gap = self.largest_difference(expected, actual, facts)
        return None if gap <= 1e-4 else f"similarities differ by up to {gap:.2e} (allowed 1e-4)"

    def largest_difference(self, expected: Results, actual: Results, facts: Facts) -> float:
        """The largest difference of the similarity of two images."""
        expected_BB, actual_BB = (results["embedding"] @ results["embedding"].T for results in (expected, actual))
        return float((expected_BB - actual_BB).abs().max())

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in results["embedding"].tolist()]


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, the FAR it was chosen for on val (None if the user set it), and a note: a warning or empty."""

    threshold: float
    far: float | None
    note: str


def find_operating_point(task: Verify, facts: Facts, far: float | None = None) -> OperatingPoint | None:
    """Find the threshold that was chosen on val for a FAR, by default the task's; None if none was chosen."""
    far = task.far if far is None else far
    threshold = facts.chosen.get(f"threshold at FAR {far:g}")
    if threshold is None:
        return None
    return OperatingPoint(threshold, far, pair_metrics.far_note(int(facts.chosen[IMPOSTORS]), far))
