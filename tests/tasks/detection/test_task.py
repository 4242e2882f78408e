from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision import ops

from cnnrun.base.boxes import intersection_over_union
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import ShapeError
from cnnrun.contracts.results import View
from cnnrun.contracts.task import FeatureLevel
from cnnrun.tasks.detection.head import FIRST_LOGIT
from cnnrun.tasks.detection.task import Detect, batch_objects

FACTS = Facts(("ape", "bee", "cat"), (3, 64, 96), class_counts=(30, 20, 10), counts={"train": 20})
LEVELS = [(8, 8, 12), (8, 4, 6)]
CELLS = 8 * 12 + 4 * 6


def head(seed=0, **settings):
    torch.manual_seed(seed)
    return Detect(levels=["a", "b"], channels=8, **settings).head(LEVELS, FACTS)


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
        Detect().head([(8, 8, 12), (16, 4, 6)], FACTS)
    with pytest.raises(ShapeError, match="needs feature maps"):
        Detect().head([(8,)], FACTS)
    assert Detect(towers="separate").head([(8, 8, 12), (16, 4, 6)], FACTS).in_channels == [8, 16]


@pytest.mark.parametrize("box_loss", ["ciou", "diou", "giou"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_loss_equals_its_formula_in_float64(box_loss, gamma):
    task, true = Detect(box_loss=box_loss, gamma=gamma), targets()
    out = head().eval()(*maps()).detach().double()
    losses = task.criterion(FACTS)(out, true)
    found = task.criterion(FACTS).assignment(out, batch_objects({**true, "boxes": true["boxes"].double()}))
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
    assert float(losses["box"]) == pytest.approx(task.box_weight * box / (2 * per_picture), rel=1e-5)


def test_micro_batches_have_the_whole_batchs_loss_and_gradient():
    network, criterion, true, given = head().eval(), Detect().criterion(FACTS), targets(6), maps(6)

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
    losses = Detect().criterion(FACTS)(network(*maps()), true)
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
    losses = Detect().criterion(FACTS)(network(*maps()), true)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_the_network_can_overfit_three_images():
    task, true, given, network = Detect(least_score=0.05), targets(3, most=3), maps(3), head(depth=1)
    true["roles"].zero_()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        sum(task.criterion(FACTS)(network(*given), true).values()).backward()
        optimizer.step()
    with torch.no_grad():
        results = task.decoder(FACTS)(network(*given))
    found = intersection_over_union(true["boxes"], results["boxes"]) * (
        true["objects"][:, :, None] == results["labels"][:, None]
    )
    assert found.amax(2)[true["objects"] >= 0].min() > 0.7


def test_results_are_padded_sorted_clipped_and_equal_one_by_one():
    task = Detect(most=20, least_score=0.0)
    out = head(seed=3).eval()(*maps(4)).detach()
    out[:, :, FIRST_LOGIT:] += 4 * torch.randn(
        out[:, :, FIRST_LOGIT:].shape, generator=torch.Generator().manual_seed(1)
    )
    together = task.decoder(FACTS)(out)
    assert {name: tuple(value.shape[1:]) for name, value in together.items()} == task.result_shapes(FACTS)
    for row in range(4):
        alone = task.decoder(FACTS)(out[row : row + 1])
        assert all(torch.equal(alone[name][0], together[name][row]) for name in together)
    boxes = together["boxes"]
    assert boxes.min() >= 0
    assert boxes[..., 2].max() <= 96
    assert boxes[..., 3].max() <= 64
    assert (together["scores"].diff(dim=1) <= 0).all()
    few = Detect(most=20, least_score=0.99).decoder(FACTS)(out)
    empty = few["labels"] < 0
    assert empty.any()
    assert few["boxes"][empty].abs().max() == 0
    assert few["scores"][empty].max() == 0
    more = Detect(most=4 * CELLS).decoder(FACTS)(out)
    assert more["boxes"].shape == (4, 4 * CELLS, 4)


def test_disagreements_between_outputs_are_found():
    task = Detect(most=20)
    out = head(seed=3).eval()(*maps(4)).detach()
    ours = task.decoder(FACTS)(out)
    assert task.find_disagreement(ours, ours, FACTS) is None
    assert task.find_disagreement(ours, {**ours, "boxes": ours["boxes"] + 1e-4}, FACTS) is None
    assert "overlaps the network's by" in task.find_disagreement(ours, {**ours, "boxes": ours["boxes"] + 1}, FACTS)
    assert "scores differ" in task.find_disagreement(ours, {**ours, "scores": ours["scores"] + 1e-3}, FACTS)
    assert "scores differ" in task.find_disagreement(ours, {**ours, "scores": ours["scores"] * float("nan")}, FACTS)
    swapped = {name: value.clone() for name, value in ours.items()}
    for name in ("boxes", "labels"):
        swapped[name][:, [0, 1]] = ours[name][:, [1, 0]]
    assert task.find_disagreement(ours, swapped, FACTS) is None  # boxes of nearly equal scores may swap
    assert "overlaps" in task.find_disagreement(ours, {**ours, "labels": (ours["labels"] + 1) % 3}, FACTS)
    one, other = torch.tensor([0.0, 0, 20, 20]), torch.tensor([40.0, 40, 60, 60])
    two = {"boxes": torch.stack([one, other])[None], "scores": torch.tensor([[0.9, 0.5]]), "labels": torch.zeros(1, 2)}
    assert "overlaps" in task.find_disagreement(
        two, {**two, "boxes": two["boxes"].flip(1)}, FACTS
    )  # each box with the other's score
    twice = {**two, "boxes": torch.stack([one, one])[None], "scores": torch.tensor([[0.9, 0.9]])}
    fewer = {**twice, "boxes": torch.stack([one, other])[None]}
    assert "overlaps" in task.find_disagreement(twice, fewer, FACTS)
    assert "overlaps" in task.find_disagreement(fewer, twice, FACTS)


def test_result_rows_are_in_the_images_pixels_above_each_classs_threshold():
    results = {
        "boxes": torch.tensor([[[10.0, 20, 30, 40], [0, 0, 8, 8], [1, 1, 2, 2]]]),
        "scores": torch.tensor([[0.9, 0.5, 0.2]]), "labels": torch.tensor([[1, 2, 1]]),
    }  # fmt: skip
    view = View((200, 300), 0.5, 2.0, 4.0, -10.0)
    facts = Facts(FACTS.classes, FACTS.image, class_ids=(7, 8, 9))
    (row,) = Detect().result_rows(results, facts, [view])
    assert (row["height"], row["width"]) == (200, 300)
    assert [each["label"] for each in row["objects"]] == ["bee", "cat"]
    first = row["objects"][0]
    assert first["category_id"] == 8
    assert first["bbox"] == pytest.approx([12, 15, 40, 10])
    small = View((20, 40), 0.5, 2.0, 4.0, -10.0)  # boxes are clipped to the image
    assert Detect().result_rows(results, facts, [small])[0]["objects"][0]["bbox"] == pytest.approx([12, 15, 28, 5])
    (row,) = Detect(score={"cat": 0.6, "bee": 0.1}).result_rows(results, facts, [view])
    assert [each["label"] for each in row["objects"]] == ["bee", "bee"]
    assert len(Detect(score=0.95).result_rows(results, facts, [view])[0]["objects"]) == 0


def test_unsuitable_data_is_reported():
    assert "no training image has a box" in Detect().data_problem(Facts(("a",), (1, 8, 8), class_counts=(0,)))
    assert "no class 'dog'" in Detect(score={"dog": 0.5}).data_problem(FACTS)
    assert Detect().data_problem(FACTS) is None


def split_of(batch):
    """The same targets in the layout of a split: objects concatenated, and the count of each image."""
    there = batch["objects"] >= 0
    return {name: values[there] for name, values in batch.items() if name != "view"} | {"counts": there.sum(1)}


def test_network_remarks_report_receptive_fields_and_warn_of_misfits():
    levels = [FeatureLevel((8, 8, 12), (20, 30), (8.0, 8.0)), FeatureLevel((8, 4, 6), (60, 60), (16.0, 16.0))]
    usual = targets(20)
    usual["boxes"][..., 2:] += 8
    lines = Detect(levels=["p3", "p4"]).network_remarks(levels, split_of(usual), FACTS)
    # The towers' two convolutions see four more cells.
    assert lines[1] == "p3: a cell every 8 pixels, which sees 52 pixels"
    assert not any("warning" in line for line in lines)
    small = targets(20)
    small["boxes"][..., 2:] = small["boxes"][..., :2] + 3
    assert any(
        "lie between the cells of the finest level, one every 8 pixels" in line
        for line in Detect().network_remarks(levels[:1], split_of(small), FACTS)
    )
    large = targets(20)
    large["boxes"] *= 9
    assert any(
        "larger than the 52 pixels that a cell sees" in line
        for line in Detect().network_remarks(levels[:1], split_of(large), FACTS)
    )
    assert any(
        "up to 5 objects; task.detect.most is 3" in line
        for line in Detect(levels=["p3", "p4"], most=3).network_remarks(levels, split_of(targets()), FACTS)
    )


def test_targets_are_described_and_drawn():
    true = targets(1)
    true["objects"] = torch.tensor([[1, 1, 0, -1, -1]])
    true["roles"] = torch.tensor([[0, 1, 2, 0, 0]], dtype=torch.uint8)
    assert Detect().describe_targets(true, FACTS) == ["1 ape, 2 bee"]
    assert [mark.text for mark in Detect().target_marks(true, FACTS)[0]] == ["bee", "bee (difficult)", "ape (crowd)"]
    true["objects"].fill_(-1)
    assert Detect().describe_targets(true, FACTS) == ["nothing"]


def test_boxes_are_drawn_above_their_classs_threshold():
    results = {
        "boxes": torch.tensor([[[10.0, 20, 30, 40], [0, 0, 8, 8], [1, 1, 2, 2], [0, 0, 0, 0]]]),
        "scores": torch.tensor([[0.9, 0.5, 0.2, 0.0]]), "labels": torch.tensor([[0, 2, 1, -1]]),
    }  # fmt: skip
    task = Detect(score={"ape": 0.95, "bee": 0.1, "cat": 0.5})
    (marks,) = task.result_marks(results, FACTS)
    assert [(mark.text, mark.box) for mark in marks] == [("cat 0.50", (0, 0, 8, 8)), ("bee 0.20", (1, 1, 2, 2))]


def test_assigned_objects_are_numbered_as_drawn():
    """Padding can lie between objects, as after a mosaic."""
    task, true = Detect(), targets(1)
    true["objects"] = torch.tensor([[-1, 2, -1, 0, 1]])
    true["roles"].zero_()
    outputs = head().eval()(*maps(1)).detach()
    drawn = task.target_marks(true, FACTS)[0]
    found = task.criterion(FACTS).assignment(outputs, batch_objects(true))
    rows = task.assignment(outputs, true, FACTS)
    assert len(rows) == int(found.foreground_BA.sum()) > 0
    for row in rows:
        number = int(found.object_BA[0, row["cell"]])
        assert list(drawn[row["object"]].box) == true["boxes"][0, number].tolist()
