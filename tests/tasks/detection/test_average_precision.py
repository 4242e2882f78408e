"""COCO metrics equal those of pycocotools on the same boxes."""

from __future__ import annotations

import contextlib
import io
import itertools

import numpy as np
import pytest
import torch

from cnnrun.tasks.detection.average_precision import (
    AveragePrecision,
    coco_metrics,
    per_class_rows,
    precision_recall_rows,
    undefined_coco_metrics,
)

NAMES = ("ape", "bee", "cat")


def case(seed: int, pictures: int = 6, true: int = 12, found: int = 30):
    """Results and targets as a decoder and the data give them: boxes near true ones, some with wrong labels."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 400, (pictures, true, 2))
    sides = np.exp(rng.uniform(np.log(5), np.log(250), (pictures, true, 2)))
    boxes = np.concatenate([corner, corner + sides], 2)
    objects = np.where(rng.random((pictures, true)) < 0.2, -1, rng.integers(0, 3, (pictures, true)))
    roles = np.where(rng.random((pictures, true)) < 0.1, 2, 0)
    source = rng.integers(0, true, (pictures, found))
    near = np.take_along_axis(boxes, source[..., None], 1) + rng.normal(0, 6, (pictures, found, 4))
    near = np.concatenate([near[..., :2].clip(0), np.maximum(near[..., 2:], near[..., :2].clip(0) + 1)], 2)
    labels = np.where(
        rng.random((pictures, found)) < 0.15,
        rng.integers(0, 3, (pictures, found)),
        np.take_along_axis(objects, source, 1),
    )
    scores = np.where(labels >= 0, np.round(rng.random((pictures, found)), 2), 0.0)  # with equal scores among them
    targets = {
        "boxes": boxes, "objects": objects, "roles": roles, "areas": (boxes[..., 2:] - boxes[..., :2]).prod(2),
        "view": np.tile([1.0, 1.0, 0.0, 0.0, 1e6, 1e6], (pictures, 1)),
    }  # fmt: skip
    results = {"boxes": near, "scores": scores, "labels": labels}
    return [{name: torch.from_numpy(value) for name, value in each.items()} for each in (results, targets)]


def theirs(results, targets):
    """pycocotools' evaluation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    truth, found = [], []
    for image in range(len(targets["objects"])):
        rows = zip(*(targets[name][image].tolist() for name in ("boxes", "objects", "roles", "areas")), strict=True)
        for box, label, role, area in rows:
            if label >= 0:
                about = {"image_id": image + 1, "category_id": label + 1, "bbox": xywh(box), "area": area}
                truth.append(about | {"id": len(truth) + 1, "iscrowd": int(role == 2)})
        rows = zip(*(results[name][image].tolist() for name in ("boxes", "scores", "labels")), strict=True)
        for box, score, label in rows:
            if label >= 0:
                found.append({"image_id": image + 1, "category_id": label + 1, "bbox": xywh(box), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        images = [{"id": image + 1} for image in range(len(targets["objects"]))]
        categories = [{"id": k, "name": name} for k, name in enumerate(NAMES, 1)]
        coco = COCO()
        coco.dataset = {"images": images, "annotations": truth, "categories": categories}
        coco.createIndex()
        empty = COCO()
        empty.dataset = {"images": images, "annotations": [], "categories": categories}
        empty.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found) if found else empty, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def ours(results, targets, batch=4):
    meter = AveragePrecision(NAMES)
    for part in torch.arange(len(targets["objects"])).split(batch):
        meter.add(*({name: value[part] for name, value in each.items()} for each in (results, targets)))
    return meter


def same(results, targets):
    expected, meter = theirs(results, targets), ours(results, targets)
    done = meter.evaluate()
    stats = [
        -1.0 if value is None else value for value in coco_metrics(done).values()
    ]  # COCO's value for an undefined metric
    assert stats == pytest.approx(expected.stats.tolist(), abs=1e-9)
    assert set(undefined_coco_metrics(targets)) == {name for name, value in coco_metrics(done).items() if value is None}
    assert np.abs(done.eval["precision"] - expected.eval["precision"]).max() <= 1e-9
    return expected, meter, done


@pytest.mark.parametrize("seed", range(50))
def test_metrics_equal_pycocotools(seed):
    same(*case(seed, pictures=3 + seed % 5, true=1 + seed % 17, found=1 + 3 * (seed % 11)))


def test_metrics_without_detections_or_without_objects_equal_pycocotools():
    results, targets = case(1)
    nothing = {**results, "scores": results["scores"] * 0, "labels": results["labels"] * 0 - 1}
    same(nothing, targets)
    assert coco_metrics(ours(nothing, targets).evaluate())["AP"] == 0
    empty = {**targets, "objects": targets["objects"] * 0 - 1}
    same(results, empty)
    assert set(coco_metrics(ours(results, empty).evaluate()).values()) == {None}  # there is nothing to find
    assert precision_recall_rows(ours(results, empty).evaluate(), NAMES) == []
    assert [row["AP"] for row in per_class_rows(ours(results, empty).evaluate(), NAMES, [0, 0, 0])] == [None] * 3
    same(nothing, empty)


def test_crowds_and_object_sizes_equal_pycocotools():
    results, targets = case(2)
    same(results, {**targets, "roles": torch.full_like(targets["roles"], 2)})
    for size in (10.0, 50.0, 200.0):
        boxes = torch.cat([targets["boxes"][..., :2], targets["boxes"][..., :2] + size], 2)
        same(results, {**targets, "boxes": boxes, "areas": torch.full_like(targets["areas"], size * size)})
    # COCO's sizes go by the area that the annotation gives, not by the box.
    same(results, {**targets, "areas": targets["areas"] / 3})


def test_difficult_objects_count_neither_as_missed_nor_as_false_positives():
    _results, targets = case(3)
    hard = targets["boxes"][:1, :1]
    one = {
        "boxes": torch.cat([hard, hard + 300], 1), "objects": torch.tensor([[0, 0]]), "roles": torch.tensor([[1, 0]]),
        "areas": torch.tensor([[100.0, 100.0]]), "view": targets["view"][:1],
    }  # fmt: skip
    found = {"boxes": one["boxes"], "scores": torch.tensor([[0.9, 0.8]]), "labels": torch.tensor([[0, 0]])}
    assert coco_metrics(ours(found, one).evaluate())["AP"] == pytest.approx(1.0)
    missed = {**found, "labels": torch.tensor([[-1, 0]])}
    assert coco_metrics(ours(missed, one).evaluate())["AP"] == pytest.approx(1.0)
    as_object = {**one, "roles": torch.tensor([[0, 0]])}
    assert coco_metrics(ours(missed, as_object).evaluate())["AP"] < 0.6


@pytest.mark.parametrize(("role", "wrong"), [(1, True), (2, False)])
def test_a_box_on_part_of_a_difficult_object_is_wrong_and_of_a_crowd_is_ignored(role, wrong):
    """A box anywhere inside a crowd is ignored; a difficult object must be overlapped by half."""
    true = {
        "boxes": torch.tensor([[[0.0, 0, 100, 100], [300, 300, 350, 350]]]), "objects": torch.tensor([[0, 0]]),
        "roles": torch.tensor([[role, 0]]), "areas": torch.tensor([[1e4, 2500.0]]),
        "view": torch.tensor([[1.0, 1.0, 0.0, 0.0, 1e6, 1e6]]),
    }  # fmt: skip
    part, whole = torch.tensor([10.0, 10, 40, 40]), torch.tensor([300.0, 300, 350, 350])
    found = {
        "boxes": torch.stack([part, whole])[None], "scores": torch.tensor([[0.9, 0.8]]),
        "labels": torch.tensor([[0, 0]]),
    }  # fmt: skip
    background = {**true, "objects": torch.tensor([[-1, 0]])}
    ap = coco_metrics(ours(found, true).evaluate())["AP"]
    assert (ap == coco_metrics(ours(found, background).evaluate())["AP"]) is wrong
    assert ap == pytest.approx(0.5 if wrong else 1.0)


def test_metrics_are_measured_in_the_original_images_pixels():
    results, targets = case(4)
    view = torch.tensor([0.5, 0.25, 7.0, -3.0, 1e6, 1e6]).double().repeat(len(targets["view"]), 1)
    scale, offset = view[:, None, :2].repeat(1, 1, 2), view[:, None, 2:4].repeat(1, 1, 2)
    seen = {**targets, "boxes": targets["boxes"] * scale + offset, "view": view}
    moved = {**results, "boxes": results["boxes"] * scale + offset}
    assert coco_metrics(ours(moved, seen).evaluate()) == pytest.approx(
        coco_metrics(ours(results, targets).evaluate()), abs=1e-9
    )


def test_per_class_tables_equal_pycocotools_arrays():
    expected, meter, done = same(*case(5))
    rows = per_class_rows(done, NAMES, meter.object_counts())
    for k, row in enumerate(rows):
        known = expected.eval["precision"][:, :, k, 0, -1]
        assert row["AP"] == pytest.approx(known[known > -1].mean(), abs=1e-9)
        assert row["AP50"] == pytest.approx(expected.eval["precision"][0, :, k, 0, -1].mean(), abs=1e-9)
        assert row["AR100"] == pytest.approx(expected.eval["recall"][:, k, 0, -1].mean(), abs=1e-9)
    known = [row["AP"] for row in rows if row["AP"] >= 0]
    assert sum(known) / len(known) == pytest.approx(coco_metrics(done)["AP"], abs=1e-9)
    objects = case(5)[1]
    real = objects["objects"][(objects["objects"] >= 0) & (objects["roles"] == 0)]
    assert [row["objects"] for row in rows] == torch.bincount(real, minlength=3).tolist()
    curve = [row for row in precision_recall_rows(done, NAMES) if row["class"] == "bee"]
    assert len(curve) == 101
    assert all(a["precision"] >= b["precision"] for a, b in itertools.pairwise(curve))


def test_a_bootstrap_draw_equals_measuring_the_drawn_images():
    """The bootstrap reuses the matches; an image drawn twice counts like two files."""
    from cnnrun.tasks.detection.average_precision import _accumulate_matches
    from cnnrun.tasks.intervals import bootstrap_weights

    results, targets = case(3, pictures=9)
    meter = AveragePrecision(NAMES)
    meter.add(results, targets)
    done = meter.evaluate()
    before, matched = coco_metrics(done), list(done._evalImgs_cpp)
    found = meter.bootstrap_metrics(done)
    for place, times in zip(range(5), bootstrap_weights(9, 5), strict=True):
        drawn = np.repeat(np.arange(9), times.astype(int))
        again = AveragePrecision(NAMES)
        again.add(*({name: value[drawn] for name, value in each.items()} for each in (results, targets)))
        expected = coco_metrics(again.evaluate())
        assert {name: values[place] for name, values in found.items()} == pytest.approx(expected)
    assert coco_metrics(done) == before  # the evaluation itself is unchanged
    assert _accumulate_matches(done, matched) == before
