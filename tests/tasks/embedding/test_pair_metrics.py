"""Pair and gallery metrics equal scikit-learn's, SciPy's root finding and plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve

from cnnrun.base.errors import DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.tasks.embedding import gallery_metrics, pair_metrics
from cnnrun.tasks.embedding.pair_metrics import Pairs, RankedPairs, all_pairs
from cnnrun.tasks.embedding.task import Verify
from cnnrun.tasks.intervals import bootstrap_interval


def draw_similarities(seed: int, count: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities, with many ties if there are few levels, and the mask of pairs of one person."""
    draw = np.random.default_rng(seed)
    same = draw.random(count) < 0.4
    same[:2] = [True, False]
    scores = np.round(draw.normal(0.4 * same, 0.3) * levels) / levels
    return scores, same


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 300), st.sampled_from([3, 10, 10_000]))
def test_roc_curves_equal_scikit_learns(seed, count, levels):
    scores, same = draw_similarities(seed, count, levels)
    curve = RankedPairs(scores, same).roc_curve()
    far, tar, threshold = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.far, far, atol=1e-12)
    np.testing.assert_allclose(curve.tar, tar, atol=1e-12)
    np.testing.assert_allclose(curve.threshold[1:], threshold[1:])
    assert curve.auc() == pytest.approx(roc_auc_score(same, scores), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(10, 300), st.sampled_from([10, 10_000]))
def test_the_equal_error_rate_is_where_the_interpolated_curve_meets_the_diagonal(seed, count, levels):
    scores, same = draw_similarities(seed, count, levels)
    curve = RankedPairs(scores, same).roc_curve()
    line = interp1d(
        curve.far + np.arange(len(curve.far)) * 1e-15, curve.tar
    )  # distinct abscissae where the curve rises vertically
    expected = brentq(lambda x: 1 - x - float(line(x)), 0, 1)
    assert curve.eer() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 200), st.sampled_from([5, 10_000]), st.sampled_from([0.5, 0.1, 0.01]))
def test_the_threshold_for_a_far_is_the_lowest_that_keeps_it(seed, count, levels, far):
    scores, same = draw_similarities(seed, count, levels)
    curve = RankedPairs(scores, same).roc_curve()
    threshold = curve.midpoint_threshold(curve.index_at(far))
    accepted = scores[~same] >= threshold
    assert accepted.mean() <= far + 1e-12
    assert curve.tar[curve.index_at(far)] == pytest.approx((scores[same] >= threshold).mean())
    lower = scores[scores < threshold]
    if len(lower):
        assert (scores[~same] >= lower.max()).mean() > far or curve.far[-1] <= far


def test_a_far_reached_exactly_is_used():
    scores, same = draw_similarities(1, 60, 10_000)
    curve = RankedPairs(scores, same).roc_curve()
    for far in np.unique(curve.far[1:-1]).tolist():
        assert curve.far[curve.index_at(far)] == far
        assert curve.index_at(far) == max(place for place, value in enumerate(curve.far) if value <= far)


def test_integer_weights_equal_repeated_pairs():
    scores, same = draw_similarities(3, 50, 10)
    times = np.random.default_rng(0).integers(0, 4, 50)
    repeated = RankedPairs(np.repeat(scores, times), np.repeat(same, times)).roc_curve()
    weighted = RankedPairs(scores, same).roc_curve(times.astype(float))
    assert weighted.eer() == pytest.approx(repeated.eer(), abs=1e-12)
    assert weighted.auc() == pytest.approx(repeated.auc(), abs=1e-12)


