"""Who is who, of people or things that were never seen in training: embeddings and what their likeness is worth."""

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
    """Features [B, F] -> embeddings [B, D] of unit length: linear, batch norm, division by the length in float32."""

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.in_features, self.dimension = in_features, dimension
        self.linear = nn.Linear(in_features, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.linear(x)).float())


class EmbeddingDecoder(nn.Module):
    """What the head gives, by its name."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"embedding": outputs}


class VerifyMeter:
    """Verification over pairs, identification against a gallery; and the thresholds for the FARs wanted."""

    def __init__(self, task: Verify, chosen: dict[str, float]) -> None:
        self._task, self._chosen, self._kept = task, chosen, BatchTensors()

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._kept.add(embedding=results["embedding"].float(), **targets)

    def compute(self, tables: bool = True) -> Measurement:
        every = self._kept.concatenate()
        embeddings, labels = every["embedding"], every["labels"]
        if not np.isfinite(embeddings).all():
            raise NonFiniteError("an embedding is not finite; there is no similarity to measure")
        pairs = listed_or_all_pairs(every)
        if pairs.same_M.all() or not pairs.same_M.any():
            raise DataError("no pairs of both kinds are left of those listed: their pictures could not be read")
        scores = pairs.similarities(embeddings)
        ranked = RankedPairs(scores, pairs.same_M)
        folds = pair_metrics.fold_accuracies(ranked, scores, pairs)
        if len(folds) < 2:
            raise DataError("fewer than two folds have pairs of one person and of two that can be read")
        gallery = gallery_metrics.enrol_first(labels, self._task.gallery)
        ranks = gallery_metrics.identification_ranks(embeddings, labels, gallery)
        numbers = {
            **self._of_curve(curve := ranked.roc_curve()),
            "accuracy": float(np.mean([r["accuracy"] for r in folds])),
        }
        numbers |= {f"rank_{k}": float((ranks <= k).mean()) for k in (1, 5)}
        thresholds = {
            f"threshold at FAR {far:g}": curve.midpoint_threshold(curve.index_at(far)) for far in self._task.fars
        }
        measured = Measurement(numbers, choices=thresholds | {IMPOSTORS: float((~pairs.same_M).sum())})
        if not tables:
            return measured
        spread = pair_metrics.bootstrap_over_people(scores, pairs, labels, self._of_curve)
        found = {
            **self._with_intervals(measured, pairs, spread),
            "folds": folds,
            "at_the_models_thresholds": self._held_to(scores, pairs),
            "identification": gallery_metrics.cumulative_match_rows(ranks, len(np.unique(labels[gallery.enrolled_G]))),
            "open_set": gallery_metrics.open_set_rows(embeddings, labels, gallery),
        }
        told = {name: rows for name, rows in found.items() if rows}
        return replace(measured, tables=told, bootstrap_draws=spread, plots=(_roc(curve),))

    def _of_curve(self, curve: RocCurve) -> dict[str, float]:
        tars = {f"tar_{far:g}": float(curve.tar[curve.index_at(far)]) for far in self._task.fars}
        return {"eer": curve.eer(), "auc": curve.auc(), **tars}

    def _with_intervals(
        self, measured: Measurement, pairs: Pairs, spread: dict[str, NDArray[np.float64]]
    ) -> dict[str, list[dict[str, Any]]]:
        """EER, AUC and the TAR of each FAR with the middle 95 % of a bootstrap over people, and on how many pairs."""
        numbers = {name: value for name, value in measured.metrics.items() if value is not None}
        impostors = int(measured.choices[IMPOSTORS])
        counts = {"pairs of one person": f"{len(pairs.same_M) - impostors:,}", IMPOSTORS: f"{impostors:,}"}
        counts |= {"of": f"{pairs.total[0]:,} and {pairs.total[1]:,}"}
        if not spread:
            counts["note"] = f"no intervals: people are fewer than {pair_metrics.MIN_PEOPLE}"
        spans = {
            name: bootstrap_interval(numbers[name], values, metric_bounds(name, numbers[name]))
            for name, values in spread.items()
        }
        ends = {name: {"from": low, "to": high} for name, (low, high) in spans.items()}
        headlines = [
            {"number": name, "value": numbers[name], **ends.get(name, {}), **counts} for name in ("eer", "auc")
        ]
        points = [
            {
                "FAR": f"{far:g}",
                "TAR": numbers[f"tar_{far:g}"],
                **ends.get(f"tar_{far:g}", {}),
                "threshold here": measured.choices[f"threshold at FAR {far:g}"],
                "note": pair_metrics.far_note(impostors, far),
            }
            for far in self._task.fars
        ]
        return {"verification": headlines, "operating_points": points}

    def _held_to(self, scores: NDArray[np.float64], pairs: Pairs) -> list[dict[str, Any]]:
        """What the thresholds that val chose do here; nothing while they are being chosen."""
        rows = []
        for far in self._task.fars:
            threshold = self._chosen.get(f"threshold at FAR {far:g}")
            if threshold is None:
                continue
            taken = scores >= threshold
            rows.append(
                {
                    "FAR wanted": f"{far:g}",
                    "threshold": threshold,
                    "FAR": float(taken[~pairs.same_M].mean()),
                    "TAR": float(taken[pairs.same_M].mean()),
                    "note": pair_metrics.far_note(int(self._chosen[IMPOSTORS]), far),
                }
            )
        return rows


def _roc(curve: RocCurve) -> Plot:
    """TAR over FAR, thinned where there are many thresholds."""
    shown = np.unique(np.linspace(0, len(curve.far) - 1, 1000).astype(int))
    return Plot("Verification", "FAR", "TAR", (Series("ROC", curve.far[shown].tolist(), curve.tar[shown].tolist()),))


def listed_or_all_pairs(every: dict[str, NDArray[np.int64]]) -> Pairs:
    """The pairs that a file lists, where one does; otherwise all."""
    labels = every["labels"]
    if "pairs" not in every:
        return all_pairs(labels)
    place = {number: row for row, number in enumerate(every["number"].tolist())}
    row, column = (every["pairs"][:, :, 0] >= 0).nonzero()
    other, fold = every["pairs"][row, column].T
    second = np.array([place.get(number, -1) for number in other.tolist()], np.int64)
    kept = second >= 0  # a picture that could not be read was left out, aloud
    first, second = row[kept], second[kept]
    same = labels[first] == labels[second]
    return Pairs(first, second, same, fold[kept], (int(same.sum()), int((~same).sum())))


class Verify(TaskSpec):
    """Embeddings of unit length, alike for pictures of one person or thing: measured on ones never seen in training."""

    kind = "verify"
    main = "dimension"
    is_open_set = True

    def needs_class_batches(self) -> bool:
        return self.loss.needs_class_batches

    dimension: int = Field(128, ge=2, le=65_536)
    """Numbers of an embedding."""
    loss: Annotated[EmbeddingLoss, Kinds()] = ArcFace()
    """What the embedding learns by."""
    fars: list[Far] = Field([0.1, 0.01, 0.001, 0.0001], min_length=1)
    """Parts of the pairs of two people that may be taken for one: each with its TAR, and a threshold chosen on val."""
    far: Far = 0.01
    """Which of them `cnnrun verify` and `identify` go by."""
    gallery: int = Field(1, ge=1)
    """Pictures of each person that are enrolled, the first ones, when identification is measured."""

    @field_validator("fars")
    @classmethod
    def _falling(cls, fars: list[float]) -> list[float]:
        if sorted(set(fars), reverse=True) != fars:
            raise ValueError("give each once, the largest first")
        return fars

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.far not in self.fars:
            raise ValueError(f"far is {self.far:g}; give one of fars ({', '.join(f'{far:g}' for far in self.fars)})")
        return self

    def metrics(self) -> dict[str, Direction]:
        rising = ("auc", "accuracy", *(f"tar_{far:g}" for far in self.fars), "rank_1", "rank_5")
        ways: dict[str, Direction] = {"eer": "min"}
        return ways | dict.fromkeys(rising, "max")

    def data_problem(self, facts: Facts) -> str | None:
        if facts.class_counts and sum(count > 0 for count in facts.class_counts) < 2:
            return "verify needs two or more people to learn from; train has one"
        return None

    def split_problem(self, targets: dict[str, Tensor]) -> str | None:
        counts = targets["labels"].unique(return_counts=True)[1]
        if len(counts) < 2 or len(targets["labels"]) < 4:
            return "pictures of two people or more are compared, four at least"
        if int((counts * (counts - 1) // 2).sum()) < 2 or int((counts > self.gallery).sum()) < 1:
            return f"two pairs of one person are needed, and someone with more than {self.gallery} picture(s)"
        return None

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return EmbeddingHead(require_vector("its embedding", in_shape), self.dimension)

    def comparison_key(self, facts: Facts) -> list[Any]:
        return []  # whoever was learned, others are measured

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
        points = find_operating_point(self, facts)
        said = {"threshold": points.threshold, "far": self.far} if points else {}
        return {
            "embedding": "of unit length: the product of two is their cosine"
            + (", at least threshold for one person" if said else "; no threshold was chosen for this checkpoint"),
            **said,
            **{name: value for name, value in facts.chosen.items() if said},
        }

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        apart = float((1 - (ours["embedding"] * theirs["embedding"]).sum(1)).max())
        if not apart <= 1e-5:
            return f"an embedding's cosine with the network's is {1 - apart:.6f} (at least 0.99999)"
        gap = self.largest_difference(ours, theirs, facts)
        return None if gap <= 1e-4 else f"similarities differ by up to {gap:.2e} (allowed 1e-4)"

    def largest_difference(self, ours: Results, theirs: Results, facts: Facts) -> float:
        mine, others = (each["embedding"] @ each["embedding"].T for each in (ours, theirs))
        return float((mine - others).abs().max())

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in results["embedding"].tolist()]


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, the FAR it was chosen for on val (None: not chosen there), and what is to be known of it."""

    threshold: float
    far: float | None
    note: str


def find_operating_point(task: Verify, facts: Facts, far: float | None = None) -> OperatingPoint | None:
    """The threshold that val chose for a FAR (by default the task's); None where it chose none."""
    far = task.far if far is None else far
    threshold = facts.chosen.get(f"threshold at FAR {far:g}")
    if threshold is None:
        return None
    return OperatingPoint(threshold, far, pair_metrics.far_note(int(facts.chosen[IMPOSTORS]), far))
