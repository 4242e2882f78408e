"""Confidence intervals have their nominal coverage: 95 of 100 contain the known truth of simulated data."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

from cnnrun.contracts.results import Measurement
from cnnrun.results import compare
from cnnrun.results.compare import bootstrap_p_value, holm_rejections, mcnemar_p_value
from cnnrun.tasks import intervals
from cnnrun.tasks.classification_metrics import MultilabelPredictions, ReliabilityBins, SingleLabelPredictions
from cnnrun.tasks.intervals import (
    bootstrap,
    bootstrap_interval,
    bootstrap_weights,
    confidence_intervals,
    metric_bounds,
    wilson_interval,
)
from cnnrun.tasks.regression.residuals import Residuals


def test_bootstrap_weights_sum_to_the_sample_count_and_are_reproducible():
    made = list(bootstrap_weights(50, 20))
    assert all(weight.sum() == 50 for weight in made)
    assert all((a == b).all() for a, b in zip(made, bootstrap_weights(50, 20), strict=True))
    assert any((a != b).any() for a, b in itertools.pairwise(made))


def test_the_bootstrap_spread_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(lambda weight: {"mean": float(np.average(values, weights=weight))}, 400)["mean"]
    assert found.std() == pytest.approx(values.std() / 20, rel=0.08)
    low, high = bootstrap_interval(values.mean(), found)
    assert low < values.mean() < high


def test_an_interval_is_the_draws_quantiles_less_twice_their_bias():
    """If the draws are biased, the estimate is too, by as much: their quantiles are shifted by twice the bias."""
    draws_of_it = np.random.default_rng(0).normal(7, 2, 200_001)
    draws_of_it -= np.median(draws_of_it) - 7
    low, high = bootstrap_interval(7.0, draws_of_it)
    assert (low, high) == pytest.approx((7 - 1.96 * 2, 7 + 1.96 * 2), abs=0.03)
    for off in (-3.0, 1.5):
        assert bootstrap_interval(7.0, draws_of_it + off) == pytest.approx((low - off, high - off), abs=1e-9)


def test_wilsons_interval_equals_scipys_and_has_width_at_perfect_accuracy():
    from scipy.stats import binomtest

    for count, right in ((359, 359), (50, 0), (80, 61)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(np.arange(count) < right) == pytest.approx(tuple(expected), abs=1e-6)
    assert (
        confidence_intervals({"accuracy": 1.0}, {"accuracy": np.ones(10)}, {"accuracy": np.ones(50, bool)})["accuracy"][
            0
        ]
        < 0.95
    )


def test_few_samples_give_no_interval_and_r2_intervals_end_at_one():
    draw = np.random.default_rng(0)
    for count in (1, 5, 19, 20, 25):
        for _ in range(20):
            true = draw.normal(0, 1, (count, 1))
            residuals = Residuals(true + draw.normal(0, 0.5, (count, 1)), true, [None], [0.0])
            found = bootstrap(residuals.metrics, count, 200)
            assert bool(found) == (count >= 20)
            for name, values in found.items():
                value = residuals.metrics()[name]
                low, high = bootstrap_interval(value, values, metric_bounds(name, value))
                assert low < value < high
                assert name not in ("r2", "gain") or high <= 1


SIMULATED, DRAWS, COUNT = 1000, 300, 500


@pytest.fixture
def stored_draws(monkeypatch) -> None:
    """Draw the weights once for all simulations of a test. They depend only on the number of samples."""
    monkeypatch.setattr(intervals, "bootstrap_weights", cache(lambda count, draws: [*bootstrap_weights(count, draws)]))


def coverage(made: list[tuple[tuple[float, float], float]]) -> float:
    return float(np.mean([low <= truth <= high for (low, high), truth in made]))


@pytest.mark.slow
@pytest.mark.usefixtures("stored_draws")
def test_intervals_of_regression_errors_contain_the_truth_95_times_of_100():
    """1,000 sets of 500 images with normal errors: the true MAE and RMSE are known."""
    draw, made = np.random.default_rng(0), {"mae": [], "rmse": []}
    truths = {"mae": 2 * np.sqrt(2 / np.pi), "rmse": 2.0}
    for _ in range(SIMULATED):
        true = draw.normal(0, 5, (COUNT, 1))
        residuals = Residuals(true + draw.normal(0, 2, (COUNT, 1)), true, [None], [0.0])
        found, numbers = bootstrap(residuals.metrics, COUNT, DRAWS), residuals.metrics()
        for name, truth in truths.items():
            made[name].append((bootstrap_interval(numbers[name], found[name]), truth))
    for name, each in made.items():
        assert coverage(each) == pytest.approx(0.95, abs=0.02), name


@pytest.mark.slow
@pytest.mark.usefixtures("stored_draws")
def test_intervals_of_classification_metrics_contain_the_truth_95_times_of_100():
    """Two classes, each with 80 of 100 images classified correctly."""
    draw, made = np.random.default_rng(1), {"accuracy": [], "f1": []}
    for _ in range(SIMULATED):
        labels = draw.integers(0, 2, COUNT)
        right = draw.random(COUNT) < 0.8
        predicted = np.where(right, labels, 1 - labels)
        found = SingleLabelPredictions(2, labels, predicted, np.full(COUNT, 0.8), np.ones(COUNT, bool))
        drawn = bootstrap(lambda weight, found=found: found.metrics(2, weight), COUNT, DRAWS)
        ends = confidence_intervals(found.metrics(2), drawn, {"accuracy": found.correct})
        for name, each in made.items():
            each.append((ends[name], 0.8))
    for name, each in made.items():
        assert coverage(each) == pytest.approx(0.95, abs=0.02), name


@pytest.mark.slow
@pytest.mark.usefixtures("stored_draws")
def test_intervals_of_average_precision_contain_the_truth_95_times_of_100():
    draw = np.random.default_rng(2)

    def drawn(count: int) -> MultilabelPredictions:
        present = draw.random((count, 2)) < 0.4
        score = 1 / (1 + np.exp(-(draw.normal(0, 1, (count, 2)) + 1.2 * present)))
        return MultilabelPredictions(score, present, np.full(2, 0.5))

    truth = drawn(400_000).metrics()["mAP"]
    made = []
    for _ in range(SIMULATED):
        found = drawn(COUNT)
        made.append((bootstrap_interval(found.metrics()["mAP"], bootstrap(found.metrics, COUNT, DRAWS)["mAP"]), truth))
    assert coverage(made) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("stored_draws")
def test_intervals_of_calibration_error_contain_the_truth_most_of_the_time():
    """The estimate is biased upwards, more so with fewer images, and the interval corrects only part of the bias."""
    draw = np.random.default_rng(3)

    def drawn(count: int) -> ReliabilityBins:
        said = draw.beta(6, 2, count).clip(0.3, 1)
        return ReliabilityBins(said, draw.random(count) < (said - 0.04).clip(0, 1))

    truth, made = drawn(2_000_000).calibration_error(), []
    for _ in range(300):
        found = drawn(COUNT)
        values = bootstrap(lambda weight, found=found: {"ece": found.calibration_error(weight)}, COUNT, DRAWS)["ece"]
        made.append((bootstrap_interval(found.calibration_error(), values), truth))
    assert 0.82 <= coverage(made) <= 0.97


# --- comparing --------------------------------------------------------------------------------------------------------


def measure_simulated(right: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> Measurement:
    predicted = np.where(right, labels, (labels + draw.integers(1, 5, len(labels))) % 5)
    found = SingleLabelPredictions(5, labels, predicted, np.clip(draw.normal(0.85, 0.1, len(labels)), 0.3, 1), right)
    return Measurement(
        found.metrics(2),
        bootstrap_draws=bootstrap(lambda weight: found.metrics(2, weight), len(labels), 400),
        correct={"accuracy": found.correct, "top_2": right},
    )


def pair(draw: np.random.Generator, gain: float = 0.0) -> bool:
    """True if two networks that find the same images hard, the second better by `gain`, are told apart."""
    labels, ease = draw.integers(0, 5, 500), draw.beta(4, 0.7, 500)
    first, other = (
        measure_simulated(draw.random(500) < part, labels, draw) for part in (ease, ease + gain * (1 - ease))
    )
    return any(row["distinguishable"] for row in compare.compare_metrics(first, other))


@pytest.mark.slow
@pytest.mark.usefixtures("stored_draws")
def test_equal_networks_are_not_told_apart_and_a_better_one_is():
    draw = np.random.default_rng(0)
    assert sum(pair(draw) for _ in range(100)) <= 10
    assert sum(pair(draw, gain=0.6) for _ in range(20)) >= 18


def test_mcnemar_counts_the_images_on_which_two_networks_differ():
    first = np.array([True] * 90 + [False] * 10)
    other = first.copy()
    assert mcnemar_p_value(first, other) == 1.0
    other[90:98] = True
    assert mcnemar_p_value(first, other) == pytest.approx(2 * 0.5**8)
    assert mcnemar_p_value(other, first) == mcnemar_p_value(first, other)


def test_the_bootstrap_p_value_matches_its_interval():
    draw = np.random.default_rng(0)
    assert bootstrap_p_value(0.1, 0.1 + 0.05 * draw.normal(size=100_000)) == pytest.approx(0.0455, rel=0.02)
    assert bootstrap_p_value(0.0, np.zeros(100)) == 1.0
    # A hundred draws are enough for any of twelve metrics to differ.
    assert (
        holm_rejections([bootstrap_p_value(0.5, 0.5 + 0.05 * draw.normal(size=100)) for _ in range(12)]) == [True] * 12
    )


def test_equally_calibrated_networks_are_not_told_apart_by_their_confidence():
    """Both are perfectly calibrated; one is always nearly certain. Fewer images overestimate the error more."""
    draw, told = np.random.default_rng(0), 0
    for _ in range(40):
        found = [
            ReliabilityBins(said, draw.random(2000) < said) for said in (draw.beta(97, 3, 2000), draw.beta(17, 3, 2000))
        ]
        one, other = (
            bootstrap(lambda w, each=each: {"ece": each.calibration_error(w)}, 2000, 200)["ece"] for each in found
        )
        told += bootstrap_p_value(found[1].calibration_error() - found[0].calibration_error(), other - one) < 0.05 / 6
    assert told <= 3


def test_holm_rejects_fewer_of_many_tests():
    assert holm_rejections([0.04, 0.9, 0.9]) == [False, False, False]
    assert holm_rejections([0.001, 0.9, 0.024]) == [True, False, True]
    assert holm_rejections([0.04]) == [True]
    assert holm_rejections([]) == []
