from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import ShapeError
from cnnrun.contracts.results import View
from cnnrun.tasks.classification import Classify
from cnnrun.tasks.classification_metrics import ReliabilityBins

NAMES = ("ape", "bee", "cat", "dog", "elk", "fox")
FACTS = DataFacts(NAMES, (1, 8, 8), class_counts=(10, 20, 30, 40, 50, 60), counts={"train": 210})
TASK = Classify().bind(FACTS)


def decode(logits):
    return TASK.predicting.build_decoder(Choices())(logits)


def outputs(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) * 2, torch.randint(0, 6, (count,), generator=generator)


@given(st.integers(0, 1000), st.integers(1, 120), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_classification_metrics_equal_scikit_learns(seed, count, batch):
    logits, labels = outputs(count, seed)
    meter = Classify(top_k=3).bind(FACTS).measuring.build_meter(Choices())
    for part, truth in zip(logits.split(batch), labels.split(batch), strict=True):
        meter.update(decode(part), {"labels": truth})
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
    logits, labels = outputs(500)
    meter = TASK.measuring.build_meter(Choices())
    meter.update(decode(logits), {"labels": labels})
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
    assert TASK.learning.build_head([(7,)])(torch.zeros(2, 7)).shape == (2, 6)
    with pytest.raises(ShapeError, match="add `flatten` or `global_avg_pool`"):
        TASK.learning.build_head([(7, 2, 2)])


def test_class_maps_are_clamped_at_0_before_their_mean():
    head, x = Classify(classifier="conv").bind(FACTS).learning.build_head([(7, 4, 5)]), torch.randn(3, 7, 4, 5)
    maps = torch.einsum("bchw,kc->bkhw", x, head.conv.weight[:, :, 0, 0]) + head.conv.bias[:, None, None]
    assert (maps < 0).any()
    torch.testing.assert_close(head(x), maps.clamp(min=0).sum((2, 3)) / 20)


@pytest.mark.parametrize(
    ("spec", "change", "error", "words"),
    [
        (Classify(), {"classes": ("one",)}, DataError, "two or more classes; the data has 1"),
        (Classify(class_weights=[1.0]), {}, ConfigError, "1 numbers; the data has 6"),
        (Classify(class_weights="balanced"), {"class_counts": (3, 0, 1, 1, 1, 1)}, DataError, "'bee' has none"),
    ],
)
def test_unsuitable_data_is_refused_once_it_has_been_counted(spec, change, error, words):
    facts = replace(FACTS, **change)
    with pytest.raises(error, match=words):
        spec.bind(facts)
    assert spec.bind(replace(facts, counts={})).facts.classes == facts.classes


def test_predictions_name_the_most_probable_classes():
    logits = torch.tensor([[0.0, 3.0, 1.0, -1.0, 0.5, 0.2]])
    (prediction,) = Classify(top_k=2).bind(FACTS).predicting.predictions(decode(logits), [View((8, 8))], {})
    row = prediction.to_json()
    assert row["label"] == "bee"
    assert [entry["label"] for entry in row["top"]] == ["bee", "cat"]
    assert row["probability"] == pytest.approx(float(logits.softmax(1).max()))
    assert prediction.csv_columns() == ["label", "probability", "label 2", "probability 2"]
    assert prediction.csv_rows() == [["bee", row["probability"], "cat", row["top"][1]["probability"]]]
    assert prediction.to_text() == f"bee {row['probability']:.3f}  cat {row['top'][1]['probability']:.3f}"


def test_disagreements_between_outputs_are_found():
    ours, find_disagreement = decode(outputs(20)[0]), TASK.predicting.find_disagreement
    assert find_disagreement(ours, {"probabilities": ours["probabilities"] + 5e-5}) is None
    assert "differ by up to" in find_disagreement(ours, {"probabilities": ours["probabilities"] + 1e-3})
    assert "differ by up to" in find_disagreement(ours, {"probabilities": ours["probabilities"] * float("nan")})


def test_every_metric_is_declared_and_measured():
    meter = TASK.measuring.build_meter(Choices())
    logits, labels = outputs(20)
    meter.update(decode(logits), {"labels": labels})
    assert set(meter.compute().metrics) == set(TASK.spec.metrics())
    assert {name: values.shape[1:] for name, values in decode(logits).items()} == TASK.predicting.result_shapes()
