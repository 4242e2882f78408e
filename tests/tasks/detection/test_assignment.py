"""The assignment equals a plain loop over objects and cells in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.tasks.detection import assignment
from cnnrun.tasks.detection.assignment import AssignmentSettings, Objects, assign_cells
from cnnrun.tasks.detection.criterion import quality_focal_loss

TOP_K, ALPHA, BETA = 5, 1.0, 6.0
SETTINGS = AssignmentSettings(TOP_K, ALPHA, BETA)


def cells(strides=(8, 16), side=64):
    rows = []
    for stride in strides:
        place = (torch.arange(side // stride) + 0.5) * stride
        y, x = torch.meshgrid(place, place, indexing="ij")
        rows.append(torch.stack([x.flatten(), y.flatten(), torch.full_like(x.flatten(), stride)], 1))
    return torch.cat(rows)


def case(seed, pictures=2, objects=6, classes=3):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    place = cells().double().repeat(pictures, 1, 1)
    sides = place[..., 2:] * (0.3 + 2 * rand(*place.shape[:2], 4))
    boxes = torch.cat([place[..., :2] - sides[..., :2], place[..., :2] + sides[..., 2:]], 2)
    scores = rand(pictures, place.shape[1], classes)
    corner = rand(pictures, objects, 2) * 50
    true = torch.cat([corner, corner + 2 + 25 * rand(pictures, objects, 2)], 2)
    labels = torch.randint(-1, classes, (pictures, objects), generator=generator)
    vague = (rand(pictures, objects) < 0.2) & (labels >= 0)
    return scores, boxes, place, Objects(true, labels, (labels >= 0) & ~vague, vague)


def iou(one, other):
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    both = max(wide, 0) * max(tall, 0)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both
    return both / area


def by_hand(scores, boxes, place, true, labels, real):
    """(object, quality) of each assigned cell, by a plain loop."""
    wants = {}
    for m in np.flatnonzero(real):
        x1, y1, x2, y2 = true[m]
        inside = []
        for a, (x, y, stride) in enumerate(place):
            wide, tall = max(x2 - x1, stride), max(y2 - y1, stride)
            if abs(2 * x - x1 - x2) < wide and abs(2 * y - y1 - y2) < tall:
                overlap = iou(true[m], boxes[a])
                inside.append((scores[a, labels[m]] ** ALPHA * overlap**BETA, overlap, a))
        inside.sort(key=lambda each: -each[0])
        for align, overlap, a in inside[:TOP_K]:
            wants.setdefault(a, []).append((overlap, m, align))
    owned = {a: max(each, key=lambda want: want[0]) for a, each in wants.items()}
    made = {}
    for a, (_, m, align) in owned.items():
        mine = [each for each in owned.values() if each[1] == m]
        most, best = max(each[2] for each in mine), max(each[0] for each in mine)
        made[a] = (m, align * best / max(most, 1e-9))
    return made


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_assignment_equals_a_plain_loop(seed):
    scores, boxes, place, objects = case(seed)
    found = assign_cells(scores, boxes, place, objects, SETTINGS)
    for row in range(len(scores)):
        arrays = (scores, boxes, place, objects.boxes_BM4, objects.labels_BM, objects.real_BM)
        expected = by_hand(*(each[row].numpy() for each in arrays))
        assert set(found.foreground_BA[row].nonzero()[:, 0].tolist()) == set(expected)
        for cell, (number, quality) in expected.items():
            assert found.object_BA[row, cell] == number
            assert float(found.quality_BA[row, cell]) == pytest.approx(quality, rel=1e-6, abs=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_batched_assignment_equals_one_by_one_and_ignores_padding(seed):
    scores, boxes, place, objects = case(seed, pictures=3)
    whole = assign_cells(scores, boxes, place, objects, SETTINGS)
    for row in range(3):
        one = slice(row, row + 1)
        wider = Objects(
            torch.cat([objects.boxes_BM4[one], torch.zeros(1, 4, 4, dtype=torch.float64)], 1),
            torch.cat([objects.labels_BM[one], torch.full((1, 4), -1)], 1),
            torch.cat([objects.real_BM[one], torch.zeros(1, 4, dtype=torch.bool)], 1),
            torch.cat([objects.ignored_BM[one], torch.zeros(1, 4, dtype=torch.bool)], 1),
        )
        alone = assign_cells(scores[one], boxes[one], place[one], wider, SETTINGS)
        assert torch.equal(alone.foreground_BA[0], whole.foreground_BA[row])
        assert torch.equal(alone.quality_BA[0], whole.quality_BA[row])
        assert torch.equal(alone.has_loss_BA[0], whole.has_loss_BA[row])


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_padding_changes_nothing(seed):
    """On a GPU rows of padding take part, on a CPU none do."""
    scores, boxes, place, objects = case(seed, pictures=3)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for rows in (assignment.used_rows, assignment.padded_rows):
            patch.setattr(assignment, "_object_rows", rows)
            found.append(assign_cells(scores, boxes, place, objects, SETTINGS))
    for field in ("object_BA", "foreground_BA", "quality_BA", "has_loss_BA"):
        assert torch.equal(getattr(found[0], field), getattr(found[1], field))


def test_rows_of_a_crowded_batch_are_its_objects():
    is_used = torch.zeros(4, 3000, dtype=torch.bool)
    is_used[1, :2], is_used[3, 7] = True, True
    rows = assignment._object_rows(is_used)
    assert (rows.image_N.tolist(), rows.number_N.tolist()) == ([1, 1, 3], [0, 1, 7])


def test_of_two_equal_objects_the_first_takes_the_cells():
    scores, boxes, place, _ = case(0, pictures=1)
    first, twice = objects_of([[8.0, 8, 40, 40]], [1]), objects_of([[8.0, 8, 40, 40], [8.0, 8, 40, 40]], [1, 2])
    all_cells = AssignmentSettings(1000, ALPHA, BETA)
    alone, found = (assign_cells(scores, boxes, place, objects, all_cells) for objects in (first, twice))
    assert found.foreground_BA.any()
    assert not found.object_BA.any()
    assert torch.equal(found.quality_BA, alone.quality_BA)


def objects_of(boxes, labels, vague=None):
    labels = torch.tensor([labels])
    vague = torch.tensor([vague]) if vague else torch.zeros_like(labels, dtype=torch.bool)
    return Objects(torch.tensor([boxes], dtype=torch.float64), labels, (labels >= 0) & ~vague, vague)


def test_an_object_smaller_than_a_cell_is_assigned_one():
    scores, boxes, place, _ = case(0, pictures=1)
    tiny = objects_of([[13.0, 13.0, 14.5, 14.5]], [1])
    assert assign_cells(scores, boxes, place, tiny, SETTINGS).foreground_BA.any()


@pytest.mark.parametrize("side", range(4))
def test_a_cell_whose_centre_lies_on_an_objects_edge_is_outside_it(side):
    """The object's edge passes through the centres of a row or a column of cells of stride 8."""
    scores, boxes, place, _ = case(0, pictures=1)
    box = [10.0, 10.0, 50.0, 50.0]
    box[side] = 12.0 if side < 2 else 44.0
    found = assign_cells(scores, boxes, place, objects_of([box], [1]), AssignmentSettings(1000, ALPHA, BETA))
    x, y, _ = place[0].unbind(1)
    inside = (box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])
    assert torch.equal(found.foreground_BA[0], inside)
    assert ((x if side % 2 == 0 else y) == box[side]).any()


