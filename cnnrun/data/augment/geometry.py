"""Moving pictures, points and boxes by one affine matrix a picture, a batch at a time.

A matrix [2, 3] says where each output pixel (x, y, 1) comes from, in pixels from the picture's middle: it is what
sampling needs. Points go the other way, by its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrun.base.device import tensor_on


def affine_matrices(turn_B: Tensor, slant_B: Tensor, size_B: Tensor, mirror_B2: Tensor, shift_B2: Tensor) -> Tensor:
    """[B, 2, 3]: mirrored, slanted by `slant` (a tangent), enlarged by 1 / `size`, turned by `turn` radians, shifted.

    `mirror_B2` is -1 or 1 for (x, y), `shift_B2` pixels to the right and down.
    """
    cos, sin = torch.cos(turn_B) * size_B, torch.sin(turn_B) * size_B
    made = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    made = torch.stack([made[:, 0] + slant_B[:, None] * made[:, 1], made[:, 1]], 1)
    made = made * mirror_B2[:, :, None]
    return torch.cat([made, made @ -shift_B2[:, :, None]], 2)


def crop_matrices(matrix_B23: Tensor, box_B4: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrices after which only `box_B4` (x1, y1, x2, y2 in pixels of the input) is seen, at the full size."""
    height, width = shape[2:]
    full = tensor_on(box_B4.device, [width, height], box_B4.dtype)
    part = (box_B4[:, 2:] - box_B4[:, :2]) / full
    middle = (box_B4[:, :2] + box_B4[:, 2:] - full) / 2
    # An output pixel lies at part * itself + middle of the cropped picture, and from there goes the matrix's way.
    linear = matrix_B23[:, :, :2] * part[:, None, :]
    return torch.cat([linear, matrix_B23[:, :, 2:] + matrix_B23[:, :, :2] @ middle[:, :, None]], 2)


