"""Whether two pictures show one person: what a similarity is worth, over pairs.

A pair is accepted when its similarity is at least the threshold. FAR is the part of the pairs of two people that is
accepted, TAR the part of the pairs of one. Everything is exact in the pairs given; ties are accepted together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PAIRS = 2_000_000  # of one kind that are measured; of more, so many drawn at random
FOLDS = 10
_ENOUGH = 10  # false accepts that a FAR must be expected to give, for its threshold to mean something
MIN_PEOPLE = 5  # people of whom there is an interval
_REPLICATES, _RESAMPLED = (1000, 200), 500_000  # of the bootstrap, for few and for many pairs; pairs at most

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures: numbers of both in their split, whether they show one person, and a fold each."""

    first_M: NDArray[np.int64]
    second_M: NDArray[np.int64]
    same_M: NDArray[np.bool_]
    fold_M: NDArray[np.int64]
    total: tuple[int, int]
    """How many there are of one person and of two, where these are a part of them."""

    def similarities(self, embeddings_ND: NDArray[np.float32]) -> Floats:
        """The cosine of each pair's unit embeddings."""
        found = np.empty(len(self.first_M))
        for start in range(0, len(found), 100_000):
            part = slice(start, start + 100_000)
            one, other = embeddings_ND[self.first_M[part]], embeddings_ND[self.second_M[part]]
            found[part] = np.einsum("md,md->m", one, other, dtype=np.float64)
        return found


