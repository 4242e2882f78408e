"""Intervals hold what they say: the truth, known because it was made, lies in 95 of 100 of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cnnrun.contracts.results import Measured
from cnnrun.results import compare
from cnnrun.results.compare import bootstrapped, holm, mcnemar
from cnnrun.tasks.classification_metrics import Bins, Classified, Present
from cnnrun.tasks.intervals import bounds, draws, interval, intervals, spread, wilson
from cnnrun.tasks.regression.residuals import Residuals


def test_draws_are_of_all_samples_and_the_same_for_all_who_ask():
    made = list(draws(50, 20))
    assert all(weight.sum() == 50 for weight in made)
    assert all((a == b).all() for a, b in zip(made, draws(50, 20), strict=True))
    assert any((a != b).any() for a, b in itertools.pairwise(made))


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = spread(lambda weight: {"mean": float(np.average(values, weights=weight))}, 400)["mean"]
    assert found.std() == pytest.approx(values.std() / 20, rel=0.08)
    low, high = interval(values.mean(), found)
    assert low < values.mean() < high


def test_an_interval_is_the_middle_of_the_draws_with_their_bias_taken_off_twice():
    """What draws say too high is too high itself, by as much: an interval ends lower by what they are off once more."""
    draws_of_it = np.random.default_rng(0).normal(7, 2, 200_001)
    draws_of_it -= np.median(draws_of_it) - 7
    low, high = interval(7.0, draws_of_it)
    assert (low, high) == pytest.approx((7 - 1.96 * 2, 7 + 1.96 * 2), abs=0.03)
    for off in (-3.0, 1.5):
        assert interval(7.0, draws_of_it + off) == pytest.approx((low - off, high - off), abs=1e-9)


def test_wilsons_interval_is_scipys_and_has_a_width_where_all_are_right():
    from scipy.stats import binomtest

    for count, right in ((359, 359), (50, 0), (80, 61)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(np.arange(count) < right) == pytest.approx(tuple(expected), abs=1e-6)
    assert (
        intervals({"accuracy": 1.0}, {"accuracy": np.ones(10)}, {"accuracy": np.ones(50, bool)})["accuracy"][0] < 0.95
    )


def test_of_few_samples_nothing_is_said_and_an_interval_of_r2_ends_at_one():
    draw = np.random.default_rng(0)
    for count in (1, 5, 19, 20, 25):
        for _ in range(20):
            true = draw.normal(0, 1, (count, 1))
            residuals = Residuals(true + draw.normal(0, 0.5, (count, 1)), true, [None], [0.0])
            found = spread(residuals.numbers, count, 200)
            assert bool(found) == (count >= 20)
            for name, values in found.items():
                value = residuals.numbers()[name]
                low, high = interval(value, values, bounds(name, value))
                assert low < value < high
                assert name not in ("r2", "gain") or high <= 1


SIMULATED, DRAWS, COUNT = 1000, 300, 500


def covered(made: list[tuple[tuple[float, float], float]]) -> float:
    return float(np.mean([low <= truth <= high for (low, high), truth in made]))


@pytest.mark.slow
def test_intervals_of_errors_hold_the_truth_95_times_of_100():
    """1,000 sets of 300 pictures with normal errors: the true MAE and RMSE are known."""
    draw, made = np.random.default_rng(0), {"mae": [], "rmse": []}
    truths = {"mae": 2 * np.sqrt(2 / np.pi), "rmse": 2.0}
    for _ in range(SIMULATED):
        true = draw.normal(0, 5, (COUNT, 1))
        residuals = Residuals(true + draw.normal(0, 2, (COUNT, 1)), true, [None], [0.0])
        found, numbers = spread(residuals.numbers, COUNT, DRAWS), residuals.numbers()
        for name, truth in truths.items():
            made[name].append((interval(numbers[name], found[name]), truth))
    for name, each in made.items():
        assert covered(each) == pytest.approx(0.95, abs=0.02), name


@pytest.mark.slow
def test_intervals_of_classification_hold_the_truth_95_times_of_100():
    """Two classes; 80 of 100 are told rightly, whatever the class."""
    draw, made = np.random.default_rng(1), {"accuracy": [], "f1": []}
    for _ in range(SIMULATED):
        labels = draw.integers(0, 2, COUNT)
        right = draw.random(COUNT) < 0.8
        predicted = np.where(right, labels, 1 - labels)
        found = Classified(2, labels, predicted, np.full(COUNT, 0.8), np.ones(COUNT, bool))
        drawn = spread(lambda weight, found=found: found.numbers(2, weight), COUNT, DRAWS)
        ends = intervals(found.numbers(2), drawn, {"accuracy": found.hits})
        for name, each in made.items():
            each.append((ends[name], 0.8))
    for name, each in made.items():
        assert covered(each) == pytest.approx(0.95, abs=0.02), name


@pytest.mark.slow
def test_intervals_of_average_precision_hold_the_truth_95_times_of_100():
    draw = np.random.default_rng(2)

    def drawn(count: int) -> Present:
        present = draw.random((count, 2)) < 0.4
        score = 1 / (1 + np.exp(-(draw.normal(0, 1, (count, 2)) + 1.2 * present)))
        return Present(score, present, np.full(2, 0.5))

    truth = drawn(400_000).numbers()["mAP"]
    made = []
    for _ in range(SIMULATED):
        found = drawn(COUNT)
        made.append((interval(found.numbers()["mAP"], spread(found.numbers, COUNT, DRAWS)["mAP"]), truth))
    assert covered(made) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_a_calibration_error_hold_the_truth_most_of_the_time():
    """It is estimated too high, the more so the fewer the pictures; what the interval takes off for that is not all."""
    draw = np.random.default_rng(3)

    def drawn(count: int) -> Bins:
        said = draw.beta(6, 2, count).clip(0.3, 1)
        return Bins(said, draw.random(count) < (said - 0.04).clip(0, 1))

    truth, made = drawn(2_000_000).error(), []
    for _ in range(300):
        found = drawn(COUNT)
        values = spread(lambda weight, found=found: {"ece": found.error(weight)}, COUNT, DRAWS)["ece"]
        made.append((interval(found.error(), values), truth))
    assert 0.82 <= covered(made) <= 0.97


# --- comparing --------------------------------------------------------------------------------------------------------


def measured(right: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> Measured:
    predicted = np.where(right, labels, (labels + draw.integers(1, 5, len(labels))) % 5)
    found = Classified(5, labels, predicted, np.clip(draw.normal(0.85, 0.1, len(labels)), 0.3, 1), right)
    return Measured(
        found.numbers(2),
        spread=spread(lambda weight: found.numbers(2, weight), len(labels), 400),
        right={"accuracy": found.hits, "top_2": right},
    )


def pair(draw: np.random.Generator, gain: float = 0.0) -> bool:
    """Two networks that are right on the same hard and easy pictures, and of that the second a part more often."""
    labels, ease = draw.integers(0, 5, 500), draw.beta(4, 0.7, 500)
    first, other = (measured(draw.random(500) < part, labels, draw) for part in (ease, ease + gain * (1 - ease)))
    return any(row["distinguishable"] for row in compare.tested(first, other))


@pytest.mark.slow
def test_two_trainings_of_one_config_are_not_told_apart_and_a_better_one_is():
    draw = np.random.default_rng(0)
    assert sum(pair(draw) for _ in range(100)) <= 10
    assert sum(pair(draw, gain=0.6) for _ in range(20)) >= 18


def test_mcnemar_goes_by_the_pictures_on_which_the_two_differ():
    first = np.array([True] * 90 + [False] * 10)
    other = first.copy()
    assert mcnemar(first, other) == 1.0
    other[90:98] = True
    assert mcnemar(first, other) == pytest.approx(2 * 0.5**8)
    assert mcnemar(other, first) == mcnemar(first, other)


def test_a_bootstraps_p_is_that_of_its_interval():
    draw = np.random.default_rng(0)
    assert bootstrapped(0.1, 0.1 + 0.05 * draw.normal(size=100_000)) == pytest.approx(0.0455, rel=0.02)
    assert bootstrapped(0.0, np.zeros(100)) == 1.0
    # A hundred draws are enough for any of twelve numbers to differ.
    assert holm([bootstrapped(0.5, 0.5 + 0.05 * draw.normal(size=100)) for _ in range(12)]) == [True] * 12


def test_networks_as_well_calibrated_are_not_told_apart_by_how_sure_they_are():
    """Both say what comes true; one is always nearly sure. The fewer pictures, the more an error is overestimated."""
    draw, told = np.random.default_rng(0), 0
    for _ in range(40):
        found = [Bins(said, draw.random(2000) < said) for said in (draw.beta(97, 3, 2000), draw.beta(17, 3, 2000))]
        one, other = (spread(lambda w, each=each: {"ece": each.error(w)}, 2000, 200)["ece"] for each in found)
        told += bootstrapped(found[1].error() - found[0].error(), other - one) < 0.05 / 6
    assert told <= 3


def test_of_many_tests_fewer_are_taken_for_a_difference():
    assert holm([0.04, 0.9, 0.9]) == [False, False, False]
    assert holm([0.001, 0.9, 0.024]) == [True, False, True]
    assert holm([0.04]) == [True]
    assert holm([]) == []