def warp(pictures_BCHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """Pictures sampled bilinearly where the matrices say; black outside."""
    height, width = pictures_BCHW.shape[2:]
    half = tensor_on(pictures_BCHW.device, [width / 2, height / 2])
    # grid_sample counts from -1 to 1 over the picture, the matrices in pixels from its middle.
    linear = matrix_B23[:, :, :2] * half[None, None, :] / half[None, :, None]
    theta = torch.cat([linear, matrix_B23[:, :, 2:] / half[None, :, None]], 2)
    grid = F.affine_grid(theta, list(pictures_BCHW.shape), align_corners=False)
    return F.grid_sample(pictures_BCHW, grid, padding_mode="zeros", align_corners=False)


def move_points(points_BN2: Tensor, matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """Where points (x, y in pixels) of the pictures [B, C, H, W] are once the pictures are warped."""
    middle = tensor_on(points_BN2.device, [shape[3] / 2, shape[2] / 2], points_BN2.dtype)
    there = points_BN2 - middle - matrix_B23[:, None, :, 2]
    # Without the check that `solve` makes, for which the host would wait: an affine matrix of ours has an inverse.
    moved: Tensor = torch.linalg.solve_ex(matrix_B23[:, :, :2], there.mT).result.mT + middle
    return moved


def move_boxes(boxes_BN4: Tensor, matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """The upright boxes (x1, y1, x2, y2) around the warped corners of boxes, cut at the picture's edges."""
    x1, y1, x2, y2 = boxes_BN4.unbind(2)
    corners = torch.stack([torch.stack(pair, 2) for pair in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))], 2)
    moved = move_points(corners.flatten(1, 2), matrix_B23, shape).view_as(corners)
    low, high = moved.amin(2), moved.amax(2)
    edge = tensor_on(moved.device, [shape[3], shape[2]], moved.dtype)
    return torch.cat([low.clamp(min=0).minimum(edge), high.clamp(min=0).minimum(edge)], 2)


def grow_windows(window_B4: Tensor, targets: dict[str, Tensor], matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """The windows grown until they hold all objects whole, as these lie once the pictures are warped."""
    boxes = move_boxes(targets["boxes"], matrix_B23, shape)
    there = (targets["objects"] >= 0)[..., None]
    low = torch.where(there, boxes[..., :2], math.inf).amin(1).minimum(window_B4[:, :2])
    high = torch.where(there, boxes[..., 2:], -math.inf).amax(1).maximum(window_B4[:, 2:])
    return torch.cat([low, high], 1)


def move_targets(
    targets: dict[str, Tensor], matrix_B23: Tensor, shape: Sequence[int], least: float
) -> dict[str, Tensor]:
    """Targets with their `boxes` moved as the pictures [B, C, H, W] are.

    An object of which less than the part `least` is left inside, or less than a pixel a side, is an object no more.
    """
    moved = move_boxes(targets["boxes"], matrix_B23, shape)
    # What the box would be without the picture's edges: that of the turned box's sides, from its own.
    stretch = torch.linalg.inv_ex(matrix_B23[:, :, :2]).inverse.abs()
    whole = ((targets["boxes"][..., 2:] - targets["boxes"][..., :2]) @ stretch.mT).prod(2)
    return drop_hidden_objects(targets, moved, whole, least)


def drop_hidden_objects(targets: dict[str, Tensor], boxes: Tensor, whole: Tensor, least: float) -> dict[str, Tensor]:
    """Targets with these boxes in the place of theirs, without the objects of whose `whole` area too little is left."""
    sides = boxes[..., 2:] - boxes[..., :2]
    there = (sides >= 1).all(-1) & (sides.prod(-1) >= least * whole)
    objects = torch.where(there, targets["objects"], -1)
    return {**targets, "boxes": boxes * (objects >= 0)[..., None], "objects": objects}


@dataclass(frozen=True)
class Mirror:
    """Ways of mirroring, each as the axes of [B, C, H, W] to turn round, and which of them each picture takes."""

    axes: tuple[tuple[int, ...], ...]
    which_B: Tensor


@dataclass(frozen=True)
class Shift:
    """Whole pixels down and to the right, no further than `reach` (vertically, horizontally) either way."""

    down_B: Tensor
    right_B: Tensor
    reach: tuple[int, int]


def mirror_and_shift(pictures: Tensor, mirror: Mirror, shift: Shift | None) -> Tensor:
    """Mirrored, then shifted: what `warp` gives, without interpolating.

    A picture shifted by whole pixels is the same bytes begun elsewhere, but for what is moved in from outside. So each
    is copied as one piece out of the batch laid flat, beside the batch mirrored, and what does not belong to it is made
    black.
    """
    batch, channels, height, width = pictures.shape
    size, reach = channels * height * width, height * width + width
    margin = pictures.new_zeros(reach)
    versions = [pictures.flip(axes) if axes else pictures for axes in mirror.axes]
    flat = torch.cat([margin, *(version.reshape(-1) for version in versions), margin])
    pieces = flat.as_strided((len(flat) - size + 1, size), (1, 1))
    start_B = reach + size * (torch.arange(batch, device=pictures.device) + batch * mirror.which_B)
    if shift is None:
        return pieces.index_select(0, start_B).view_as(pictures)
    moved = pieces.index_select(0, start_B - shift.down_B * width - shift.right_B).view(batch, channels, -1)
    # As bits of bytes: many times as fast as selecting by truths.
    return moved.bitwise_and_(_inside(height, width, shift)[:, None]).view_as(pictures)


def _inside(height: int, width: int, shift: Shift) -> Tensor:
    """255 where a shifted picture shows what it had, 0 where something moved in: uint8 [B, H * W]."""
    down_B, right_B, (most_down, most_right) = shift.down_B, shift.right_B, shift.reach
    if (2 * most_down + 1) * (2 * most_right + 1) > len(down_B):
        rows, columns = _kept(height, down_B), _kept(width, right_B)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)
    # Shifts repeat within a batch: each one's mask is made once, and copied.
    masks = _masks(height, width, most_down, most_right, down_B.device)
    return masks.index_select(0, (down_B + most_down) * (2 * most_right + 1) + (right_B + most_right))


@lru_cache(8)
def _masks(height: int, width: int, most_down: int, most_right: int, device: torch.device) -> Tensor:
    """The mask of each shift up to those, uint8 [shifts, H * W]."""
    rows = _kept(height, torch.arange(-most_down, most_down + 1, device=device))
    columns = _kept(width, torch.arange(-most_right, most_right + 1, device=device))
    return (rows[:, None, :, None] & columns[None, :, None, :]).view(-1, height * width)


def _kept(size: int, shift_N: Tensor) -> Tensor:
    """255 for those of range(size) that come from inside the picture, else 0: uint8 [N, size]."""
    source = torch.arange(size, device=shift_N.device) - shift_N[:, None]
    return (source.clamp(0, size - 1) == source).byte().mul_(255)


def draw_crop_boxes(
    area: tuple[float, float], ratio: tuple[float, float], draws: Sequence[Tensor], shape: Sequence[int]
) -> Tensor:
    """[B, 4] boxes of a random part of the area and a random ratio of width to height, inside the picture.

    The four draws are for area, ratio, y and x. Where a box would not fit, its longer side is cut to the picture's.
    """
    height, width = shape[2:]
    part, shape_draw, y, x = draws
    low, high = math.log(ratio[0]), math.log(ratio[1])
    pixels = (area[0] + (area[1] - area[0]) * part) * height * width
    aspect = torch.exp(low + (high - low) * shape_draw)
    wide = torch.sqrt(pixels * aspect).clamp(1, width)
    tall = torch.sqrt(pixels / aspect).clamp(1, height)
    left, top = x * (width - wide), y * (height - tall)
    return torch.stack([left, top, left + wide, top + tall], 1)
