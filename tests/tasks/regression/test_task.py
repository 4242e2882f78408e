from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn import metrics as sk
from torch import distributions

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.layer import ShapeError
from cnnrun.tasks.regression.losses import Gaussian, Huber, Mae, Mse, Quantile, normal_nll, von_mises_nll
from cnnrun.tasks.regression.residuals import Residuals, circular_mean, wrap_difference
from cnnrun.tasks.regression.task import Regress

FACTS = DataFacts(
    (),
    (1, 8, 8),
    numbers=(
        NumberStatistics("weight", 500.0, 120.0, 10.0, 900.0),
        NumberStatistics("angle", 3.0, 26.0, -45.0, 45.0),
        NumberStatistics("hour", 12.0, 6.0, 0.0, 24.0),
        NumberStatistics("length", 0.02, 0.004, 0.0, 0.05),
    ),
    counts={"train": 100},
)
ANGLES = {"angle": 360.0, "hour": 24.0}


def truth(count: int, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    columns = [draw.normal(500, 120, count), draw.uniform(-45, 45, count), draw.uniform(0, 24, count)]
    return torch.tensor(np.column_stack([*columns, draw.normal(0.02, 0.004, count)]), dtype=torch.float32)


def decode(spec: Regress, outputs: torch.Tensor, temperature: float | None = None) -> dict[str, torch.Tensor]:
    return spec.bind(FACTS).predicting.build_decoder(Choices(temperature))(outputs)


def encode_values(task: Regress, values: torch.Tensor, extra: float = 0.0) -> torch.Tensor:
    """The raw outputs that a perfect network would give for these values."""
    units, each = task.units(FACTS), task.loss.outputs_per_number
    chosen = values[:, units.columns]
    count = len(units.mean)
    plain = (chosen[:, :count] - torch.tensor(units.mean)) / torch.tensor(units.std)
    raw = torch.full((len(values), count, each), extra)
    raw[:, :, 0] = plain
    turn = chosen[:, count:] / torch.tensor(units.period) * 2 * math.pi
    return torch.cat([raw.flatten(1), torch.stack([turn.cos(), turn.sin()], 2).flatten(1)], 1)


# --- losses = formulas ------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_plain_losses_equal_torchs(seed):
    draw = torch.Generator().manual_seed(seed)
    raw, target = (torch.randn(7, 3, dtype=torch.float64, generator=draw) * 3 for _ in range(2))
    for loss, theirs in (
        (Mse(), torch.nn.MSELoss()),
        (Mae(), torch.nn.L1Loss()),
        (Huber(delta=0.7), torch.nn.HuberLoss(delta=0.7)),
    ):
        assert loss.loss_per_number(raw[:, :, None], target).mean().item() == pytest.approx(
            theirs(raw, target).item(), rel=1e-12
        )


@given(st.integers(0, 1000), st.floats(0.2, 5))
@settings(max_examples=20, deadline=None)
def test_likelihoods_equal_torchs_distributions(seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randn(9, 4, 2, dtype=torch.float64, generator=draw) * 3
    target = torch.randn(9, 4, dtype=torch.float64, generator=draw)
    deviation = (torch.nn.functional.softplus(raw[:, :, 1]) + 1e-6).sqrt() * temperature
    expected = -distributions.Normal(raw[:, :, 0], deviation).log_prob(target)
    torch.testing.assert_close(normal_nll(raw, target, temperature), expected, rtol=1e-10, atol=1e-10)
    angle = target * 2
    kappa = raw.square().sum(2).sqrt() / temperature**2
    expected = -distributions.VonMises(torch.atan2(raw[:, :, 1], raw[:, :, 0]), kappa).log_prob(angle)
    found = von_mises_nll(raw, torch.stack([angle.cos(), angle.sin()], 2), temperature)
    # torch's own log I0 is a polynomial of 1e-7 or so
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_von_mises_integrates_to_one_and_stays_finite():
    turn = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)[:-1]
    unit = torch.stack([turn.cos(), turn.sin()], 1)[:, None]
    for kappa in (1e-3, 0.5, 3.0, 200.0):
        density = torch.exp(-von_mises_nll(torch.tensor([[[kappa, 0.0]]]).double().expand(len(turn), 1, 2), unit, 1.0))
        assert float(density.mean() * 2 * math.pi) == pytest.approx(1, rel=1e-6)
    far = torch.tensor([[[1e4, 1e4]]], requires_grad=True)
    von_mises_nll(far, torch.tensor([[[0.0, -1.0]]]), 1.0).sum().backward()
    assert far.grad.isfinite().all()
    none = torch.zeros(1, 1, 2, requires_grad=True)
    von_mises_nll(none, torch.tensor([[[1.0, 0.0]]]), 1.0).sum().backward()
    assert none.grad.isfinite().all()


def test_the_quantile_loss_is_the_pinball_loss_and_its_quantiles_never_cross():
    loss = Quantile(quantiles=[0.1, 0.5, 0.8])
    raw, target = torch.randn(50, 1, 3, dtype=torch.float64) * 2, torch.randn(50, 1, dtype=torch.float64)
    from cnnrun.tasks.regression.losses import increasing_quantiles

    quantiles = increasing_quantiles(raw)
    assert (quantiles.diff(dim=2) > 0).all()
    expected = np.mean(
        [
            sk.mean_pinball_loss(target[:, 0], quantiles[:, 0, place], alpha=part)
            for place, part in enumerate((0.1, 0.5, 0.8))
        ]
    )
    assert loss.loss_per_number(raw, target).mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [Mse(), Mae(), Huber(), Gaussian()], ids=lambda loss: loss.kind)
