from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torchvision.ops import sigmoid_focal_loss

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.results import View
from cnnrun.tasks.classification_metrics import MultilabelPredictions
from cnnrun.tasks.multilabel import Multilabel
from cnnrun.tasks.multilabel_losses import Asymmetric, Bce, Focal

NAMES = ("ape", "bee", "cat", "dog")
FACTS = DataFacts(NAMES, (1, 8, 8), class_counts=(10, 20, 30, 40), counts={"train": 50})
TASK = Multilabel().bind(FACTS)


def outputs(count: int, seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    present = torch.rand(count, classes, generator=draw) < 0.4
    present[0] = True
    logits = torch.randn(count, classes, generator=draw) * 2 + present
    return (logits * 4).round() / 4, present  # some scores are equal


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_multilabel_losses_equal_their_formulas(seed):
    logit, present = (each.double() for each in outputs(20, seed))
    weight = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logit, present, pos_weight=weight, reduction="none")
    torch.testing.assert_close(Bce().loss_per_label(logit, present, weight), expected)
    torch.testing.assert_close(
        Focal(gamma=1.7).loss_per_label(logit, present, None), sigmoid_focal_loss(logit, present, alpha=-1, gamma=1.7)
    )
    torch.testing.assert_close(Focal(gamma=0).loss_per_label(logit, present, weight), expected)
    # Ridnik et al. 2021, eqs. 4 to 7, as they stand.
    p = logit.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    loss = -torch.where(present > 0, (1 - p) ** 1.0 * p.log(), shifted**4.0 * (1 - shifted).log())
    torch.testing.assert_close(Asymmetric(positive=1.0).loss_per_label(logit, present, None), loss)
    plain = Asymmetric(positive=0, negative=0, margin=0).loss_per_label(logit, present, None)
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(logit, present, reduction="none"))


@pytest.mark.parametrize(
    "loss",
    [Bce(), Focal(), Focal(gamma=0.5), Asymmetric(), Asymmetric(margin=0), Asymmetric(positive=0.5, negative=0.5),
     Asymmetric(margin=1e-9)],
)  # fmt: skip
def test_losses_and_gradients_are_finite_for_any_output(loss):
    logit = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]] * 2, requires_grad=True)
    present = torch.tensor([[1.0] * 5, [0.0] * 5])
    made = loss.loss_per_label(logit, present, None)
    made.sum().backward()
    assert made.isfinite().all()
    assert logit.grad.isfinite().all()


