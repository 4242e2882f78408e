from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torchvision.ops import sigmoid_focal_loss

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.tasks.classification_metrics import MultilabelPredictions
from cnnrun.tasks.multilabel import Asymmetric, Bce, Focal, Multilabel

NAMES = ("ape", "bee", "cat", "dog")
FACTS = DataFacts(NAMES, (1, 8, 8), class_counts=(10, 20, 30, 40), counts={"train": 50})


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
    chosen = {f"threshold of {name}": 0.3 + 0.1 * k for k, name in enumerate(NAMES)}
    task, facts = Multilabel(), replace(FACTS, chosen=chosen)
    meter = task.bind(facts).measuring.build_meter(Choices())
    parts = [
        task.bind(facts).predicting.build_decoder(Choices())(part) for part in logit.split(batch)
    ]  # rounding may separate equal scores
    for part, truth in zip(parts, present.split(batch), strict=True):
        meter.update(part, {"present": truth})
    measured = meter.compute()
    score, truth = torch.cat([part["probabilities"] for part in parts]).double().numpy(), present.numpy()
    said = score >= np.array(list(chosen.values()))
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
    assert (
        Multilabel(positive_weights="balanced").bind(DataFacts(NAMES, (1, 8, 8))).learning.build_criterion().weight
        is None
    )  # not counted yet
    missing = replace(FACTS, class_counts=(10, 0, 3, 4))
    assert "'bee' has none" in Multilabel(positive_weights="balanced").data_problem(missing)
    assert "has 2 numbers; the data has 4" in Multilabel(positive_weights=[1.0, 2.0]).data_problem(FACTS)


def test_result_rows_use_the_thresholds_chosen_on_val():
    task = Multilabel()
    logit = torch.tensor([[0.0, 1.0, -1.0, 3.0]])
    rows = [
        made.to_json()
        for made in predict_rows(task.bind(FACTS), task.bind(FACTS).predicting.build_decoder(Choices())(logit), [])
    ]
    assert rows[0]["labels"] == ["ape", "bee", "dog"]
    chosen = replace(FACTS, chosen={"threshold of bee": 0.9, "threshold of cat": 0.2, "temperature": 2.0})
    (row,) = [made.to_json() for made in predict_rows(task.bind(chosen), task.decoder(chosen)(logit), [])]
    assert row["labels"] == ["ape", "cat", "dog"]
    assert row["probabilities"]["dog"] == pytest.approx(1 / (1 + np.exp(-1.5)))
    assert task.metadata(chosen)["thresholds"] == {"ape": 0.5, "bee": 0.9, "cat": 0.2, "dog": 0.5}


def test_mixed_images_have_fractional_labels():
    task, parts = Multilabel(), torch.tensor([0.25, 1.0])
    mine, others = torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0, 1], [0, 1]]).bool()
    made = task.bind(FACTS).learning.mix_targets({"present": mine}, {"present": others}, parts)["present"]
    assert made.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    two = DataFacts(("ape", "bee"), (1, 8, 8))
    assert task.describe_targets({"present": made}, two) == ["ape 0.25, bee 0.75", "ape"]
    assert task.describe_targets({"present": torch.zeros(1, 2, dtype=torch.bool)}, two) == ["none"]
