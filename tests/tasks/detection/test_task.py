from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision import ops

from cnnrun.base.boxes import intersection_over_union
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import ShapeError
from cnnrun.contracts.results import View
from cnnrun.contracts.task_parts import FeatureLevel
from cnnrun.tasks.detection.assignment import batch_objects
from cnnrun.tasks.detection.head import FIRST_LOGIT
from cnnrun.tasks.detection.task import Detect

FACTS = DataFacts(("ape", "bee", "cat"), (3, 64, 96), class_counts=(30, 20, 10), counts={"train": 20})
LEVELS = [(8, 8, 12), (8, 4, 6)]
TASK = Detect().bind(FACTS)
CELLS = 8 * 12 + 4 * 6


def head(seed=0, **settings):
    torch.manual_seed(seed)
    return Detect(levels=["a", "b"], channels=8, **settings).bind(FACTS).learning.build_head(LEVELS)


def criterion_of(**settings):
    return Detect(**settings).bind(FACTS).learning.build_criterion()


def decode(outputs, **settings):
    return Detect(**settings).bind(FACTS).predicting.build_decoder(Choices())(outputs)


def predict(results, view, facts=FACTS, **settings):
    """The only prediction for these results, with the thresholds of the settings."""
    predicting = Detect(**settings).bind(facts).predicting
    (prediction,) = predicting.predictions(results, [view], predicting.thresholds(Choices()))
    return prediction


def maps(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for shape in LEVELS]


def targets(batch=2, seed=0, most=5):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, most, 2, generator=generator) * torch.tensor([70.0, 40.0])
    boxes = torch.cat([corner, corner + 4 + 20 * torch.rand(batch, most, 2, generator=generator)], 2)
    objects = torch.randint(-1, 3, (batch, most), generator=generator)
    roles = (torch.rand(batch, most, generator=generator) < 0.2).byte() * 2
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(2)
    view = torch.tensor([[1.0, 1.0, 0.0, 0.0, 96.0, 64.0]]).repeat(batch, 1)
    return {"boxes": boxes, "objects": objects, "roles": roles, "areas": areas, "view": view}


@pytest.mark.parametrize("towers", ["shared", "separate"])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_every_cell_of_every_level_has_a_box_around_its_centre(towers, depthwise, depth):
    out = head(towers=towers, depthwise=depthwise, depth=depth).eval()(*maps())
    assert out.shape == (2, CELLS, FIRST_LOGIT + 3)
    x, y, stride = out[0, :, 4:FIRST_LOGIT].unbind(1)
    assert (x[0], y[0], stride[0]) == (4, 4, 8)
    assert (x[-1], y[-1], stride[-1]) == (88, 56, 16)
    x1, y1, x2, y2 = out[0, :, :4].unbind(1)
    assert ((x1 < x) & (x < x2) & (y1 < y) & (y < y2)).all()


def test_a_new_network_scores_everything_low():
    assert float(head().eval()(*maps()).detach()[:, :, FIRST_LOGIT:].sigmoid().mean()) == pytest.approx(0.01, rel=0.2)


def test_unsuitable_feature_levels_are_refused():
    with pytest.raises(ShapeError, match="need equal channels"):
        TASK.learning.build_head([(8, 8, 12), (16, 4, 6)])
    with pytest.raises(ShapeError, match="needs feature maps"):
        TASK.learning.build_head([(8,)])
    assert Detect(towers="separate").bind(FACTS).learning.build_head([(8, 8, 12), (16, 4, 6)]).in_channels == [8, 16]


