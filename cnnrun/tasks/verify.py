"""Who is who, of people or things that were never seen in training: embeddings and what their likeness is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cnnrun import identification, verification
from cnnrun.contracts import Facts, Shape, need_vector
from cnnrun.errors import DataError
from cnnrun.margins import ArcFace, Loss
from cnnrun.spec import Kinds
from cnnrun.taskspec import Better, Criterion, Measured, Results, TaskSpec, View
from cnnrun.verification import Curve, Pairs, Ranked, all_pairs

Far = Annotated[float, Field(gt=0, lt=1)]
IMPOSTORS = "pairs of two people"


class Embedding(nn.Module):
    """Features [B, F] -> embeddings [B, D] of unit length: linear, batch norm, division by the length.

    In float32 whatever the network computes in: similarities near 1 are what counts.
    """

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.in_features, self.dimension = in_features, dimension
        self.linear = nn.Linear(in_features, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.linear(x)).float())


class Embedded(nn.Module):
    """What the head gives, by its name."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"embedding": outputs}


class VerifyMeter:
    """Verification over pairs, identification against a gallery; and the thresholds for the FARs wanted."""

    def __init__(self, task: Verify, chosen: dict[str, float]) -> None:
        self._task, self._chosen = task, chosen
        self._parts: list[dict[str, Tensor]] = []

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._parts.append(
            {"embedding": results["embedding"].float().cpu(), **{k: v.cpu() for k, v in targets.items()}}
        )

    def compute(self) -> Measured:
        every = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        embeddings, labels = every["embedding"].float().numpy(), every["labels"].numpy()
        measured = self._verified(pairs_of(every), embeddings, labels)
        gallery = identification.first_ones(labels, self._task.gallery)
        ranks = identification.ranks(embeddings, labels, gallery)
        people = len(np.unique(labels[gallery.enrolled_G]))
        tables = {
            "identification": identification.cumulative(ranks, people),
            "open_set": identification.open_set(embeddings, labels, gallery),
        }
        numbers = {f"rank_{k}": float((ranks <= k).mean()) for k in (1, 5)}
        full = {name: rows for name, rows in (measured.tables | tables).items() if rows}
        return Measured(measured.numbers | numbers, full, chosen=measured.chosen)

    def _verified(self, pairs: Pairs, embeddings: NDArray[np.float32], labels: NDArray[np.int64]) -> Measured:
        fars = self._task.fars
        scores = pairs.similarities(embeddings)
        ranked = Ranked(scores, pairs.same_M)
        curve = ranked.curve()
        folds = verification.accuracies(ranked, scores, pairs)
        if len(folds) < 2:
            raise DataError("fewer than two folds have pairs of one person and of two that can be read")
        tars = {far: float(curve.tar[curve.at(far)]) for far in fars}
        numbers = {
            "eer": curve.eer(),
            "auc": curve.auc(),
            "accuracy": float(np.mean([row["accuracy"] for row in folds])),
        }
        numbers |= {f"tar_{far:g}": tar for far, tar in tars.items()}

        def of(each: Curve) -> list[float]:
            return [each.eer(), each.auc(), *(float(each.tar[each.at(far)]) for far in fars)]

        spans = verification.intervals(scores, pairs, labels, of)
        thresholds = {far: curve.between(curve.at(far)) for far in fars}
        tables = {
            "verification": _headlines(numbers, spans, pairs),
            "operating_points": self._points(curve, thresholds, spans[2:], pairs),
            "folds": folds,
            "at_the_models_thresholds": self._held_to(scores, pairs),
        }
        chosen = {f"threshold at FAR {far:g}": threshold for far, threshold in thresholds.items()}
        return Measured(numbers, tables, chosen=chosen | {IMPOSTORS: float(pairs.total[1])})

    def _points(
        self, curve: Curve, thresholds: dict[float, float], spans: list[tuple[float, float]], pairs: Pairs
    ) -> list[dict[str, Any]]:
        return [
            {
                "FAR": f"{far:g}",
                "TAR": float(curve.tar[curve.at(far)]),
                "from": low,
                "to": high,
                "threshold here": thresholds[far],
                "note": verification.note(int((~pairs.same_M).sum()), far),
            }
            for far, (low, high) in zip(self._task.fars, spans, strict=True)
        ]

    def _held_to(self, scores: NDArray[np.float64], pairs: Pairs) -> list[dict[str, Any]]:
        """What the thresholds that val chose do here; nothing while they are being chosen."""
        rows = []
        for far in self._task.fars if self._chosen else ():
            threshold = self._chosen[f"threshold at FAR {far:g}"]
            taken = scores >= threshold
            rows.append(
                {
                    "FAR wanted": f"{far:g}",
                    "threshold": threshold,
                    "FAR": float(taken[~pairs.same_M].mean()),
                    "TAR": float(taken[pairs.same_M].mean()),
                    "note": verification.note(int(self._chosen[IMPOSTORS]), far),
                }
            )
        return rows