def all_pairs(labels_N: NDArray[np.int64]) -> Pairs:
    """Every pair of a split, or MOST_PAIRS of a kind; in folds at random, as many of each kind in each."""
    draw = np.random.default_rng(0)
    counts = np.unique(labels_N, return_counts=True)[1]
    genuine, total = int((counts * (counts - 1) // 2).sum()), len(labels_N) * (len(labels_N) - 1) // 2
    if total <= 2 * MAX_PAIRS:
        one, other = np.triu_indices(len(labels_N), 1)
    else:
        order = np.argsort(labels_N, kind="stable")
        own, apart = _own_pairs(counts, genuine, draw), _other_pairs(counts, total - genuine, draw)
        one, other = order[np.concatenate([own, apart])].T
    same = labels_N[one] == labels_N[other]
    fold, folds = np.empty(len(one), np.int64), min(FOLDS, int(same.sum()), int((~same).sum()))
    for kind in (same, ~same):
        fold[kind] = draw.permutation(int(kind.sum())) % folds
    return Pairs(one, other, same, fold, (genuine, total - genuine))


def _own_pairs(counts_P: NDArray[np.int64], total: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Pairs of one person [M, 2], as places in the pictures ordered by person."""
    number = np.arange(total) if total <= MAX_PAIRS else _distinct(total, draw)
    of_person = counts_P * (counts_P - 1) // 2
    ends = np.cumsum(of_person)
    person = np.searchsorted(ends, number, side="right")
    within = number - (ends - of_person)[person]
    # Pair k of a person is (row, column) of a triangle, column < row: k = row (row - 1) / 2 + column.
    row = ((1 + np.sqrt(1 + 8 * within)) // 2).astype(np.int64)
    row -= row * (row - 1) // 2 > within  # where the root was rounded up
    first = (np.cumsum(counts_P) - counts_P)[person]
    return np.stack([first + within - row * (row - 1) // 2, first + row], 1)


def _other_pairs(counts_P: NDArray[np.int64], total: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Pairs of two people [M, 2], as places in the pictures ordered by person."""
    pictures, ends = int(counts_P.sum()), np.cumsum(counts_P)
    later = np.repeat(pictures - ends, counts_P)  # of each picture, those of the people after its own
    number = np.arange(total) if total <= MAX_PAIRS else _distinct(total, draw)
    before = np.cumsum(later)
    first = np.searchsorted(before, number, side="right")
    return np.stack([first, np.repeat(ends, counts_P)[first] + number - (before - later)[first]], 1)


def _distinct(total: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """MOST_PAIRS numbers below `total`, none twice."""
    found = np.unique(draw.integers(0, total, 2 * MAX_PAIRS))
    return np.sort(draw.permutation(found)[:MAX_PAIRS])


@dataclass(frozen=True)
class RocCurve:
    """FAR and TAR at every threshold that makes a difference, falling; the first accepts nothing."""

    threshold: Floats
    far: Floats
    tar: Floats

    def index_at(self, far: float) -> int:
        """The lowest threshold whose FAR is no more than this."""
        return int(np.searchsorted(self.far, far * (1 + 1e-12), side="right")) - 1

    def midpoint_threshold(self, place: int) -> float:
        """A threshold halfway to the next one, so that rounding does not decide; the next accepts more than wanted."""
        upper = float(self.threshold[place])
        lower = float(self.threshold[place + 1]) if place + 1 < len(self.threshold) else upper
        middle = (upper + lower) / 2
        return middle if middle > lower else upper

    def eer(self) -> float:
        """Where as many pairs of one person are refused as of two are accepted, between thresholds on a line."""
        above = self.far - (1 - self.tar)
        place = int(np.argmax(above >= 0))
        if not place:
            return float(self.far[0])
        before, after = above[place - 1], above[place]
        part = before / (before - after)
        return float(self.far[place - 1] + part * (self.far[place] - self.far[place - 1]))

    def auc(self) -> float:
        """The area under TAR over FAR."""
        return float(np.trapezoid(self.tar, self.far))


class RankedPairs:
    """Pairs in the order of their similarity, so that curves of any weights need no sorting."""

    def __init__(self, scores_M: Floats, same_M: NDArray[np.bool_]) -> None:
        self.order = np.argsort(-scores_M, kind="stable")
        scores, self.same = scores_M[self.order], same_M[self.order]
        self._last = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])
        # Nothing is accepted halfway from the highest similarity to the highest that there can be.
        above = max(np.nextafter(scores[0], np.inf), (scores[0] + 1) / 2)
        self._threshold = np.r_[above, scores[self._last]]

    def roc_curve(self, weight_M: Floats | None = None) -> RocCurve:
        """The curve where each pair, in the order given at first, counts so often."""
        weight = np.ones(len(self.order)) if weight_M is None else weight_M[self.order]
        one, two = (np.r_[0.0, np.cumsum(weight * kind)[self._last]] for kind in (self.same, ~self.same))
        there = np.r_[True, np.diff(one + two) > 0]  # pairs that do not count make no threshold
        return RocCurve(self._threshold[there], two[there] / two[-1], one[there] / one[-1])


def fold_accuracies(ranked: RankedPairs, scores_M: Floats, pairs: Pairs) -> list[dict[str, Any]]:
    """For each fold: the threshold that is best on all others, and how right it is here; for those of both kinds.

    Accuracy is the mean of the parts of each kind that are told rightly: LFW's own where there are as many of each.
    """
    rows = []
    for fold in np.unique(pairs.fold_M).tolist():
        here = pairs.fold_M == fold
        if len(set(pairs.same_M[here].tolist())) < 2:  # pictures that could not be read were left out, aloud
            continue
        curve = ranked.roc_curve((~here).astype(np.float64))
        threshold = curve.midpoint_threshold(int(np.argmax(curve.tar - curve.far)))
        right = (scores_M[here] >= threshold) == pairs.same_M[here]
        same = pairs.same_M[here]
        accuracy = (right[same].mean() + right[~same].mean()) / 2
        rows.append({"fold": fold + 1, "pairs": int(here.sum()), "threshold": threshold, "accuracy": float(accuracy)})
    return rows


def bootstrap_over_people(
    scores_M: Floats, pairs: Pairs, labels_N: NDArray[np.int64], of: Callable[[RocCurve], dict[str, float]]
) -> dict[str, Floats]:
    """What each number comes to over bootstrap samples of the people; nothing of fewer than FEWEST.

    People are drawn, not pairs: pairs that share one are not independent (Bolle, Ratha and Pankanti 2004).
    """
    names, person = np.unique(labels_N, return_inverse=True)
    if len(names) < MIN_PEOPLE:
        return {}
    draw = np.random.default_rng(1)
    kinds = [np.flatnonzero(kind) for kind in (pairs.same_M, ~pairs.same_M)]
    chosen = np.concatenate([draw.permutation(kind)[: _RESAMPLED // 2] for kind in kinds])
    one, other = person[pairs.first_M[chosen]], person[pairs.second_M[chosen]]
    same = pairs.same_M[chosen]
    ranked = RankedPairs(scores_M[chosen], same)
    draw, found = np.random.default_rng(2), []
    for _ in range(_REPLICATES[len(chosen) > _RESAMPLED // 10]):
        times = np.bincount(draw.integers(0, len(names), len(names)), minlength=len(names)).astype(np.float64)
        weight = np.where(same, times[one], times[one] * times[other])
        if weight[same].any() and weight[~same].any():
            found.append(of(ranked.roc_curve(weight)))
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def far_note(impostors: int, far: float) -> str:
    """What a reader must know of a FAR measured on so many pairs of two people."""
    if impostors * far >= _ENOUGH:
        return ""
    return f"too few pairs of two people: {impostors:,}; {_ENOUGH / far:,.0f} give {_ENOUGH} false accepts"