@pytest.mark.parametrize("box_loss", ["ciou", "diou", "giou"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_loss_equals_its_formula_in_float64(box_loss, gamma):
    criterion, true = criterion_of(box_loss=box_loss, gamma=gamma), targets()
    out = head().eval()(*maps()).detach().double()
    losses = criterion(out, true)
    found = criterion.assign(out, batch_objects({**true, "boxes": true["boxes"].double()}))
    name = {"ciou": "complete", "diou": "distance", "giou": "generalized"}[box_loss]
    score = box = 0.0
    for row in range(2):
        for cell in range(CELLS):
            logits, wanted = out[row, cell, FIRST_LOGIT:], torch.zeros(3, dtype=torch.float64)
            if found.foreground_BA[row, cell]:
                number, quality = int(found.object_BA[row, cell]), found.quality_BA[row, cell]
                wanted[true["objects"][row, number]] = quality
                loss = getattr(ops, f"{name}_box_iou_loss")
                pair = out[row, cell, :4], true["boxes"][row, number].double()
                box += float(quality * loss(pair[0][None], pair[1][None]))
            elif not found.has_loss_BA[row, cell]:
                continue
            entropy = F.binary_cross_entropy(logits.sigmoid(), wanted, reduction="none")
            if not gamma:
                entropy = entropy - F.binary_cross_entropy(wanted, wanted, reduction="none")
            score += float((entropy * (wanted - logits.sigmoid()).abs() ** gamma).sum())
    per_picture = 60 / 20
    assert float(losses["score"]) == pytest.approx(score / (2 * per_picture), rel=1e-6)
    assert float(losses["box"]) == pytest.approx(Detect().box_weight * box / (2 * per_picture), rel=1e-5)


def test_micro_batches_have_the_whole_batchs_loss_and_gradient():
    network, criterion, true, given = head().eval(), criterion_of(), targets(6), maps(6)

    def gradient(*parts):
        network.zero_grad()
        total = 0.0
        for part in parts:
            some = {name: value[part] for name, value in true.items()}
            loss = sum(criterion(network(*(each[part] for each in given)), some).values()) * len(part) / 6
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    whole, parts = gradient(torch.arange(6)), gradient(torch.arange(4), torch.arange(4, 6))
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert torch.allclose(whole[1], parts[1], atol=1e-6)


def test_images_without_objects_have_a_loss_and_finite_gradients():
    network, true = head(), targets()
    true["objects"].fill_(-1)
    losses = criterion_of()(network(*maps()), true)
    assert float(losses["box"].detach()) == 0
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_difficult_objects_and_crowds_are_neither_learned_nor_background():
    true = targets(1, most=4) | {"objects": torch.tensor([[0, 1, 2, -1]]), "roles": torch.tensor([[0, 1, 2, 0]])}
    found = batch_objects(true)
    assert found.real_BM.tolist() == [[True, False, False, False]]
    assert found.ignored_BM.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_boxes_of_any_size_have_finite_gradients(value):
    network, true = head(), targets()
    for sides in network.sides:
        torch.nn.init.constant_(sides.bias, value)
    losses = criterion_of()(network(*maps()), true)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_the_network_can_overfit_three_images():
    criterion, true, given, network = criterion_of(), targets(3, most=3), maps(3), head(depth=1)
    true["roles"].zero_()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        sum(criterion(network(*given), true).values()).backward()
        optimizer.step()
    with torch.no_grad():
        results = decode(network(*given), least_score=0.05)
    found = intersection_over_union(true["boxes"], results["boxes"]) * (
        true["objects"][:, :, None] == results["labels"][:, None]
    )
    assert found.amax(2)[true["objects"] >= 0].min() > 0.7


def test_results_are_padded_sorted_clipped_and_equal_one_by_one():
    settings = {"most": 20, "least_score": 0.0}
    out = head(seed=3).eval()(*maps(4)).detach()
    out[:, :, FIRST_LOGIT:] += 4 * torch.randn(
        out[:, :, FIRST_LOGIT:].shape, generator=torch.Generator().manual_seed(1)
    )
    together = decode(out, **settings)
    shapes = Detect(**settings).bind(FACTS).predicting.result_shapes()
    assert {name: tuple(value.shape[1:]) for name, value in together.items()} == shapes
    for row in range(4):
        alone = decode(out[row : row + 1], **settings)
        assert all(torch.equal(alone[name][0], together[name][row]) for name in together)
    boxes = together["boxes"]
    assert boxes.min() >= 0
    assert boxes[..., 2].max() <= 96
    assert boxes[..., 3].max() <= 64
    assert (together["scores"].diff(dim=1) <= 0).all()
    few = decode(out, most=20, least_score=0.99)
    empty = few["labels"] < 0
    assert empty.any()
    assert few["boxes"][empty].abs().max() == 0
    assert few["scores"][empty].max() == 0
    more = decode(out, most=4 * CELLS)
    assert more["boxes"].shape == (4, 4 * CELLS, 4)


def test_disagreements_between_outputs_are_found():
    find_disagreement = Detect(most=20).bind(FACTS).predicting.find_disagreement
    out = head(seed=3).eval()(*maps(4)).detach()
    ours = decode(out, most=20)
    assert find_disagreement(ours, ours) is None
    assert find_disagreement(ours, {**ours, "boxes": ours["boxes"] + 1e-4}) is None
    assert "overlaps the network's by" in find_disagreement(ours, {**ours, "boxes": ours["boxes"] + 1})
    assert "scores differ" in find_disagreement(ours, {**ours, "scores": ours["scores"] + 1e-3})
    assert "scores differ" in find_disagreement(ours, {**ours, "scores": ours["scores"] * float("nan")})
    swapped = {name: value.clone() for name, value in ours.items()}
    for name in ("boxes", "labels"):
        swapped[name][:, [0, 1]] = ours[name][:, [1, 0]]
    assert find_disagreement(ours, swapped) is None  # boxes of nearly equal scores may swap
    assert "overlaps" in find_disagreement(ours, {**ours, "labels": (ours["labels"] + 1) % 3})
    one, other = torch.tensor([0.0, 0, 20, 20]), torch.tensor([40.0, 40, 60, 60])
    two = {"boxes": torch.stack([one, other])[None], "scores": torch.tensor([[0.9, 0.5]]), "labels": torch.zeros(1, 2)}
    assert "overlaps" in find_disagreement(
        two, {**two, "boxes": two["boxes"].flip(1)}
    )  # each box with the other's score
    twice = {**two, "boxes": torch.stack([one, one])[None], "scores": torch.tensor([[0.9, 0.9]])}
    fewer = {**twice, "boxes": torch.stack([one, other])[None]}
    assert "overlaps" in find_disagreement(twice, fewer)
    assert "overlaps" in find_disagreement(fewer, twice)


@pytest.mark.parametrize("least_score", [0.001, 0.3])
def test_a_box_at_the_least_score_may_be_missing_on_one_side(least_score):
    """Rounding decides whether it is above; a box that is clearly above must be there."""
    find_disagreement = Detect(most=2, least_score=least_score).bind(FACTS).predicting.find_disagreement
    one, other, none = torch.tensor([0.0, 0, 20, 20]), torch.tensor([40.0, 40, 60, 60]), torch.zeros(4)
    alone = {
        "boxes": torch.stack([one, none])[None],
        "scores": torch.tensor([[0.9, 0.0]]),
        "labels": torch.tensor([[0, -1]]),
    }
    for score, is_same in ((least_score + 1e-6, True), (least_score + 0.01, False)):
        both = {
            "boxes": torch.stack([one, other])[None],
            "scores": torch.tensor([[0.9, score]]),
            "labels": torch.tensor([[0, 0]]),
        }
        for pair in ((alone, both), (both, alone)):
            assert (find_disagreement(*pair) is None) == is_same


def test_predictions_are_in_the_images_pixels_above_each_classs_threshold():
    results = {
        "boxes": torch.tensor([[[10.0, 20, 30, 40], [0, 0, 8, 8], [1, 1, 2, 2]]]),
        "scores": torch.tensor([[0.9, 0.5, 0.2]]), "labels": torch.tensor([[1, 2, 1]]),
    }  # fmt: skip
    view = View((200, 300), 0.5, 2.0, 4.0, -10.0)
    facts = DataFacts(FACTS.classes, FACTS.image_shape, class_ids=(7, 8, 9))
    row = predict(results, view, facts).to_json()
    assert (row["height"], row["width"]) == (200, 300)
    assert [each["label"] for each in row["objects"]] == ["bee", "cat"]
    first = row["objects"][0]
    assert first["category_id"] == 8
    assert first["bbox"] == pytest.approx([12, 15, 40, 10])
    small = View((20, 40), 0.5, 2.0, 4.0, -10.0)  # boxes are clipped to the image
    assert predict(results, small, facts).to_json()["objects"][0]["bbox"] == pytest.approx([12, 15, 28, 5])
    chosen = predict(results, view, facts, score={"cat": 0.6, "bee": 0.1})
    assert [found.label for found in chosen.objects] == ["bee", "bee"]
    assert len(predict(results, view, facts, score=0.95).objects) == 0


def test_unsuitable_data_is_refused_once_it_has_been_counted():
    empty = DataFacts(("a",), (1, 8, 8), class_counts=(0,))
    with pytest.raises(DataError, match="no training image has a box"):
        Detect().bind(replace(empty, counts={"train": 3}))
    assert Detect().bind(empty).facts == empty
    with pytest.raises(ConfigError, match="no class 'dog'"):
        Detect(score={"dog": 0.5}).bind(FACTS)


def split_of(batch):
    """The same targets in the layout of a split: objects concatenated, and the count of each image."""
    there = batch["objects"] >= 0
    return {name: values[there] for name, values in batch.items() if name != "view"} | {"counts": there.sum(1)}


def feature_level_notes(feature_levels, batch, **settings):
    return Detect(**settings).bind(FACTS).showing.feature_level_notes(feature_levels, split_of(batch))


def test_feature_level_notes_report_receptive_fields_and_warn_of_misfits():
    levels = [FeatureLevel((8, 8, 12), (20, 30), (8.0, 8.0)), FeatureLevel((8, 4, 6), (60, 60), (16.0, 16.0))]
    usual = targets(20)
    usual["boxes"][..., 2:] += 8
    lines = feature_level_notes(levels, usual, levels=["p3", "p4"])
    # The towers' two convolutions see four more cells.
    assert lines[1] == "p3: a cell every 8 pixels, which sees 52 pixels"
    assert not any("warning" in line for line in lines)
    small = targets(20)
    small["boxes"][..., 2:] = small["boxes"][..., :2] + 3
    assert any(
        "lie between the cells of the finest level, one every 8 pixels" in line
        for line in feature_level_notes(levels[:1], small)
    )
    large = targets(20)
    large["boxes"] *= 9
    assert any("larger than the 52 pixels that a cell sees" in line for line in feature_level_notes(levels[:1], large))
    assert any(
        "up to 5 objects; task.detect.most is 3" in line
        for line in feature_level_notes(levels, targets(), levels=["p3", "p4"], most=3)
    )


def test_targets_are_described_and_drawn():
    true = targets(1)
    true["objects"] = torch.tensor([[1, 1, 0, -1, -1]])
    true["roles"] = torch.tensor([[0, 1, 2, 0, 0]], dtype=torch.uint8)
    assert TASK.showing.describe_targets(true) == ["1 ape, 2 bee"]
    (overlay,) = TASK.showing.target_overlays(true)
    assert [box.text for box in overlay.boxes] == ["bee", "bee (difficult)", "ape (crowd)"]
    assert [box.colour for box in overlay.boxes] == [1, 1, 0]
    true["objects"].fill_(-1)
    assert TASK.showing.describe_targets(true) == ["nothing"]


def test_boxes_are_drawn_above_their_classs_threshold():
    results = {
        "boxes": torch.tensor([[[10.0, 20, 30, 40], [0, 0, 8, 8], [1, 1, 2, 2], [0, 0, 0, 0]]]),
        "scores": torch.tensor([[0.9, 0.5, 0.2, 0.0]]), "labels": torch.tensor([[0, 2, 1, -1]]),
    }  # fmt: skip
    overlay = predict(results, View((64, 96)), score={"ape": 0.95, "bee": 0.1, "cat": 0.5}).overlay()
    assert [(box.text, box.box) for box in overlay.boxes] == [("cat 0.50", (0, 0, 8, 8)), ("bee 0.20", (1, 1, 2, 2))]
    assert [box.colour for box in overlay.boxes] == [2, 1]  # the class's index, as of targets


def test_assigned_objects_are_numbered_as_drawn():
    """Padding can lie between objects, as after a mosaic."""
    true = targets(1)
    true["objects"] = torch.tensor([[-1, 2, -1, 0, 1]])
    true["roles"].zero_()
    outputs = head().eval()(*maps(1)).detach()
    drawn = TASK.showing.target_overlays(true)[0].boxes
    found = criterion_of().assign(outputs, batch_objects(true))
    cells = TASK.cells.assigned_cells(outputs, true)
    assert len(cells) == int(found.foreground_BA.sum()) > 0
    for cell in cells:
        number = int(found.object_BA[0, cell.cell_index])
        assert list(drawn[cell.object_index].box) == true["boxes"][0, number].tolist()