def draw_embeddings(seed: int, labels: np.ndarray, dimension: int = 8) -> np.ndarray:
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(labels.max() + 1, dimension))[labels] + 0.8 * draw.normal(size=(len(labels), dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_all_pairs_contains_every_pair_in_even_folds():
    labels = np.repeat(np.arange(6), [5, 5, 4, 3, 1, 2])
    pairs = all_pairs(labels)
    assert len(set(zip(pairs.first_M.tolist(), pairs.second_M.tolist(), strict=True))) == 20 * 19 // 2
    assert pairs.total == (int(pairs.same_M.sum()), int((~pairs.same_M).sum())) == (30, 160)
    for kind in (pairs.same_M, ~pairs.same_M):
        counts = np.bincount(pairs.fold_M[kind], minlength=10)
        assert counts.max() - counts.min() <= 1
    embeddings = draw_embeddings(0, labels)
    expected = (embeddings.astype(np.float64)[pairs.first_M] * embeddings[pairs.second_M]).sum(1)
    np.testing.assert_allclose(pairs.similarities(embeddings), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=8, max_size=60), st.integers(3, 400))
def test_pairs_of_many_images_are_sampled_without_repeats(labels, most):
    labels = np.array([0, 1, *labels])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair_metrics, "MAX_PAIRS", most)
        pairs = all_pairs(labels)
    assert (pairs.same_M == (labels[pairs.first_M] == labels[pairs.second_M])).all()
    assert (pairs.first_M != pairs.second_M).all()
    keys = np.sort(np.stack([pairs.first_M, pairs.second_M], 1), 1)
    assert len(np.unique(keys, axis=0)) == len(keys)
    counts = np.bincount(labels)
    assert pairs.total[0] == (counts * (counts - 1) // 2).sum()
    assert sum(pairs.total) == len(labels) * (len(labels) - 1) // 2
    for kind, total in ((pairs.same_M, pairs.total[0]), (~pairs.same_M, pairs.total[1])):
        if sum(pairs.total) <= 2 * most or total <= most:
            assert kind.sum() == total  # all of them
        else:
            assert most * 0.7 <= kind.sum() <= most


def test_a_folds_threshold_comes_from_the_other_folds():
    """Each fold is measured at the best threshold of the others; changing a fold leaves its own threshold."""
    labels = np.repeat(np.arange(8), 6)
    pairs = all_pairs(labels)
    scores = pairs.similarities(draw_embeddings(1, labels))
    rows = pair_metrics.fold_accuracies(RankedPairs(scores, pairs.same_M), scores, pairs)
    assert [row["fold"] for row in rows] == list(range(1, 11))
    for row in rows:
        here = pairs.fold_M == row["fold"] - 1
        others, kind = scores[~here], pairs.same_M[~here]
        best = max(((others[kind] >= t).mean() + (others[~kind] < t).mean()) / 2 for t in others)
        chosen = ((others[kind] >= row["threshold"]).mean() + (others[~kind] < row["threshold"]).mean()) / 2
        assert chosen == pytest.approx(best, abs=1e-12)
        told = scores[here] >= row["threshold"]
        same = pairs.same_M[here]
        assert row["accuracy"] == pytest.approx((told[same].mean() + (~told[~same]).mean()) / 2)
    for fold in range(10):
        changed = np.where(pairs.fold_M == fold, -scores, scores)
        again = pair_metrics.fold_accuracies(RankedPairs(changed, pairs.same_M), changed, pairs)
        assert again[fold]["threshold"] == rows[fold]["threshold"]
        assert again[fold]["accuracy"] != rows[fold]["accuracy"]


def of_eer(scores, pairs, labels):
    eer = RankedPairs(scores, pairs.same_M).roc_curve().eer()
    return bootstrap_interval(
        eer, pair_metrics.bootstrap_over_people(scores, pairs, labels, lambda curve: {"eer": curve.eer()})["eer"]
    )


def test_intervals_contain_the_metric_and_narrow_with_more_people():
    widths = []
    for people in (8, 60):
        labels = np.repeat(np.arange(people), 5)
        pairs = all_pairs(labels)
        scores = pairs.similarities(draw_embeddings(2, labels))
        curve = RankedPairs(scores, pairs.same_M).roc_curve()
        low, high = of_eer(scores, pairs, labels)
        assert low <= curve.eer() <= high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_intervals_have_about_their_nominal_coverage():
    """60 draws of 25 people from one population, whose EER is known from 1,500 people."""
    many = np.repeat(np.arange(1500), 4)
    pairs = all_pairs(many)
    truth = RankedPairs(pairs.similarities(draw_embeddings(5, many)), pairs.same_M).roc_curve().eer()
    labels, hits = np.repeat(np.arange(25), 4), 0
    for seed in range(60):
        pairs = all_pairs(labels)
        scores = pairs.similarities(draw_embeddings(100 + seed, labels))
        low, high = of_eer(scores, pairs, labels)
        hits += low <= truth <= high
    assert hits >= 51  # 57 are expected; 51 or fewer occur once in 40 runs


def test_a_bootstrap_sample_counts_each_copy_of_a_person_separately():
    """A person drawn twice adds their own pairs twice, and pairs with others once per copy of both."""
    labels = np.repeat(np.arange(6), [4, 3, 2, 3, 2, 4])
    pairs = all_pairs(labels)
    scores = pairs.similarities(draw_embeddings(4, labels))
    table = np.zeros((len(labels), len(labels)))
    table[pairs.first_M, pairs.second_M] = table[pairs.second_M, pairs.first_M] = scores
    found = pair_metrics.bootstrap_over_people(
        scores, pairs, labels, lambda curve: {"eer": curve.eer(), "auc": curve.auc()}
    )
    draw, place = np.random.default_rng(2), 0
    for _ in range(30):
        people = draw.integers(0, 6, 6)
        copies = [np.flatnonzero(labels == person) for person in people]
        own = [table[a, b] for rows in copies for a, b in combinations(rows, 2)]
        other = [
            table[a, b]
            for (one, rows), (two, columns) in combinations(zip(people, copies, strict=True), 2)
            if one != two  # copies of one person are not two people
            for a in rows
            for b in columns
        ]
        if not other:
            continue
        same = np.arange(len(own) + len(other)) < len(own)
        expected = RankedPairs(np.r_[own, other], same).roc_curve()
        assert found["eer"][place] == pytest.approx(expected.eer(), abs=1e-9)
        assert found["auc"][place] == pytest.approx(expected.auc(), abs=1e-9)
        place += 1
    assert place > 20


def test_the_bootstrap_keeps_rare_pairs_of_one_person(monkeypatch):
    """Subsampling the pairs keeps the interval's width, although pairs of one person are rare."""
    monkeypatch.setattr(pair_metrics, "_BOOTSTRAP_PAIRS", 20_000)
    labels = np.repeat(np.arange(300), 2)
    pairs = all_pairs(labels)
    scores = pairs.similarities(draw_embeddings(6, labels))
    seen = []
    pair_metrics.bootstrap_over_people(
        scores, pairs, labels, lambda curve: {"seen": float(seen.append(len(curve.tar)) or 0)}
    )
    monkeypatch.setattr(pair_metrics, "_BOOTSTRAP_PAIRS", 10**9)
    low, high = of_eer(scores, pairs, labels)
    monkeypatch.setattr(pair_metrics, "_BOOTSTRAP_PAIRS", 20_000)
    few_low, few_high = of_eer(scores, pairs, labels)
    assert (few_high - few_low) == pytest.approx(high - low, rel=0.4)


def test_few_people_give_no_interval():
    labels = np.repeat(np.arange(4), 5)
    pairs = all_pairs(labels)
    scores = pairs.similarities(draw_embeddings(2, labels))
    assert pair_metrics.bootstrap_over_people(scores, pairs, labels, lambda curve: {"eer": curve.eer()}) == {}


def test_resampling_pairs_independently_would_give_too_narrow_intervals():
    labels, widths = np.repeat(np.arange(10), 10), []
    for seed in range(3):
        pairs = all_pairs(labels)
        scores = pairs.similarities(draw_embeddings(seed, labels))
        ranked, draw = RankedPairs(scores, pairs.same_M), np.random.default_rng(0)
        low, high = of_eer(scores, pairs, labels)
        times = (np.bincount(draw.integers(0, 4950, 4950), minlength=4950).astype(float) for _ in range(200))
        narrow = np.quantile([ranked.roc_curve(weight).eer() for weight in times], (0.025, 0.975))
        widths.append((narrow[1] - narrow[0]) / (high - low))
    assert max(widths) < 0.5


def test_a_far_measured_on_too_few_pairs_gets_a_note():
    assert pair_metrics.far_note(4500, 0.01) == ""
    assert pair_metrics.far_note(4500, 0.0001) == "too few pairs of two people: 4,500; 100,000 give 10 false accepts"


# --- identification ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_identification_ranks_equal_a_plain_search(seed, count):
    labels = np.random.default_rng(seed).integers(0, 9, 60)
    embeddings = draw_embeddings(seed, labels)
    gallery = gallery_metrics.enrol_first(labels, count)
    for person in np.unique(labels):
        own = np.flatnonzero(labels == person)
        enrolled = np.intersect1d(gallery.enrolled_G, own)
        assert enrolled.tolist() == (own[:count].tolist() if len(own) > count else [])
    ranks = gallery_metrics.identification_ranks(embeddings, labels, gallery)
    for probe, rank in zip(gallery.probes_Q, ranks, strict=True):
        best = {
            person: max(float(embeddings[probe] @ embeddings[g]) for g in gallery.enrolled_G if labels[g] == person)
            for person in np.unique(labels[gallery.enrolled_G])
        }
        ordered = sorted(best.values(), reverse=True)
        assert abs(ordered[rank - 1] - best[labels[probe]]) < 1e-6
    rates = [row["rate"] for row in gallery_metrics.cumulative_match_rows(ranks, 9)]
    assert rates == sorted(rates)
    assert rates[-1] == 1


def test_the_open_set_threshold_accepts_the_stated_share_of_strangers():
    labels = np.repeat(np.arange(20), 12)
    embeddings = draw_embeddings(3, labels)
    gallery = gallery_metrics.enrol_first(labels, 2)
    rows = gallery_metrics.open_set_rows(embeddings, labels, gallery)
    assert [row["FPIR"] for row in rows] == [0.1, 0.01]
    for row in rows:
        alarms = missed = known = strangers = 0
        for half in (set(range(0, 20, 2)), set(range(1, 20, 2))):
            enrolled = [g for g in gallery.enrolled_G if labels[g] in half]
            for probe in gallery.probes_Q:
                values = embeddings[enrolled] @ embeddings[probe]
                top, who = values.max(), labels[enrolled[values.argmax()]]
                if labels[probe] in half:
                    known += 1
                    missed += who != labels[probe] or top < row["threshold"]
                else:
                    strangers += 1
                    alarms += top >= row["threshold"]
        assert (known, strangers) == (row["pictures of people"], row["of strangers"])
        assert alarms == int(strangers * row["FPIR"])
        assert missed / known == pytest.approx(row["FNIR"])


def test_equally_similar_strangers_are_accepted_together_or_not_at_all():
    strangers = np.array([0.5] * 100 + [0.1] * 900, np.float32)
    row = gallery_metrics._open_set_row(strangers, np.array([0.6, 0.4], np.float32), 0.01)
    assert (strangers >= row["threshold"]).mean() <= 0.01
    assert gallery_metrics._open_set_row(strangers, strangers, 0.1)["threshold"] == pytest.approx(0.3)


def test_three_people_give_no_open_set_rows():
    labels = np.repeat(np.arange(3), 4)
    assert (
        gallery_metrics.open_set_rows(draw_embeddings(0, labels), labels, gallery_metrics.enrol_first(labels, 1)) == []
    )


def test_a_pair_files_pairs_are_measured_in_any_image_order():
    """The pairs of a pair file are found whatever the order of the images."""
    from cnnrun.tasks.embedding.meter import listed_or_all_pairs

    every = {
        "labels": np.array([0, 0, 1, 1]),
        "number": np.array([3, 1, 0, 7]),
        "pairs": np.array([[[1, 0], [0, 1]], [[-1, -1], [-1, -1]], [[7, 1], [9, 0]], [[-1, -1], [-1, -1]]]),
    }
    found: Pairs = listed_or_all_pairs(every)
    assert found.first_M.tolist() == [0, 0, 2]
    assert found.second_M.tolist() == [1, 2, 3]
    assert found.same_M.tolist() == [True, False, True]
    assert found.fold_M.tolist() == [0, 1, 1]
    assert found.total == (2, 1)


def measure(task, labels: np.ndarray, embeddings: np.ndarray):
    people = DataFacts(tuple(map(str, range(labels.max() + 1))), (1, 8, 8))
    meter = task.bind(people).measuring.build_meter(Choices())
    meter.update({"embedding": torch.from_numpy(embeddings)}, {"labels": torch.from_numpy(labels)})
    return meter.compute(tables=False)


def test_the_threshold_chosen_on_val_lies_midway_between_two_similarities():
    """An exported file rounds similarities differently and must still accept the same pairs."""
    labels = np.repeat(np.arange(12), 5)
    embeddings = draw_embeddings(7, labels)
    pairs = all_pairs(labels)
    scores, impostor_pairs = np.sort(pairs.similarities(embeddings)), int((~pairs.same_M).sum())
    points = measure(Verify(), labels, embeddings).choices.operating_points
    assert {point.impostor_pairs for point in points} == {impostor_pairs}
    thresholds = {point.far: point.threshold for point in points}
    for far in (0.1, 0.01):
        threshold = thresholds[far]
        above = scores[scores >= threshold].min()
        below = scores[scores < threshold].max()
        assert threshold == pytest.approx((above + below) / 2, abs=1e-12)


def test_pairs_of_one_kind_alone_are_refused():
    meter = Verify().bind(DataFacts(("a", "b"), (1, 8, 8))).measuring.build_meter(Choices())
    meter.update({"embedding": torch.eye(3)}, {"labels": torch.tensor([0, 0, 0])})
    with pytest.raises(DataError, match="the readable images have only one kind"):
        meter.compute()


@pytest.mark.parametrize("count", [1, 3])
def test_identification_enrols_the_configured_number_of_images(count):
    labels = np.repeat(np.arange(12), 6)
    embeddings = draw_embeddings(8, labels)
    numbers = measure(Verify(gallery=count), labels, embeddings).metrics
    ranks = gallery_metrics.identification_ranks(embeddings, labels, gallery_metrics.enrol_first(labels, count))
    assert numbers["rank_1"] == (ranks == 1).mean()
    assert numbers["rank_5"] == (ranks <= 5).mean()
    assert 0 < numbers["rank_1"] < 1


def test_only_classes_with_training_images_have_centres():
    facts = DataFacts(("a", "b", "c", "d"), (1, 8, 8), class_counts=(5, 0, 3, 0))
    criterion = Verify(dimension=6).bind(facts).learning.build_criterion()
    assert criterion.place.tolist() == [0, -1, 1, -1]
    assert criterion.centres.shape == (2, 6)