def test_cells_in_images_without_objects_and_in_crowds_are_not_assigned():
    scores, boxes, place, _ = case(0, pictures=1)
    nothing = assign_cells(scores, boxes, place, objects_of([[0.0, 0, 0, 0]], [-1]), SETTINGS)
    assert not nothing.foreground_BA.any()
    assert nothing.has_loss_BA.all()
    crowd = assign_cells(scores, boxes, place, objects_of([[0.0, 0, 32, 64]], [0], [True]), SETTINGS)
    assert not crowd.foreground_BA.any()
    assert torch.equal(crowd.has_loss_BA[0], place[0, :, 0] >= 32)  # the left half is neither object nor background


def test_five_hundred_objects_in_an_image_are_assigned():
    scores, boxes, place, _ = case(0, pictures=1)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 500, 2, generator=generator, dtype=torch.float64) * 56
    labels = torch.zeros(1, 500, dtype=torch.int64)
    many = Objects(torch.cat([corner, corner + 8], 2), labels, labels == 0, labels != 0)
    found = assign_cells(scores, boxes, place, many, SETTINGS)
    assert found.foreground_BA.all()
    assert found.quality_BA.isfinite().all()


def test_the_focal_loss_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * 4
    target = torch.rand(2, 5, 3, generator=generator, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-logits))
    entropy = -(target * p.log() + (1 - target) * (1 - p).log())
    assert torch.allclose(quality_focal_loss(logits, target, 2.0), (target - p).abs() ** 2 * entropy)
    own = -(target * target.log() + (1 - target) * (1 - target).log())
    assert torch.allclose(quality_focal_loss(logits, target, 0.0), entropy - own)
    sure = torch.tensor([[[0.0, 1.0]]])
    assert torch.equal(quality_focal_loss(torch.zeros(1, 1, 2), sure, 0.0), torch.full((1, 1, 2), 2.0).log())