def test_perfect_outputs_have_the_least_loss_and_parts_average_to_the_batch(loss):
    task = Regress(angles=ANGLES, loss=loss)
    criterion, values = task.bind(FACTS).learning.build_criterion(), truth(12)
    targets = {"numbers": values}
    perfect = encode_values(task, values)
    (best,) = criterion(perfect, targets).values()
    for change in (-0.3, 0.3):
        (other,) = criterion(perfect + change, targets).values()
        assert other > best
    halves = [next(iter(criterion(perfect[i : i + 6], {"numbers": values[i : i + 6]}).values())) for i in (0, 6)]
    assert float(sum(halves) / 2) == pytest.approx(float(best), abs=1e-6)
    if loss.kind != "gaussian":
        assert float(best) == pytest.approx(0, abs=1e-6)


def test_angles_across_the_wrap_are_near_each_other():
    task = Regress(columns=["hour"], angles={"hour": 24})
    criterion = task.bind(FACTS).learning.build_criterion()
    values = torch.zeros(1, 4)
    late = encode_values(task, torch.tensor([[0, 0, 23.9, 0.0]]))
    values[0, 2] = 0.1
    (near,) = criterion(late, {"numbers": values}).values()
    values[0, 2] = 12.0
    (far,) = criterion(late, {"numbers": values}).values()
    assert float(near) < 0.01 < float(far)


# --- raw outputs <-> numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [[], ["length", "angle"], ["hour"], ["weight"], ["angle", "weight", "hour"]])
@pytest.mark.parametrize("loss", [Mse(), Gaussian()], ids=lambda loss: loss.kind)
def test_decoding_restores_the_order_and_units_of_the_data(columns, loss):
    names = columns or [number.name for number in FACTS.numbers]
    task = Regress(columns=columns, angles={k: v for k, v in ANGLES.items() if k in names}, loss=loss)
    values = truth(40)
    found = decode(task, encode_values(task, values))
    known = [number.name for number in FACTS.numbers]
    expected = values[:, [known.index(name) for name in names]]
    torch.testing.assert_close(found["values"], expected, rtol=1e-4, atol=1e-4)
    bound = task.bind(FACTS)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == bound.predicting.result_shapes()
    assert bound.learning.build_head([(16,)])(torch.zeros(2, 16)).shape[1] == encode_values(task, values).shape[1]


