"""Tiles of figures: their shades, sizes and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import (
    add_caption,
    grey_tile,
    heat_map,
    mosaic,
    overlay_heat_map,
    scale_to_side,
    signed_tile,
)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(20, 170))
def test_an_image_is_scaled_to_about_the_requested_side(width, height, side):
    made = scale_to_side(Pil.new("L", (width, height)), side)
    assert max(made.size) <= max(2 * side, 2)
    if max(width, height) <= side:
        assert max(made.size) > side / 2
        assert (made.width % width, made.height % height) == (0, 0)


def test_a_signed_tile_is_grey_at_0_and_clips_outliers():
    values = torch.zeros(1, 40, 40)
    values[0, 0, 0], values[0, :2, 1] = 1000.0, torch.tensor([1.0, -1.0])
    values[0, 5:7] = 0.5
    pixels = np.asarray(signed_tile(values, 40))[..., 0]
    assert pixels[20, 20] == 128
    assert (pixels[0, 0], pixels[0, 1], pixels[1, 1]) == (255, 255, 0)
    assert 185 <= pixels[5, 20] <= 255
    assert np.asarray(signed_tile(torch.zeros(3, 4, 4), 4)).tolist() == [[[128, 128, 128]] * 4] * 4


def test_grey_and_heat_tiles_brighten_with_the_value():
    values = torch.tensor([[0.0, 0.5, 1.0]])
    assert np.asarray(grey_tile(values, 0.0, 1.0, 3))[0, :, 0].tolist() == [0, 128, 255]
    colours = np.asarray(heat_map(values, 0.0, 1.0))[0].astype(int)
    assert colours.sum(1).tolist() == sorted(colours.sum(1).tolist())
    assert np.asarray(grey_tile(torch.ones(2, 2), 1.0, 1.0, 2)).max() == 0  # nothing to tell apart


def test_a_heat_map_is_overlaid_on_the_image():
    picture = Pil.new("RGB", (40, 40), "white")
    made = np.asarray(overlay_heat_map(picture, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))).astype(int)
    assert made[0, 0].sum() > made[39, 39].sum() - 765
    assert (made[39, 39] != made[0, 0]).any()
    assert made.shape == (40, 40, 3)


def test_a_mosaic_fills_rows_of_tiles():
    tiles = [Pil.new("RGB", (4, 3), colour) for colour in ("red", "green", "blue")]
    made = mosaic(tiles, 2)
    assert made.size == (4 * 2 + 2, 3 * 2 + 2)
    assert made.getpixel((0, 5)) == (0, 0, 255)
    assert mosaic(tiles[:1], 5).size == (4, 3)


@pytest.mark.parametrize("text", ["short", "word " * 200, "x" * 500, "", "\udcff\x1b[31m"])
def test_a_caption_is_never_wider_than_the_image(text):
    pixels = np.zeros((10, 600, 3), np.uint8)
    made = add_caption(pixels, text)
    assert made.shape[1] == 600
    assert made.shape[0] >= 10
    assert np.array_equal(made[:10], pixels)
    assert (made[10:, -1] == 255).all()


def test_grid_columns_fit_their_titles_and_tiles():
    rows = [
        [("a", Pil.new("RGB", (10, 5))), ("b", Pil.new("RGB", (50, 20)))],
        [("long title here", Pil.new("RGB", (30, 9)))],
    ]
    made = titled_grid(rows)
    assert made.dtype == np.uint8
    assert made.shape[0] == 8 + (8 + 18 + 20) + (8 + 18 + 9)
    assert made.shape[1] >= 8 + 30 + 8 + 50 + 8
