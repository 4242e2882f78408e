"""An undefined metric is None, never -1, and a confidence interval stays within the range of its metric."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.base.console import Output
from cnnrun.base.errors import DataError
from cnnrun.commands.export import print_parity
from cnnrun.commands.train import print_series
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.results import Measurement
from cnnrun.experiment import config_file
from cnnrun.results import compare
from cnnrun.results.report import html as page
from cnnrun.results.report.content import training_curves
from cnnrun.results.studies import training_series
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.classification_metrics import MultilabelPredictions, SingleLabelPredictions
from cnnrun.tasks.detection.average_precision import COCO_METRICS, AveragePrecision, undefined_coco_metrics
from cnnrun.tasks.detection.task import Detect
from cnnrun.tasks.embedding import pair_metrics
from cnnrun.tasks.intervals import bootstrap, bootstrap_interval, confidence_intervals, metric_bounds, wilson_interval
from cnnrun.tasks.regression.residuals import Residuals

CPU = torch.device("cpu")
NAMES = ("ape", "bee")
SCENES = """
task: {detect: {channels: 8, depth: 0, most: 10}}
data: {source: {digit_scenes: {train: 24, held_out: 24, most: 2}}}
model: [{conv: {out_channels: 4, stride: 8, kernel_size: 7, activation: relu}}]
train: {epochs: 1, batch: 8, monitor: val/AP50}
"""


# --- intervals stay inside --------------------------------------------------------------------------------------------

shares = st.lists(st.floats(0, 1), min_size=5, max_size=60)


@given(st.floats(0, 1), shares, st.integers(0, 4))
def test_an_interval_of_a_proportion_lies_within_0_and_1(value, drawn, missing):
    values = np.array([*drawn, *[np.nan] * missing])
    low, high = bootstrap_interval(value, values, metric_bounds("ece", value))
    assert 0 <= low <= high <= 1
    assert (low, high) == bootstrap_interval(value, np.array(drawn), metric_bounds("ece", value))


@given(shares)
def test_an_interval_contains_its_metric_if_the_draws_have_no_bias(drawn):
    values = np.array(drawn)
    value = float(np.median(values))
    low, high = bootstrap_interval(value, values, metric_bounds("f1", value))
    assert low - 1e-12 <= value <= high + 1e-12


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_the_wilson_interval_contains_its_proportion_within_0_and_1(right):
    low, high = wilson_interval(np.array(right))
    assert 0 <= low <= np.mean(right) <= high <= 1


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.sampled_from(["accuracy", "AP", "eer"]))
def test_the_interval_over_seeds_contains_the_mean_within_0_and_1(values, name):
    found = training_series.mean_with_interval(values, name)
    assert 0 <= found["from"] <= found["mean"] + 1e-12
    assert found["mean"] - 1e-12 <= found["to"] <= 1


def test_the_interval_over_seeds_is_clipped_only_to_the_range_of_its_metric():
    found = training_series.mean_with_interval([0.5, 3.0, 9.0], "loss")
    assert found["from"] < 0
    assert found["to"] > 9
    assert training_series.mean_with_interval([0.1, 9.0], "mae")["from"] == 0
    assert training_series.mean_with_interval([0.97, 1.0], "accuracy")["to"] == 1
    assert training_series.mean_with_interval([0.5, None], "AP_small") == {"mean": None}


@given(st.integers(0, 10_000), st.integers(20, 60), st.sampled_from([0.5, 0.9, 1.0]))
@settings(max_examples=8, deadline=None)
def test_every_interval_of_every_meter_stays_within_the_range_of_its_metric(seed, count, right):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    predicted = np.where(draw.random(count) < right, labels, draw.integers(0, 3, count))
    found = SingleLabelPredictions(3, labels, predicted, draw.random(count), draw.random(count) < 0.9)
    known = MultilabelPredictions(draw.random((count, 3)), draw.random((count, 3)) < 0.1, np.full(3, 0.5))
    true = draw.normal(0, 1, (count, 1))
    left = Residuals(true + draw.normal(0, 1 - right, (count, 1)), true, [None], [0.0])
    for numbers, drawn, told in (
        (found.metrics(2), bootstrap(lambda weight: found.metrics(2, weight), count, 100), {"accuracy": found.correct}),
        (known.metrics(), bootstrap(known.metrics, count, 100), {"exact": known.exact}),
        (left.metrics(), bootstrap(left.metrics, count, 100), {}),
    ):
        for name, (low, high) in confidence_intervals(numbers, drawn, told).items():
            least, most = metric_bounds(name, numbers[name])
            assert least <= low <= high <= most, name
            assert name not in told or low <= numbers[name] <= high


@given(st.integers(0, 10_000), st.floats(0, 4))
@settings(max_examples=25, deadline=None)
def test_intervals_over_people_stay_within_0_and_1(seed, apart):
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 3)
    pairs = pair_metrics.all_pairs(labels)
    scores = draw.normal(apart * pairs.same_M, 1.0)
    found = pair_metrics.bootstrap_over_people(
        scores, pairs, labels, lambda curve: {"eer": curve.eer(), "auc": curve.auc()}
    )
    curve = pair_metrics.RankedPairs(scores, pairs.same_M).roc_curve()
    for name, (low, high) in confidence_intervals({"eer": curve.eer(), "auc": curve.auc()}, found, {}).items():
        assert 0 <= low <= high <= 1, name


@given(shares, shares, st.floats(0, 1), st.floats(0, 1))
def test_an_interval_of_a_difference_of_proportions_lies_within_minus_1_and_1(mine, theirs, one, other):
    count = min(len(mine), len(theirs))
    first, second = (
        Measurement({"f1": value}, bootstrap_draws={"f1": np.array(drawn[:count])})
        for value, drawn in ((one, mine), (other, theirs))
    )
    (row,) = compare.compare_metrics(first, second)
    assert -1 <= row["from"] <= row["to"] <= 1


def test_an_interval_of_a_difference_is_not_clipped_at_0():
    """The bias is subtracted from the draws, so an end may lie below 0 although every draw is above."""
    drawn = np.linspace(0.001, 0.101, 200)
    first = Measurement({"f1": 0.5}, bootstrap_draws={"f1": np.full(200, 0.5)})
    second = Measurement({"f1": 0.52}, bootstrap_draws={"f1": 0.5 + drawn})
    (row,) = compare.compare_metrics(first, second)
    assert row["from"] < 0


# --- what is not defined ----------------------------------------------------------------------------------------------


def scene(count: int = 24, small_in: tuple[int, ...] = (0,)) -> AveragePrecision:
    """Images with one medium object each and a small one in some. All objects are detected."""
    corner = torch.tensor([[10.0, 10.0], [100.0, 100.0]]).repeat(count, 1, 1)
    boxes = torch.cat([corner, corner + torch.tensor([[40.0, 40.0], [20.0, 20.0]])], 2)
    objects = torch.tensor([[0, 0 if number in small_in else -1] for number in range(count)])
    targets = {
        "boxes": boxes,
        "objects": objects,
        "roles": torch.zeros(count, 2).byte(),
        "areas": torch.tensor([[1600.0, 400.0]]).repeat(count, 1),
        "view": torch.tensor([[1.0, 1.0, 0.0, 0.0, 200.0, 200.0]]).repeat(count, 1),
    }
    meter = AveragePrecision(NAMES)
    meter.add({"boxes": boxes, "scores": torch.tensor([[0.9, 0.8]]).repeat(count, 1), "labels": objects}, targets)
    return meter


def test_a_bootstrap_draw_without_an_object_of_that_size_is_missing():
    meter = scene()
    found = meter.bootstrap_metrics(meter.evaluate())
    assert set(found) == set(COCO_METRICS) - {"AP_large", "AR_large"}
    missing = np.isnan(found["AP_small"])
    assert 0.2 < missing.mean() < 0.5  # the one picture with a small object is not drawn: (1 - 1/24)^24
    assert found["AP_small"][~missing] == pytest.approx(1.0)
    assert not any(np.isnan(found[name]).any() for name in ("AP", "AP_medium"))
    low, high = confidence_intervals({"AP_small": 1.0}, {"AP_small": found["AP_small"]}, {})["AP_small"]
    assert (low, high) == pytest.approx((1.0, 1.0))


def test_networks_are_compared_on_the_draws_where_the_metric_is_defined():
    drawn = {"AP_small": np.array([0.5, np.nan] * 50)}
    first, other = (Measurement({"AP_small": value, "AP_large": None}, bootstrap_draws=drawn) for value in (0.5, 0.5))
    (row,) = compare.compare_metrics(first, other)
    assert (row["number"], row["difference"], row["from"], row["to"], row["p"]) == ("AP_small", 0, 0, 0, 1)
    nothing = Measurement({"AP_small": 0.5}, bootstrap_draws={"AP_small": np.full(100, np.nan)})
    assert compare.compare_metrics(nothing, nothing) == []
    assert confidence_intervals(nothing.metrics, nothing.bootstrap_draws, {}) == {}


def test_a_bootstrap_draw_without_any_label_has_no_map():
    known = MultilabelPredictions(np.array([[0.9], [0.1]]), np.array([[True], [False]]), np.full(1, 0.5))
    numbers = known.metrics(np.array([0.0, 2.0]))
    assert numbers["mAP"] is None
    assert numbers["f1"] is None
    assert known.metrics()["mAP"] == 1
    drawn = bootstrap(
        lambda weight: known.metrics(np.array([weight[0], weight[1:].sum()])),
        20,
        200,
    )["mAP"]
    assert 0 < np.isnan(drawn).mean() < 1
    assert np.nanmin(drawn) == 1


def test_the_undefined_metrics_of_a_split_follow_from_its_targets():
    targets = {
        "objects": torch.tensor([[0, 1, -1]]),
        "roles": torch.tensor([[0, 2, 0]]).byte(),
        "areas": torch.tensor([[1024.0, 1e5, 5000.0]]),
    }
    found = undefined_coco_metrics(targets)
    assert set(found) == {"AP_large", "AR_large"}  # an area of 32^2 is small and medium, as COCO has it
    assert found["AP_large"] == "has no large object (9216 to 1e+10 pixels of area)"
    measuring = Detect().bind(DataFacts(NAMES, (1, 200, 200))).measuring
    assert measuring.undefined_metrics(targets) == found
    assert measuring.split_problem(targets) is None
    crowds = {**targets, "roles": torch.full((1, 3), 2).byte()}
    assert "no image has an object" in measuring.split_problem(crowds)


# --- where numbers go -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A detector of scenes without large objects."""
    made = config_file.parse_config(SCENES, "scenes.yaml", ["name=scenes"])
    return Path(train_run(made, tmp_path_factory.mktemp("runs"), CPU, resume=False)["run"])


