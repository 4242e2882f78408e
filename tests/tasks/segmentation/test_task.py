"""Segmentation: overlaps against scikit-learn, the loss against its formula, masks in original pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.results import View
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.image_files import image_from_pixels
from cnnrun.data.image_geometry import compute_view
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.mask_files import fit_mask
from cnnrun.tasks.intervals import confidence_intervals
from cnnrun.tasks.segmentation.network import SegmentationCriterion
from cnnrun.tasks.segmentation.overlaps import Overlaps, count_pixels
from cnnrun.tasks.segmentation.task import Segment, SegmentPrediction

NAMES = ("sky", "road", "car", "sign")
FACTS = DataFacts(NAMES, (3, 12, 16))
TASK = Segment().bind(FACTS)


def draw_masks(count: int, seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true masks; a fifth of the true pixels is ignored."""
    generator = torch.Generator().manual_seed(seed)
    predicted, true = (torch.randint(0, classes, (count, 12, 16), generator=generator).byte() for _ in range(2))
    true[torch.rand(true.shape, generator=generator) < 0.2] = IGNORED
    return predicted, true


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_overlaps_equal_those_of_scikit_learn(classes):
    """With fewer drawn classes than the task has, the others occur nowhere and do not count."""
    predicted, true = draw_masks(9, classes, classes)
    meter = TASK.measuring.build_meter(Choices())
    for part in torch.arange(9).split(4):
        meter.update({"mask": predicted[part]}, {"masks": true[part]})
    found = meter.compute()
    is_measured = (true != IGNORED).numpy()
    a, b = true.numpy()[is_measured], predicted.numpy()[is_measured]
    labels = list(range(classes))
    assert found.metrics["mean_iou"] == pytest.approx(jaccard_score(a, b, average="macro", labels=labels), rel=1e-12)
    assert found.metrics["mean_dice"] == pytest.approx(f1_score(a, b, average="macro", labels=labels), rel=1e-12)
    assert found.metrics["pixel_accuracy"] == pytest.approx(accuracy_score(a, b), rel=1e-12)
    rows = found.tables["per_class"]
    assert [row["iou"] for row in rows[:classes]] == pytest.approx(jaccard_score(a, b, average=None, labels=labels))
    assert [row["iou"] for row in rows[classes:]] == [None] * (4 - classes)
    assert np.array(found.matrices["confusion"]).sum() == is_measured.sum()
    assert np.trace(found.matrices["confusion"]) == (a == b).sum()


def test_mean_iou_equals_a_plain_loop_over_pixels():
    predicted, true = draw_masks(3, 7)
    ious = []
    for k in range(4):
        both = either = 0
        for p, t in zip(predicted.flatten().tolist(), true.flatten().tolist(), strict=True):
            if t != IGNORED:
                both += p == k and t == k
                either += p == k or t == k
        ious.append(both / either)
    counts, _ = count_pixels(predicted, true, 4)
    assert Overlaps(counts.numpy().astype(float)).metrics()["mean_iou"] == pytest.approx(sum(ious) / 4, rel=1e-12)


def test_weights_of_images_count_them_as_often():
    predicted, true = draw_masks(4, 5)
    counts, _ = count_pixels(predicted, true, 4)
    weighted = Overlaps(counts.numpy().astype(float)).metrics(np.array([2.0, 0.0, 1.0, 1.0]))
    repeated = Overlaps(counts[[0, 0, 2, 3]].numpy().astype(float)).metrics()
    assert weighted == pytest.approx(repeated, rel=1e-12)


def test_intervals_are_over_images_and_hold_the_metric():
    predicted, true = draw_masks(40, 6)
    predicted[:20] = torch.where(true[:20] == IGNORED, 0, true[:20])  # half of the images without a mistake
    meter = TASK.measuring.build_meter(Choices())
    for images in torch.arange(40).split(16):
        meter.update({"mask": predicted[images]}, {"masks": true[images]})
    measurement = meter.compute()
    draws = measurement.bootstrap_draws["mean_iou"]
    low, high = confidence_intervals(measurement.metrics, measurement.bootstrap_draws, measurement.correct)["mean_iou"]
    assert low < measurement.metrics["mean_iou"] < high
    assert np.std(draws) > 0.02


def test_the_confusion_matrix_counts_more_pixels_than_float32_can():
    mask = torch.zeros((1, 4097, 4099), dtype=torch.uint8)
    meter = TASK.measuring.build_meter(Choices())
    meter.update({"mask": mask}, {"masks": mask})
    assert meter.compute(tables=False).matrices["confusion"][0][0] == 4097 * 4099


def test_metrics_of_masks_to_ignore_alone_are_undefined():
    predicted, true = draw_masks(40, 7)
    true[:] = IGNORED
    meter = TASK.measuring.build_meter(Choices())
    meter.update({"mask": predicted}, {"masks": true})
    measurement = meter.compute()
    assert set(measurement.metrics) == set(TASK.spec.metrics())
    assert set(measurement.metrics.values()) == {None}
    assert not confidence_intervals(measurement.metrics, measurement.bootstrap_draws, measurement.correct)