def _headlines(numbers: dict[str, float], spans: list[tuple[float, float]], pairs: Pairs) -> list[dict[str, Any]]:
    """EER and AUC with the middle 95 % of a bootstrap over people, and on how many pairs."""
    genuine = int(pairs.same_M.sum())
    counts = {"pairs of one person": f"{genuine:,}", IMPOSTORS: f"{len(pairs.same_M) - genuine:,}"}
    counts |= {"of": f"{pairs.total[0]:,} and {pairs.total[1]:,}"}
    return [
        {"number": name, "value": numbers[name], "from": low, "to": high, **counts}
        for name, (low, high) in zip(("eer", "auc"), spans, strict=False)
    ]


def pairs_of(every: dict[str, Tensor]) -> Pairs:
    """The pairs that a file lists, where one does; otherwise all."""
    labels = every["labels"].numpy()
    if "pairs" not in every:
        return all_pairs(labels)
    place = {number: row for row, number in enumerate(every["number"].tolist())}
    row, column = (every["pairs"][:, :, 0] >= 0).nonzero(as_tuple=True)
    other, fold = every["pairs"][row, column].unbind(1)
    second = np.array([place.get(number, -1) for number in other.tolist()], np.int64)
    kept = second >= 0  # a picture that could not be read was left out, aloud
    first, second = row.numpy()[kept], second[kept]
    same = labels[first] == labels[second]
    return Pairs(first, second, same, fold.numpy()[kept], (int(same.sum()), int((~same).sum())))


class Verify(TaskSpec):
    """Embeddings of unit length, alike for pictures of one person or thing: measured on ones never seen in training."""

    kind = "verify"
    main = "dimension"
    open_set = True

    dimension: int = Field(128, ge=2, le=65_536)
    """Numbers of an embedding."""
    loss: Annotated[Loss, Kinds()] = ArcFace()
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

    def numbers(self) -> dict[str, Better]:
        rising = ("auc", "accuracy", *(f"tar_{far:g}" for far in self.fars), "rank_1", "rank_5")
        ways: dict[str, Better] = {"eer": "min"}
        return ways | dict.fromkeys(rising, "max")

    def problem(self, facts: Facts) -> str | None:
        if facts.class_counts and sum(count > 0 for count in facts.class_counts) < 2:
            return "verify needs two or more people to learn from; train has one"
        return None

    def unmeasurable(self, targets: dict[str, Tensor]) -> str | None:
        counts = targets["labels"].unique(return_counts=True)[1]
        if len(counts) < 2 or len(targets["labels"]) < 4:
            return "pictures of two people or more are compared, four at least"
        if int((counts * (counts - 1) // 2).sum()) < 2 or int((counts > self.gallery).sum()) < 1:
            return f"two pairs of one person are needed, and someone with more than {self.gallery} picture(s)"
        return None

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        return Embedding(need_vector("its embedding", in_shape), self.dimension)

    def criterion(self, facts: Facts) -> Criterion:
        counts = torch.tensor(facts.class_counts or [1] * len(facts.classes))
        return self.loss.build(self.dimension, torch.where(counts > 0, (counts > 0).cumsum(0) - 1, -1))

    def words(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        return [facts.classes[label] for label in targets["labels"].tolist()]

    def decoder(self, facts: Facts) -> nn.Module:
        return Embedded()

    def meter(self, facts: Facts) -> VerifyMeter:
        return VerifyMeter(self, facts.chosen)

    def signature(self, facts: Facts) -> dict[str, Shape]:
        return {"embedding": (self.dimension,)}

    def meaning(self, facts: Facts) -> dict[str, Any]:
        points = threshold_of(self, facts)
        said = {"threshold": points.threshold, "far": self.far} if points else {}
        return {
            "embedding": "of unit length: the product of two is their cosine, at least threshold for one person",
            **said,
            **{name: value for name, value in facts.chosen.items() if said},
        }

    def agree(self, ours: Results, theirs: Results) -> str | None:
        apart = float((1 - (ours["embedding"] * theirs["embedding"]).sum(1)).max())
        if not apart <= 1e-5:
            return f"an embedding's cosine with the network's is {1 - apart:.6f} (at least 0.99999)"
        gap = self.gap(ours, theirs)
        return None if gap <= 1e-4 else f"similarities differ by up to {gap:.2e} (allowed 1e-4)"

    def gap(self, ours: Results, theirs: Results) -> float:
        mine, others = (each["embedding"] @ each["embedding"].T for each in (ours, theirs))
        return float((mine - others).abs().max())

    def rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in results["embedding"].tolist()]


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, the FAR it was chosen for on val (None: not chosen there), and what is to be known of it."""

    threshold: float
    far: float | None
    note: str


def threshold_of(task: Verify, facts: Facts, far: float | None = None) -> OperatingPoint | None:
    """The threshold that val chose for a FAR (by default the task's); None where it chose none."""
    far = task.far if far is None else far
    threshold = facts.chosen.get(f"threshold at FAR {far:g}")
    if threshold is None:
        return None
    return OperatingPoint(threshold, far, verification.note(int(facts.chosen[IMPOSTORS]), far))