def test_eval_and_the_metrics_file_have_no_minus_one(run, run_cli):
    code, out, _ = run_cli("eval", run)
    assert code == 0
    assert "AP_large n/a" in out
    assert "n/a: undefined, because test has nothing to measure it on" in out
    assert "-1.0" not in out
    code, out, _ = run_cli("eval", run, "--json")
    data = json.loads(out)
    assert data["numbers"]["AP_large"] is None
    assert "AP_large" not in data["intervals"]
    assert all(low >= 0 for low, _ in data["intervals"].values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "val/AP_large" not in lines[0]
    assert lines[0]["val/AP"] >= 0


def test_the_report_and_a_comparison_have_no_minus_one(run, tmp_path, run_cli, monkeypatch):
    pages = []
    monkeypatch.setattr(page, "_vega_script", lambda: "")
    code, _, err = run_cli("report", run, run, "--out", tmp_path / "page.html")
    assert code == 0, err
    pages.append((tmp_path / "page.html").read_text())
    assert "<dd>n/a</dd>" in pages[0]
    assert "-1.0" not in pages[0]
    assert not [plot for plot in training_curves([("", run)]) if plot.title == "val/AP_large"]
    code, out, _ = run_cli("compare", run, run)
    assert code == 0
    assert "AP_large" not in out
    assert "-1.0" not in out


def test_minus_one_in_a_metrics_file_of_an_earlier_version_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "val/AP_large": -1.0, "val/AP": 0.5}\n')
    assert [plot.title for plot in training_curves([("", tmp_path)])] == ["val/AP"]


