from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import ShapeError
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.classification_metrics import ReliabilityBins

NAMES = ("ape", "bee", "cat", "dog", "elk", "fox")
FACTS = DataFacts(NAMES, (1, 8, 8), class_counts=(10, 20, 30, 40, 50, 60))


def outputs(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) * 2, torch.randint(0, 6, (count,), generator=generator)


@given(st.integers(0, 1000), st.integers(1, 120), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_classification_metrics_equal_scikit_learns(seed, count, batch):
    task = Classify(top_k=3)
    logits, labels = outputs(count, seed)
    meter = task.bind(FACTS).measuring.build_meter(Choices())
    for part, truth in zip(logits.split(batch), labels.split(batch), strict=True):
        meter.update(task.bind(FACTS).predicting.build_decoder(Choices())(part), {"labels": truth})
    measured = meter.compute()
    probability, predicted = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    truth, classes = labels.numpy(), list(range(6))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0
    )
    assert measured.metrics["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-6)
    top = sk.top_k_accuracy_score(truth, probability, k=3, labels=classes)
    assert measured.metrics["top_3"] == pytest.approx(top, abs=1e-6)
    for name, column in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        assert [row[name] for row in measured.tables["per_class"]] == pytest.approx(column.tolist())
    for name, column in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert measured.metrics[name] == pytest.approx(column.mean())
    assert measured.matrices["confusion"] == sk.confusion_matrix(truth, predicted, labels=classes).tolist()


def test_calibration_error_equals_the_definition():
    task = Classify()
    logits, labels = outputs(500)
    meter = task.bind(FACTS).measuring.build_meter(Choices())
    meter.update(task.bind(FACTS).predicting.build_decoder(Choices())(logits), {"labels": labels})
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            hit = (predicted == labels)[inside].double().mean()
            expected += float(inside.double().mean() * (hit - confidence[inside].double().mean()).abs())
    assert meter.compute().metrics["ece"] == pytest.approx(expected, abs=1e-6)


def test_a_probability_on_a_bin_edge_belongs_to_the_lower_bin():
    """Guo et al. 2017: bin m is ((m - 1) / M, m / M]."""
    edges, hits = np.arange(1, 16) / 15, np.arange(15) % 3 == 0
    found = ReliabilityBins(edges, hits)
    assert [row["to"] for row in found.reliability_rows()] == edges.tolist()
    between = ReliabilityBins(edges - 1 / 30, hits)  # in the middle of the same bins
    assert [row["accuracy"] for row in found.reliability_rows()] == [
        row["accuracy"] for row in between.reliability_rows()
    ]
    together = ReliabilityBins(np.r_[edges, edges - 1 / 30], np.r_[hits, ~hits])  # one right and one wrong in each
    assert together.calibration_error() == pytest.approx(np.abs(0.5 - (edges - 1 / 60)).mean())
    assert ReliabilityBins(np.zeros(1), np.zeros(1, bool)).reliability_rows()[0]["from"] == 0


def test_micro_batches_have_the_whole_batchs_weighted_loss():
    criterion = Classify(class_weights="balanced").bind(FACTS).learning.build_criterion().double()
    logits, labels = outputs(60)
    whole = criterion(logits.double(), {"labels": labels})["cross_entropy"]
    parts = [
        criterion(a.double(), {"labels": b})["cross_entropy"] * len(b) / 60
        for a, b in zip(logits.split(25), labels.split(25), strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


def test_the_head_maps_vectors_and_refuses_feature_maps():
    assert Classify().bind(FACTS).learning.build_head([(7,)])(torch.zeros(2, 7)).shape == (2, 6)
    with pytest.raises(ShapeError, match="add `flatten` or `global_avg_pool`"):
        Classify().bind(FACTS).learning.build_head([(7, 2, 2)])


def test_class_maps_are_clamped_at_0_before_their_mean():
    head, x = Classify(classifier="conv").bind(FACTS).learning.build_head([(7, 4, 5)]), torch.randn(3, 7, 4, 5)
    maps = torch.einsum("bchw,kc->bkhw", x, head.conv.weight[:, :, 0, 0]) + head.conv.bias[:, None, None]
    assert (maps < 0).any()
    torch.testing.assert_close(head(x), maps.clamp(min=0).sum((2, 3)) / 20)


@pytest.mark.parametrize(
    ("task", "facts", "words"),
    [
        (Classify(), DataFacts(("one",), (1, 8, 8)), "two or more classes"),
        (Classify(class_weights=[1.0]), FACTS, "1 numbers; the data has 6"),
        (Classify(class_weights="balanced"), DataFacts(("a", "b"), (1, 8, 8), class_counts=(3, 0)), "'b' has none"),
    ],
)
def test_unsuitable_data_is_reported(task, facts, words):
    assert words in task.data_problem(facts)
    assert Classify().data_problem(FACTS) is None


def test_result_rows_name_the_most_probable_classes():
    logits = torch.tensor([[0.0, 3.0, 1.0, -1.0, 0.5, 0.2]])
    (row,) = [
        made.to_json()
        for made in predict_rows(
            Classify(top_k=2).bind(FACTS), Classify().bind(FACTS).predicting.build_decoder(Choices())(logits), []
        )
    ]
    assert row["label"] == "bee"
    assert [entry["label"] for entry in row["top"]] == ["bee", "cat"]
    assert row["probability"] == pytest.approx(float(logits.softmax(1).max()))


def test_disagreements_between_outputs_are_found():
    task = Classify()
    ours = task.bind(FACTS).predicting.build_decoder(Choices())(outputs(20)[0])
    assert task.bind(FACTS).predicting.find_disagreement(ours, {"probabilities": ours["probabilities"] + 5e-5}) is None
    assert "differ by up to" in task.bind(FACTS).predicting.find_disagreement(
        ours, {"probabilities": ours["probabilities"] + 1e-3}
    )
    assert "differ by up to" in task.bind(FACTS).predicting.find_disagreement(
        ours, {"probabilities": ours["probabilities"] * float("nan")}
    )


def test_every_metric_is_declared_and_measured():
    task = Classify()
    meter = task.bind(FACTS).measuring.build_meter(Choices())
    logits, labels = outputs(20)
    meter.update(task.bind(FACTS).predicting.build_decoder(Choices())(logits), {"labels": labels})
    assert set(meter.compute().metrics) == set(task.metrics())
    assert {
        name: values.shape[1:] for name, values in task.bind(FACTS).predicting.build_decoder(Choices())(logits).items()
    } == task.bind(FACTS).predicting.result_shapes()