@given(st.integers(0, 10_000), st.integers(2, 90), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_multilabel_metrics_equal_scikit_learns(seed, count, batch):
    logit, present = outputs(count, seed)
    thresholds = {name: 0.3 + 0.1 * k for k, name in enumerate(NAMES)}
    choices = Choices(class_thresholds=thresholds)
    meter, decoder = TASK.measuring.build_meter(choices), TASK.predicting.build_decoder(choices)
    parts = [decoder(part) for part in logit.split(batch)]  # rounding may separate equal scores
    for part, truth in zip(parts, present.split(batch), strict=True):
        meter.update(part, {"present": truth})
    measured = meter.compute()
    score, truth = torch.cat([part["probabilities"] for part in parts]).double().numpy(), present.numpy()
    said = score >= np.array(list(thresholds.values()))
    assert measured.metrics["mAP"] == pytest.approx(sk.average_precision_score(truth, score, average="macro"))
    assert measured.metrics["f1"] == pytest.approx(sk.f1_score(truth, said, average="macro", zero_division=0))
    assert measured.metrics["micro_f1"] == pytest.approx(sk.f1_score(truth, said, average="micro", zero_division=0))
    assert measured.metrics["exact"] == pytest.approx(sk.accuracy_score(truth, said))
    for k, row in enumerate(measured.tables["per_class"]):
        assert row["AP"] == pytest.approx(sk.average_precision_score(truth[:, k], score[:, k]))
        assert row["prevalence"] == pytest.approx(truth[:, k].mean())


def test_a_class_without_positives_is_left_out_of_the_means():
    score, present = np.random.default_rng(0).random((30, 3)), np.zeros((30, 3), bool)
    present[::3, 0] = present[::2, 1] = True
    predictions = MultilabelPredictions(score, present, np.full(3, 0.5))
    numbers = predictions.metrics()
    assert numbers["mAP"] == pytest.approx(sk.average_precision_score(present[:, :2], score[:, :2]))
    assert numbers["f1"] == pytest.approx(sk.f1_score(present[:, :2], score[:, :2] >= 0.5, average="macro"))
    rows = predictions.per_class_rows(("a", "b", "c"), np.full(3, 0.5))
    assert [row["AP"] is None for row in rows] == [False, False, True]


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_chosen_thresholds_maximise_f1(seed, count):
    logit, present = outputs(count, seed)
    score, truth = logit.sigmoid().double().numpy(), present.numpy()
    found = MultilabelPredictions(score, truth, np.full(4, 0.5)).best_thresholds()
    for k, threshold in enumerate(found):
        tried = [0.0, *np.unique(score[:, k])]
        best = max(sk.f1_score(truth[:, k], score[:, k] >= each, zero_division=0) for each in tried)
        assert sk.f1_score(truth[:, k], score[:, k] >= threshold, zero_division=0) == pytest.approx(best)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_integer_weights_equal_repeated_samples(seed):
    logit, present = outputs(25, seed)
    score, truth = logit.sigmoid().double().numpy(), present.numpy()
    times = np.random.default_rng(seed).integers(0, 4, 25)
    times[0] += 1
    weighted = MultilabelPredictions(score, truth, np.full(4, 0.5)).metrics(times.astype(float))
    again = MultilabelPredictions(score.repeat(times, 0), truth.repeat(times, 0), np.full(4, 0.5)).metrics()
    assert weighted == pytest.approx(again)


def test_balanced_weights_give_presence_and_absence_equal_weight():
    criterion = Multilabel(positive_weights="balanced").bind(FACTS).learning.build_criterion()
    assert criterion.weight.tolist() == pytest.approx([4.0, 1.5, 2 / 3, 0.25])
    uncounted = Multilabel(positive_weights="balanced").bind(DataFacts(NAMES, (1, 8, 8)))
    assert uncounted.learning.build_criterion().weight is None
    with pytest.raises(DataError, match="'bee' has none"):
        Multilabel(positive_weights="balanced").bind(replace(FACTS, class_counts=(10, 0, 3, 4)))
    with pytest.raises(ConfigError, match="has 2 numbers; the data has 4"):
        Multilabel(positive_weights=[1.0, 2.0]).bind(FACTS)


def predict(choices: Choices) -> dict[str, Any]:
    """Predict one image, whose raw outputs are 0, 1, -1 and 3, with these choices."""
    predicting = TASK.predicting
    results = predicting.build_decoder(choices)(torch.tensor([[0.0, 1.0, -1.0, 3.0]]))
    (prediction,) = predicting.predictions(results, [View((8, 8))], predicting.thresholds(choices))
    return prediction.to_json()


def test_predictions_use_the_thresholds_chosen_on_val():
    assert predict(Choices())["labels"] == ["ape", "bee", "dog"]
    choices = Choices(2.0, {"bee": 0.9, "cat": 0.2})
    row = predict(choices)
    assert row["labels"] == ["ape", "cat", "dog"]
    assert row["probabilities"]["dog"] == pytest.approx(1 / (1 + np.exp(-1.5)))
    assert TASK.predicting.metadata(choices)["thresholds"] == {"ape": 0.5, "bee": 0.9, "cat": 0.2, "dog": 0.5}


def test_mixed_images_have_fractional_labels():
    task, parts = Multilabel().bind(DataFacts(("ape", "bee"), (1, 8, 8))), torch.tensor([0.25, 1.0])
    mine, others = torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0, 1], [0, 1]]).bool()
    made = task.learning.mix_targets({"present": mine}, {"present": others}, parts)["present"]
    assert made.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    describe_targets = task.showing.describe_targets
    assert describe_targets({"present": made}) == ["ape 0.25, bee 0.75", "ape"]
    assert describe_targets({"present": torch.zeros(1, 2, dtype=torch.bool)}) == ["none"]