def test_deviations_have_the_targets_unit_and_scale_with_the_temperature():
    task = Regress(columns=["weight"], loss=Gaussian())
    raw = torch.tensor([[0.5, math.log(math.e - 1)]])  # softplus of it is 1
    found = decode(task, raw)
    assert found["values"].item() == pytest.approx(560)
    assert found["deviations"].item() == pytest.approx(120, rel=1e-4)
    warm = decode(task, raw, temperature=2.0)
    assert warm["deviations"].item() == pytest.approx(240, rel=1e-4)
    assert warm["values"].item() == pytest.approx(560)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_applies_to_numbers_and_angles(temperature):
    task, values = Regress(columns=["weight", "angle"], angles={"angle": 360.0}, loss=Gaussian()), truth(30)
    raw = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) * 2
    plain = normal_nll(raw[:, None, :2], (values[:, :1] - 500) / 120, temperature)
    turn = values[:, 1:2] / 360 * 2 * math.pi
    angle = von_mises_nll(raw[:, None, 2:], torch.stack([turn.cos(), turn.sin()], 2), temperature)
    expected = float(torch.cat([plain, angle], 1).double().mean())
    nll = task.bind(FACTS).calibration.negative_log_likelihood(raw, {"numbers": values}, temperature)
    assert nll == pytest.approx(expected, rel=1e-5)


def test_angles_are_decoded_into_the_range_of_the_data():
    task = Regress(columns=["angle", "hour"], angles=ANGLES)
    values = truth(200)
    values[:, 1] = torch.linspace(-179, 179, 200)
    found = decode(task, encode_values(task, values))["values"]
    assert (found[:, 0] >= -180).all()
    assert (found[:, 0] < 180.01).all()
    assert (found[:, 1] >= 0).all()
    assert (found[:, 1] < 24.01).all()


# --- metrics ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(2, 80), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_regression_metrics_equal_scikit_learns(seed, count, batch):
    task, draw = Regress(columns=["weight", "length"]), np.random.default_rng(seed)
    values = truth(count, seed)
    said = values[:, [0, 3]] * torch.tensor(draw.uniform(0.5, 1.5, (count, 2)), dtype=torch.float32)
    meter = task.bind(FACTS).measuring.build_meter(Choices())
    for part, of in zip(said.split(batch), values.split(batch), strict=True):
        meter.update({"values": part}, {"numbers": of})
    measured = meter.compute()
    true, given_ = values[:, [0, 3]].double().numpy(), said.double().numpy()
    assert measured.metrics["mae"] == pytest.approx(sk.mean_absolute_error(true, given_))
    assert measured.metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(true, given_))
    assert measured.metrics["r2"] == pytest.approx(sk.r2_score(true, given_))
    for row, column in zip(measured.tables["per_target"], (0, 1), strict=True):
        constant = np.full(count, (500.0, 0.02)[column])
        blind = sk.mean_absolute_error(true[:, column], constant)
        assert row["constant's mae"] == pytest.approx(blind)
        assert row["gain"] == pytest.approx(1 - sk.mean_absolute_error(true[:, column], given_[:, column]) / blind)
    assert {plot.title for plot in measured.plots} >= {"weight: predicted against true", "length: residuals"}


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_integer_weights_equal_repeated_samples(seed):
    draw = np.random.default_rng(seed)
    true, said = draw.normal(0, 10, (30, 2)), draw.normal(0, 10, (30, 2))
    times = draw.integers(0, 4, 30)
    times[0] += 1
    periods = [None, 7.0]
    weighted = Residuals(said, true, periods, [0.3, 0.0]).metrics(times.astype(float))
    again = Residuals(said.repeat(times, 0), true.repeat(times, 0), periods, [0.3, 0.0])
    # The constant of an angle is its circular mean over all images, drawn or not.
    repeated = again.metrics()
    for name in ("mae", "rmse", "r2"):
        assert weighted[name] == pytest.approx(repeated[name])


@given(st.floats(-1000, 1000), st.floats(-1000, 1000), st.floats(0.1, 400))
def test_a_wrapped_difference_is_the_shorter_one(one, other, period):
    found = float(wrap_difference(np.array([one - other]), period)[0])
    assert -period / 2 - 1e-9 <= found <= period / 2 + 1e-9
    turns = (one - other - found) / period
    assert turns == pytest.approx(round(turns), abs=1e-6)


def test_the_circular_mean_equals_scipys():
    from scipy.stats import circmean

    values = np.random.default_rng(0).normal(350, 20, 500) % 360
    assert circular_mean(values, 360) % 360 == pytest.approx(circmean(values, high=360, low=0))


