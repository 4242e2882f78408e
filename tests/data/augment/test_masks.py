"""Masks move with their images, by nearest pixels; what comes from outside is to ignore."""

from __future__ import annotations

import pytest
import torch

from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.augment.geometry import affine_matrices, warp_masks
from cnnrun.data.augment.random_slots import Draws
from cnnrun.data.augment.settings import Augment

COUNT, SIDE = 12, 24


def draw_masks(seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 250, (COUNT, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def augment(settings: dict, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and masks after augmentation, mosaics included."""
    made = Augment.model_validate(settings)
    draws = Draws(3, 0, torch.arange(COUNT), made.slots())
    targets = {"masks": masks}
    moved = made.apply(images, draws, targets)
    targets = made.move_targets(targets, moved.shape, draws)
    if made.mosaic:
        partners = (torch.arange(COUNT)[:, None] + torch.arange(1, 4)) % COUNT
        moved, targets = made.make_mosaics(moved.float(), partners, targets, draws)
    return moved, targets["masks"]


@pytest.mark.parametrize(
    "settings", [{"flip": "both"}, {"shift": 0.3}, {"flip": "horizontal", "shift": 0.2}], ids=["flip", "shift", "both"]
)
def test_flipped_and_shifted_masks_equal_their_images_pixel_by_pixel(settings):
    masks = draw_masks()
    images, moved = augment(settings, masks[:, None], masks)
    is_inside = moved != IGNORED
    assert torch.equal(images[:, 0][is_inside], moved[is_inside])
    assert not images[:, 0][~is_inside].any()  # black, where the mask is to ignore
    assert is_inside.all() == ("shift" not in settings)


@pytest.mark.parametrize(
    "settings",
    [{"rotate": 30}, {"scale": 0.4, "shear": 10}, {"crop": {}}, {"mosaic": 1.0}, {"mosaic": 0.5, "rotate": 20}],
    ids=["rotate", "scale and shear", "crop", "mosaic", "rotated mosaic"],
)
def test_warped_masks_follow_the_content(settings):
    """A bright disc is its own mask: after any move, the bright pixels are the mask's, but for those at the edge."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = 6 + 12 * torch.rand(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    masks = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < 30).byte()
    images, moved = augment(settings, masks[:, None] * 200, masks)
    bright, is_disc = images[:, 0] > 100, moved == 1
    assert (bright & ~is_disc).sum() + (~bright & is_disc).sum() < 0.15 * is_disc.sum()
    assert is_disc.sum() > 100


def test_a_warp_takes_the_nearest_pixel_and_marks_what_lies_outside():
    masks = draw_masks(2)
    zero = torch.zeros(COUNT)
    shift = torch.tensor([[5.0, -3.0]]).expand(COUNT, 2)
    moved = warp_masks(masks, affine_matrices(zero, zero, zero + 1, torch.ones(COUNT, 2), shift))
    assert torch.equal(moved[:, : SIDE - 3, 5:], masks[:, 3:, : SIDE - 5])
    assert (moved[:, SIDE - 3 :] == IGNORED).all()
    assert (moved[:, :, :5] == IGNORED).all()
    assert moved.dtype == torch.uint8
