"""Each operation against a plain loop over single pictures and pixels."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.augment import Augment
from cnnrun.draws import SLOTS, Draws
from cnnrun.geometry import warp
from cnnrun.randomness import uniform

SEED, EPOCH = 5, 3


def pictures(count=6, channels=3, height=9, width=7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def draw(index: int, slot: str) -> float:
    return float(uniform(SEED, EPOCH, torch.tensor([index]), torch.tensor([SLOTS.index(slot)])))


def applied(augment: Augment, given: torch.Tensor) -> torch.Tensor:
    return augment.apply(given, Draws(SEED, EPOCH, torch.arange(len(given)), augment.slots()))


def test_nothing_asked_nothing_changed():
    assert torch.equal(applied(Augment(), pictures()), pictures().float())


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "both"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_flips_and_shifts_equal_a_loop_over_pixels(flip, shift):
    given, got = pictures(), applied(Augment(flip=flip, shift=shift), pictures())
    for i, picture in enumerate(given):
        height, width = picture.shape[1:]
        if flip in ("horizontal", "both") and draw(i, "flip_x") < 0.5:
            picture = picture.flip(2)
        if flip in ("vertical", "both") and draw(i, "flip_y") < 0.5:
            picture = picture.flip(1)
        reach_y, reach_x = int(shift * height), int(shift * width)
        down = math.floor(draw(i, "shift_y") * (2 * reach_y + 1)) - reach_y
        right = math.floor(draw(i, "shift_x") * (2 * reach_x + 1)) - reach_x
        expected = torch.zeros(picture.shape)
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    expected[:, y, x] = picture[:, y - down, x - right]
        assert torch.equal(got[i], expected)


def test_whole_pixel_moves_equal_the_matrix_way():
    augment = Augment(flip="both", shift=0.3)
    given = pictures()
    matrices = augment.matrices(Draws(SEED, EPOCH, torch.arange(len(given))), given.shape)
    assert torch.allclose(applied(augment, given), warp(given.float(), matrices), atol=1e-2)


def test_geometry_equals_bilinear_sampling_pixel_by_pixel():
    augment = Augment(rotate=30, scale=0.3, shear=15, shift=0.2, flip="both")
    given, got = pictures(3), applied(augment, pictures(3))
    height, width = given.shape[2:]
    for i, picture in enumerate(given.double()):
        angle = math.radians(30) * (2 * draw(i, "rotate") - 1)
        slant = math.tan(math.radians(15) * (2 * draw(i, "shear") - 1))
        size = 1 / (1 + 0.3 * (2 * draw(i, "scale") - 1))
        mirror = [-1 if draw(i, slot) < 0.5 else 1 for slot in ("flip_x", "flip_y")]
        reach = int(0.2 * height), int(0.2 * width)
        down = math.floor(draw(i, "shift_y") * (2 * reach[0] + 1)) - reach[0]
        right = math.floor(draw(i, "shift_x") * (2 * reach[1] + 1)) - reach[1]
        for y in range(height):
            for x in range(width):
                # From the middle, back through shift, rotation with size, shear and mirror.
                u, v = x + 0.5 - width / 2 - right, y + 0.5 - height / 2 - down
                u, v = (
                    size * (math.cos(angle) * u + math.sin(angle) * v),
                    size * (math.cos(angle) * v - math.sin(angle) * u),
                )
                u, v = mirror[0] * (u + slant * v), mirror[1] * v
                px, py = u + width / 2 - 0.5, v + height / 2 - 0.5
                value = torch.zeros(3, dtype=torch.float64)
                for yy in (math.floor(py), math.floor(py) + 1):
                    for xx in (math.floor(px), math.floor(px) + 1):
                        if 0 <= yy < height and 0 <= xx < width:
                            value += (1 - abs(py - yy)) * (1 - abs(px - xx)) * picture[:, yy, xx]
                assert torch.allclose(got[i, :, y, x].double(), value, atol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_equal_the_formula(channels):
    given = pictures(channels=channels)
    got = applied(Augment(brightness=0.4, contrast=0.5), given)
    weights = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1.0])
    for i, picture in enumerate(given.float()):
        bright = picture * (1 + 0.4 * (2 * draw(i, "brightness") - 1))
        mean = (bright * weights[:, None, None]).sum(0).mean()
        stretch = 1 + 0.5 * (2 * draw(i, "contrast") - 1)
        expected = (mean + stretch * (bright - mean)).clamp(0, 255)
        assert torch.allclose(got[i], expected, atol=1e-3)


def test_saturation_equals_the_formula():
    given = pictures()
    got = applied(Augment(saturation=0.9), given)
    for i, picture in enumerate(given.float()):
        grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        keep = 1 + 0.9 * (2 * draw(i, "saturation") - 1)
        assert torch.allclose(got[i], (grey + keep * (picture - grey)).clamp(0, 255), atol=1e-3)


def test_hue_keeps_grey_and_luma_and_turns_colours():
    grey = torch.full((6, 3, 4, 4), 90, dtype=torch.uint8)
    assert torch.allclose(applied(Augment(hue=0.5), grey), grey.float(), atol=1e-2)
    red = torch.zeros(40, 3, 2, 2, dtype=torch.uint8)
    red[:, 0], red[:, 1:] = 140, 100
    turned = applied(Augment(hue=0.5), red)
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(turned[:, :, 0, 0] @ luma, (red.float()[:, :, 0, 0]) @ luma, atol=0.05)
    hues = [colorsys.rgb_to_hsv(*(p / 255).tolist())[0] for p in turned[:, :, 0, 0]]
    assert max(hues) - min(hues) > 0.6


def test_erase_blanks_one_rectangle_of_the_stated_size():
    given = torch.zeros(300, 1, 20, 30, dtype=torch.uint8)
    got = applied(Augment(erase=0.5), given)[:, 0]
    blank = got == 127.5
    hit = blank.flatten(1).any(1)
    assert 0.4 < float(hit.float().mean()) < 0.6
    for one in blank[hit]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :])
        assert 0.01 < float(one.float().mean()) < 0.40


@given(
    st.fixed_dictionaries(
        {
            "flip": st.sampled_from(["none", "horizontal", "vertical", "both"]),
            "shift": st.sampled_from([0.0, 0.2]),
            "rotate": st.sampled_from([0.0, 20.0]),
            "brightness": st.sampled_from([0.0, 0.3]),
            "hue": st.sampled_from([0.0, 0.1]),
            "erase": st.sampled_from([0.0, 0.7]),
        }
    ),
    st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_a_picture_alone_equals_the_picture_in_a_batch(asked, channels):
    augment, given = Augment(**asked), pictures(channels=channels)
    together = applied(augment, given)
    for i in range(len(given)):
        alone = augment.apply(given[i : i + 1], Draws(SEED, EPOCH, torch.tensor([i]), augment.slots()))
        assert torch.allclose(alone[0], together[i], atol=1e-3)
    assert together.min() >= 0
    assert together.max() <= 255