def test_predicted_intervals_have_their_nominal_coverage():
    draw = np.random.default_rng(0)
    task = Regress(columns=["weight"], loss=Gaussian())
    meter, deviations = task.bind(FACTS).measuring.build_meter(Choices()), draw.uniform(5, 50, 20_000)
    values = np.full(20_000, 500.0)
    numbers = np.zeros((20_000, 4), np.float32)
    numbers[:, 0] = values + draw.normal(0, deviations)
    meter.update(
        {"values": torch.tensor(values)[:, None], "deviations": torch.tensor(deviations)[:, None]},
        {"numbers": torch.tensor(numbers)},
    )
    (row,) = meter.compute().tables["intervals_said"]
    assert row["inside 50%"] == pytest.approx(0.5, abs=0.012)
    assert row["inside 80%"] == pytest.approx(0.8, abs=0.012)
    assert row["inside 95%"] == pytest.approx(0.95, abs=0.006)


def test_r2_of_a_constant_target_gets_a_note():
    true = np.full((5, 1), 3.0)
    for said, r2 in ((3.0, 1.0), (4.0, 0.0)):
        residuals = Residuals(np.full((5, 1), said), true, [None], [2.0])
        (row,) = residuals.per_target_rows(["weight"])
        assert row["r2"] == residuals.metrics()["r2"] == r2
        assert row["note"] == "one value in all images: r2 means nothing"
    assert Residuals(true, np.arange(5.0)[:, None], [None], [2.0]).per_target_rows(["a"])[0]["note"] == ""


# --- what is refused --------------------------------------------------------------------------------------------------


def test_invalid_regression_settings_are_refused():
    with pytest.raises(ValidationError, match="not among columns"):
        Regress(columns=["weight"], angles={"angle": 360})
    with pytest.raises(ValidationError, match="quantile cannot learn angles"):
        Regress(angles={"angle": 360}, loss=Quantile())
    with pytest.raises(ValidationError, match="lists a number twice"):
        Regress(columns=["weight", "weight"])
    with pytest.raises(ValidationError, match=r"0\.5 among them"):
        Quantile(quantiles=[0.1, 0.9])
    with pytest.raises(ShapeError, match="linear layer needs a vector"):
        Regress().bind(FACTS).learning.build_head([(4, 2, 2)])


def test_targets_too_fine_for_float32_are_refused():
    late = replace(FACTS, numbers=(NumberStatistics("time", 1.7e9, 8.0, 1.7e9, 1.7e9 + 30),))
    words = r"time varies by 8 around 1\.7e\+09, too finely for float32; subtract the mean from it$"
    with pytest.raises(DataError, match=words):
        Regress().bind(late)


def test_angles_just_below_zero_decode_within_the_period():
    task = Regress(columns=["hour"], angles={"hour": 24})
    for below in (-1e-9, -0.0, 1e-9):
        assert 0 <= decode(task, torch.tensor([[1.0, below]]))["values"].item() < 24


def test_unknown_columns_and_constant_targets_are_refused_once_they_have_been_counted():
    still = replace(FACTS, numbers=(NumberStatistics("weight", 5.0, 0.0, 5.0, 5.0),))
    for spec, facts, error, words in (
        (Regress(columns=["wieght"]), FACTS, ConfigError, "there is no number 'wieght'.*did you mean 'weight'"),
        (Regress(angles={"turn": 360}), FACTS, ConfigError, "there is no number 'turn'"),
        (Regress(), still, DataError, "weight is 5 in every training image; there is nothing to learn$"),
    ):
        with pytest.raises(error, match=words):
            spec.bind(facts)
        assert spec.bind(replace(facts, counts={})).kind == "regress"
    assert Regress(angles=ANGLES).bind(FACTS).kind == "regress"


def test_artefact_disagreement_compares_angles_across_the_wrap():
    find_disagreement = Regress(angles=ANGLES).bind(FACTS).predicting.find_disagreement
    ours = {"values": torch.tensor([[500.0, 179.99, 23.999, 0.02]])}
    theirs = {"values": torch.tensor([[500.01, -179.99, 0.001, 0.02]])}
    assert find_disagreement(ours, theirs) is None
    off = {"values": torch.tensor([[500.0, 179.99, 23.999, 0.0201]])}
    assert "differ by up to 2.50e-02 standard deviations" in find_disagreement(ours, off)
    assert find_disagreement(ours, {"values": ours["values"] * math.nan})