@pytest.mark.parametrize("dice_weight", [0.0, 0.5])
def test_the_loss_equals_its_formula_in_float64(dice_weight):
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(3, 4, 12, 16, generator=generator, dtype=torch.float64)
    _, true = draw_masks(3, 8, classes=3)  # the last class is shown nowhere
    true[2] = IGNORED  # an image without pixels to learn
    entropies, dices = [], []
    for output, mask in zip(outputs, true, strict=True):
        probability, is_measured = output.softmax(0), mask != IGNORED
        pixels = [(y, x) for y, x in is_measured.nonzero().tolist()]
        entropies.append(-sum(probability[int(mask[y, x]), y, x].log() for y, x in pixels) / max(1, len(pixels)))
        losses = []
        for k in sorted({int(mask[y, x]) for y, x in pixels}):
            p, t = probability[k][is_measured], (mask[is_measured] == k).double()
            losses.append(1 - 2 * (p * t).sum() / (p.sum() + t.sum()))
        dices.append(sum(losses) / max(1, len(losses)))
    found = SegmentationCriterion(dice_weight)(outputs, {"masks": true})
    assert float(found["cross_entropy"]) == pytest.approx(float(sum(entropies)) / 3, rel=1e-12)
    assert float(found.get("dice", 0.0)) == pytest.approx(dice_weight * float(sum(dices)) / 3, rel=1e-12)
    assert ("dice" in found) == (dice_weight > 0)


def test_ignored_pixels_have_no_gradient():
    outputs = torch.randn(2, 4, 12, 16, requires_grad=True)
    _, true = draw_masks(2)
    sum(SegmentationCriterion(1.0)(outputs, {"masks": true}).values()).backward()
    is_ignored = (true == IGNORED)[:, None].expand_as(outputs)
    assert outputs.grad[is_ignored].abs().max() == 0
    assert outputs.grad[~is_ignored].abs().min() > 0


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_a_prediction_returns_to_the_pixels_of_its_image(fit):
    """A mask fitted to a network's input of three times its size comes back as it was, where the network saw it."""

    rng, settings = np.random.default_rng(0), ImageSettings(fit=fit)
    original = rng.integers(0, 4, (20, 30), dtype=np.uint8)
    size = (60, 90) if fit == "stretch" else (90, 90)
    fitted = fit_mask(image_from_pixels(original[:, :, None], 1, settings), size, settings)[:, :, 0]
    found = SegmentPrediction(fitted, compute_view((20, 30), size, settings), NAMES).class_map()
    assert found.shape == original.shape
    seen = found != IGNORED
    assert seen.mean() == (pytest.approx(20 / 30) if fit == "crop" else 1.0)
    assert (found[seen] == original[seen]).mean() > 0.99 if fit == "crop" else (found == original).all()


def test_words_json_and_csv_of_a_prediction():
    mask = np.zeros((12, 16), np.uint8)
    mask[:3] = 2
    made = SegmentPrediction(mask, View((24, 32), 0.5, 0.5), NAMES)
    assert made.to_text() == "sky 75%, car 25%"
    assert made.to_json() == {"height": 24, "width": 32, "shares": {"sky": 0.75, "car": 0.25}}
    assert dict(zip(made.csv_columns(), made.csv_rows()[0], strict=True)) == {
        "share sky": 0.75,
        "share road": 0.0,
        "share car": 0.25,
        "share sign": 0.0,
    }
    assert TASK.showing.describe_targets({"masks": torch.from_numpy(mask)[None]}) == ["sky 75%, car 25%"]


def test_parity_compares_clear_pixels_and_all_confidences():
    ours = {"mask": torch.zeros(1, 12, 16).byte(), "confidence": torch.full((1, 12, 16), 0.9)}
    find = TASK.predicting.find_disagreement
    assert find(ours, {**ours, "confidence": ours["confidence"] + 5e-5}) is None
    assert "confidences differ" in find(ours, {**ours, "confidence": ours["confidence"] + 1e-3})
    assert "confidences differ" in find(ours, {**ours, "confidence": ours["confidence"] * float("nan")})
    other = ours["mask"].clone()
    other[0, 3, 4] = 1
    assert "1 pixel has another class, although both" in find(ours, {**ours, "mask": other})
    doubtful = {"mask": ours["mask"], "confidence": torch.full((1, 12, 16), 0.4)}
    assert find(doubtful, {**doubtful, "mask": other}) is None
    other[0, :6] = 1  # more than rounding can change, even where no class has half of the probability
    assert find(doubtful, {**doubtful, "mask": other}) == "50.0% of an image's pixels have another class"
