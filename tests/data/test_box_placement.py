"""Boxes stay on their objects after decoding, after every augmentation and after mosaic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.base.ranks import Ranks
from cnnrun.contracts.objects import ObjectTable
from cnnrun.data.augment.geometry import draw_crops
from cnnrun.data.augment.random_slots import Draws
from cnnrun.data.augment.settings import Augment, Crop
from cnnrun.data.box_placement import map_boxes_to_input
from cnnrun.data.image_files import image_from_pixels
from cnnrun.data.image_geometry import compute_view, fit_image
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.training_batches import compute_share

COUNT, HEIGHT, WIDTH = 24, 48, 64
EVERY = {
    "flip": Augment(flip="both"),
    "shift": Augment(shift=0.2),
    "flip and shift": Augment(flip="horizontal", shift=0.1),
    "scale": Augment(scale=0.4),
    "rotate": Augment(rotate=30),
    "shear": Augment(shear=15),
    "crop": Augment(crop=Crop(scale=(0.3, 0.9))),
    "safe crop": Augment(crop=Crop(scale=(0.1, 0.5), safe=True)),
    "all": Augment(flip="both", shift=0.1, rotate=10, scale=0.2, shear=5, crop=Crop(scale=(0.6, 1))),
}


def bright(seed=0, objects=1):
    """Black images with one white rectangle each, and targets padded with two more rows."""
    rng = np.random.default_rng(seed)
    pictures = torch.zeros(COUNT, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    boxes = torch.zeros(COUNT, objects + 2, 4)
    for number in range(COUNT):
        wide, tall = rng.integers(6, 20, 2)
        x, y = rng.integers(0, WIDTH - wide), rng.integers(0, HEIGHT - tall)
        pictures[number, :, y : y + tall, x : x + wide] = 255
        boxes[number, 0] = torch.tensor([x, y, x + wide, y + tall])
    labels = torch.full((COUNT, objects + 2), -1)
    labels[:, 0] = torch.arange(COUNT) % 3
    roles, areas = torch.zeros_like(labels, dtype=torch.uint8), torch.ones(labels.shape)
    return pictures, {"boxes": boxes, "objects": labels, "roles": roles, "areas": areas}


def bright_box(picture):
    """The box around the bright pixels, or None."""
    ys, xs = np.nonzero(picture.numpy() > 127)
    return None if not len(xs) else (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("name", EVERY)
def test_boxes_follow_their_objects_through_augmentation(name):
    augment = EVERY[name].model_copy(update={"min_visible": 0.0})
    pictures, targets = bright()
    draws = Draws(3, 1, torch.arange(COUNT), augment.slots())
    changed = augment.apply(pictures, draws, targets).float()
    moved = augment.move_targets(targets, pictures.shape, draws)
    turned = augment.rotate or augment.shear
    looked = 0
    for number in range(COUNT):
        found = bright_box(changed[number, 0])
        if found is None or moved["objects"][number, 0] < 0:
            continue
        looked += 1
        box = moved["boxes"][number, 0].tolist()
        # A rotated rectangle touches its box only at its corners, which sampling rounds off and which may lie
        # outside the image.
        inside = min(box[:2]) > 0 and box[2] < WIDTH and box[3] < HEIGHT
        loose = (4.5 if inside else 20) if turned else 1.1
        for mine, theirs, way in zip(box, found, (1, 1, -1, -1), strict=True):
            assert -1.1 <= (theirs - mine) * way <= loose, (name, box, found)
        assert moved["objects"][number, 0] == number % 3
    assert looked > COUNT // 2
    assert (moved["objects"][:, 1:] == -1).all()


def test_a_safe_crop_cuts_no_object():
    pictures, targets = bright()
    augment = EVERY["safe crop"]
    draws = Draws(3, 1, torch.arange(COUNT), augment.slots())
    moved = augment.move_targets(targets, pictures.shape, draws)
    window = moved["boxes"][:, 0]
    sides, own = window[:, 2:] - window[:, :2], targets["boxes"][:, 0, 2:] - targets["boxes"][:, 0, :2]
    assert (moved["objects"][:, 0] >= 0).all()
    assert (sides >= own - 1e-3).all()  # enlarged, never cut
    assert (sides > 1.2 * own).any()
    unsafe = augment.model_copy(update={"crop": Crop(scale=(0.1, 0.5))})
    assert (unsafe.move_targets(targets, pictures.shape, draws)["objects"][:, 0] < 0).any()


def test_objects_with_too_little_left_visible_are_dropped():
    pictures, targets = bright()
    draws = Draws(3, 1, torch.arange(COUNT), Augment(shift=0.5).slots())
    lenient = Augment(shift=0.5, min_visible=0.0).move_targets(targets, pictures.shape, draws)
    strict = Augment(shift=0.5, min_visible=0.7).move_targets(targets, pictures.shape, draws)
    own = (targets["boxes"][:, 0, 2:] - targets["boxes"][:, 0, :2]).prod(1)
    left = (lenient["boxes"][:, 0, 2:] - lenient["boxes"][:, 0, :2]).prod(1) / own
    assert torch.equal(strict["objects"][:, 0] >= 0, (left >= 0.7) & (lenient["objects"][:, 0] >= 0))
    assert ((left > 0) & (left < 0.7)).any()


def test_the_visible_part_of_an_enlarged_object_is_relative_to_its_enlarged_area():
    pictures, targets = bright()
    lenient, strict = (Augment(scale=0.7, min_visible=part) for part in (0.0, 0.6))
    draws = Draws(3, 1, torch.arange(COUNT), lenient.slots())
    size = 1 + 0.7 * draws.draw_symmetric("scale")
    middle = torch.tensor([WIDTH, HEIGHT] * 2) / 2
    whole = (targets["boxes"][:, 0] - middle) * size[:, None] + middle
    cut = torch.minimum(whole.clamp(min=0), 2 * middle)
    left = (cut[:, 2:] - cut[:, :2]).clamp(min=0).prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1)
    there = lenient.move_targets(targets, pictures.shape, draws)["objects"][:, 0] >= 0
    kept = strict.move_targets(targets, pictures.shape, draws)["objects"][:, 0] >= 0
    assert torch.equal(kept, there & (left >= 0.6))
    assert (
        (left < 0.6) & (left * size.square() >= 0.6) & there
    ).any()  # relative to its original size it would be kept


def test_a_safe_crop_is_the_crop_extended_to_hold_the_objects():
    pictures, targets = bright()
    augment = EVERY["safe crop"]
    draws = Draws(3, 1, torch.arange(COUNT), augment.slots())
    places = [draws[slot] for slot in ("crop_area", "crop_shape", "crop_y", "crop_x")]
    window, box = draw_crops((0.1, 0.5), (0.75, 4 / 3), places, pictures.shape), targets["boxes"][:, 0]
    grown = torch.cat([torch.minimum(window[:, :2], box[:, :2]), torch.maximum(window[:, 2:], box[:, 2:])], 1)
    matrices = augment.matrices(draws, pictures.shape, targets)
    side = torch.tensor([WIDTH, HEIGHT])
    torch.testing.assert_close(matrices[:, [0, 1], [0, 1]], (grown[:, 2:] - grown[:, :2]) / side)
    torch.testing.assert_close(matrices[:, :, 2], (grown[:, :2] + grown[:, 2:] - side) / 2, rtol=1e-5, atol=1e-4)


def test_mosaics_combine_parts_of_four_images():
    pictures, targets = bright()
    augment = Augment(mosaic=0.6, min_visible=0.0)
    draws = Draws(3, 1, torch.arange(COUNT), augment.slots())
    partners = (torch.arange(COUNT)[:, None] + torch.arange(1, 4)) % COUNT
    changed, moved = augment.make_mosaics(pictures.float(), partners, targets, draws)
    assert moved["boxes"].shape[1] == 4 * targets["boxes"].shape[1]
    four = draws["mosaic"] < 0.6
    assert four.any()
    assert (~four).any()
    assert torch.equal(changed[~four], pictures[~four].float())
    assert torch.equal(moved["boxes"][~four][:, :3], targets["boxes"][~four])
    assert (moved["objects"][~four][:, 3:] == -1).all()
    for number in four.nonzero()[:, 0].tolist():
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        for x1, y1, x2, y2 in moved["boxes"][number][moved["objects"][number] >= 0].tolist():
            mask[max(0, round(y1) - 1) : round(y2) + 1, max(0, round(x1) - 1) : round(x2) + 1] = True
            inside = changed[number, 0, round(y1 + 1) : round(y2 - 1), round(x1 + 1) : round(x2 - 1)]
            assert inside.numel() == 0 or inside.min() > 200  # inside a box all is bright
        assert changed[number, 0][~mask].max() < 130  # and outside of all boxes nothing is
        of = {int(label) for label in moved["objects"][number] if label >= 0}
        assert of <= {int(each) % 3 for each in [number, *partners[number].tolist()]}


def test_a_mosaics_four_images_meet_at_the_drawn_point_in_the_middle_half():
    plain = torch.arange(1.0, COUNT + 1).view(-1, 1, 1, 1).expand(-1, 1, HEIGHT, WIDTH)
    _, targets = bright()
    augment = Augment(mosaic=1.0)
    draws = Draws(3, 1, torch.arange(COUNT), augment.slots())
    partners = (torch.arange(COUNT)[:, None] + torch.arange(1, 4)) % COUNT
    made, _ = augment.make_mosaics(plain, partners, targets, draws)
    for i in range(COUNT):
        x = round(WIDTH * (0.25 + 0.5 * float(draws["mosaic_x"][i])))
        y = round(HEIGHT * (0.25 + 0.5 * float(draws["mosaic_y"][i])))
        top_right, low_left, low_right = (1.0 + partners[i]).tolist()
        expected = torch.full((HEIGHT, WIDTH), 1.0 + i)
        expected[:y, x:], expected[y:, :x], expected[y:, x:] = top_right, low_left, low_right
        inside = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)  # a pixel at each image's edge is half black
        inside[[0, y - 1, y, -1]] = inside[:, [0, x - 1, x, -1]] = False
        torch.testing.assert_close(made[i, 0][inside], expected[inside])


def test_each_rank_loads_only_its_own_images_and_their_partners():
    whole = compute_share(10, 1, Ranks(), 3)
    assert whole.partner_indices.shape == (10, 3)
    assert torch.equal(whole.partner_indices, (torch.arange(10)[:, None] + torch.arange(1, 4)) % 10)
    alone = compute_share(10, 2, Ranks(), 0)
    assert alone.partner_indices.shape == (10, 0)


@given(
    st.integers(20, 200), st.integers(20, 200), st.integers(24, 80), st.integers(24, 80),
    st.sampled_from(["stretch", "pad", "crop"]), st.sampled_from([1.0, 0.8]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_boxes_follow_their_objects_through_fitting(height, width, tall, wide, fit, part):
    picture = np.zeros((height, width), np.uint8)
    y1, x1, y2, x2 = height // 4, width // 3, height // 4 + max(8, height // 3), width // 3 + max(8, width // 3)
    picture[y1:y2, x1:x2] = 255
    y2, x2 = min(y2, height), min(x2, width)
    image = ImageSettings(size=(tall, wide), channels=1, fit=fit, crop_pct=part, background=0)
    found = bright_box(
        torch.from_numpy(
            fit_image(image_from_pixels(picture[:, :, None], 1, image), (tall, wide), image)[:, :, 0].copy()
        )
    )
    columns = {"boxes": torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), "objects": torch.tensor([0])}
    one = ObjectTable(columns, torch.tensor([0, 1]))
    moved, _ = map_boxes_to_input(one, np.array([[height, width]]), (1, tall, wide), image)
    box = moved.columns["boxes"][0].tolist()
    if found is None:
        assert (box[2] - box[0]) * (box[3] - box[1]) < 4
    else:
        assert np.abs(np.array(box) - np.array(found)).max() <= 1.1
    # The inverse mapping, where nothing was cropped.
    scale_x, scale_y, left, top, *size = compute_view((height, width), (tall, wide), image).as_tuple()
    assert size == [width, height]
    back = [(box[0] - left) / scale_x, (box[1] - top) / scale_y, (box[2] - left) / scale_x, (box[3] - top) / scale_y]
    if fit != "crop":
        assert back == pytest.approx([x1, y1, x2, y2], abs=1e-2)


def test_an_object_is_kept_while_a_crop_leaves_one_pixel_of_it_per_axis():
    """The crop is the central 20 x 20 pixels of a 20 x 40 image, from its eleventh column on."""
    image = ImageSettings(size=(20, 20), channels=1, fit="crop", crop_pct=1.0)
    boxes = torch.tensor([[2.0, 3, 10.5, 15], [2, 3, 11, 15], [29.5, 3, 36, 15], [12, 3, 12.5, 15], [12, 5, 18, 9]])
    one = ObjectTable({"boxes": boxes, "objects": torch.zeros(5, dtype=torch.int64)}, torch.tensor([0, 5]))
    moved, _ = map_boxes_to_input(one, np.array([[20, 40]]), (1, 20, 20), image)
    assert moved.columns["objects"].tolist() == [-1, 0, -1, -1, 0]
    assert moved.columns["boxes"][1].tolist() == [0, 3, 1, 15]
    assert moved.columns["boxes"][[0, 2, 3]].abs().max() == 0