def test_a_monitor_that_is_undefined_on_val_is_refused_before_training(tmp_path):
    made = config_file.parse_config(SCENES, "scenes.yaml", ["name=scenes", "train.monitor=val/AP_large"])
    with pytest.raises(
        DataError, match=r"val/AP_large is not defined: the val split has no large object .* val/AP50"
    ) as error:
        train_run(made, tmp_path, CPU, resume=False)
    assert "AP_large," not in str(error.value)
    assert not list(tmp_path.glob("**/metrics.jsonl"))


def test_undefined_metrics_over_seeds_are_reported(capsys):
    data = {"name": "n", "seeds": [0, 1], "split": "val", "path": "p", "runs": []}
    summary = {
        name: training_series.mean_with_interval(values, name)
        for name, values in (("AP", [0.5, 0.7]), ("AP_large", [None, None]))
    }
    print_series({**data, "summary": summary}, Output())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["AP_large", "n/a"] in lines
    print_parity(
        {
            "path": "p", "samples_compared": 1, "split": "val", "largest_difference": 0.0, "batch_sizes": [1],
            "metrics": {"artefact": {"AP": 0.5, "AP_large": None}},
        },
        Output(),
    )  # fmt: skip
    assert "AP 0.5000  AP_large n/a" in capsys.readouterr().out
