"""Means over rectangles equal PyTorch's area interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from cnnrun.results.people.summed_areas import SummedAreas

CPU = torch.device("cpu")


def draw_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(20, 31), (7, 5), (50, 64), (3, 100)])
def test_resizing_equals_pytorchs_area_mode(height, width):
    pixels = draw_pixels(40, 53)
    expected = interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), size=(height, width), mode="area")
    areas = SummedAreas(pixels, CPU)
    resized = areas.resize(height, width, slice(0, height))
    torch.testing.assert_close(resized, expected.float(), atol=1e-4, rtol=0)
    part = areas.resize(height, width, slice(1, height - 1))
    assert torch.equal(part, resized[:, :, 1 : height - 1])


def test_crops_equal_pytorchs_area_mode():
    pixels = draw_pixels(40, 53)
    boxes = torch.tensor([[0, 0, 53, 40], [3, 4, 27, 28], [10, 12, 15, 39], [52, 39, 53, 40], [1, 2, 49, 26]])
    crops = SummedAreas(pixels, CPU).crops(boxes, 24)
    image = torch.from_numpy(pixels).permute(2, 0, 1).double()
    for crop, (x1, y1, x2, y2) in zip(crops, boxes.tolist(), strict=True):
        expected = interpolate(image[None, :, y1:y2, x1:x2], size=(24, 24), mode="area")[0]
        torch.testing.assert_close(crop, expected.float(), atol=1e-4, rtol=0)


def test_sums_beyond_32_bits_stay_exact():
    pixels = np.full((3000, 3000, 1), 255, np.uint8)  # 2.3e9 in the last corner
    pixels[2900:, 2900:] = 7
    areas = SummedAreas(pixels, CPU)
    assert torch.equal(areas.crops(torch.tensor([[2900, 2900, 3000, 3000]]), 24), torch.full((1, 1, 24, 24), 7.0))
    assert areas.resize(30, 30, slice(0, 30))[0, 0].tolist() == [[255.0] * 29 + [255.0]] * 29 + [[255.0] * 29 + [7.0]]
