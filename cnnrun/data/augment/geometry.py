"""Moving batches of images, points and boxes by one affine matrix for each image.

A matrix [2, 3] maps each output pixel (x, y, 1) to its source in the input, in pixels from the image's centre: this is
what sampling needs. Points move by its inverse.
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
from cnnrun.contracts.target_kind import IGNORED


def affine_matrices(
    rotation_B: Tensor, shear_B: Tensor, inverse_scale_B: Tensor, flip_B2: Tensor, shift_B2: Tensor
) -> Tensor:
    """The matrices that flip, shear, scale, rotate and shift images in this order, [B, 2, 3].

    `rotation_B` is in radians, `shear_B` is the tangent of the angle, `flip_B2` is -1 (flipped) or 1 for (x, y), and
    `shift_B2` is in pixels to the right and down.
    """
    cos, sin = torch.cos(rotation_B) * inverse_scale_B, torch.sin(rotation_B) * inverse_scale_B
    linear = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    linear = torch.stack([linear[:, 0] + shear_B[:, None] * linear[:, 1], linear[:, 1]], 1)
    linear = linear * flip_B2[:, :, None]
    return torch.cat([linear, linear @ -shift_B2[:, :, None]], 2)


def crop_matrices(matrix_B23: Tensor, crop_B4: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrices followed by a crop to `crop_B4` that is resized to the full size.

    Crops are x1, y1, x2, y2 in pixels of the warped image; `shape` is [B, C, H, W].
    """
    height, width = shape[2:]
    full_size = tensor_on(crop_B4.device, [width, height], crop_B4.dtype)
    fraction = (crop_B4[:, 2:] - crop_B4[:, :2]) / full_size
    centre = (crop_B4[:, :2] + crop_B4[:, 2:] - full_size) / 2
    # The output pixel p comes from fraction * p + centre, which the matrix then maps to the input.
    linear = matrix_B23[:, :, :2] * fraction[:, None, :]
    return torch.cat([linear, matrix_B23[:, :, 2:] + matrix_B23[:, :, :2] @ centre[:, :, None]], 2)


def warp(images_BCHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """Images sampled bilinearly at the source of each output pixel; black outside."""
    grid = _sampling_grid(images_BCHW, matrix_B23)
    return F.grid_sample(images_BCHW, grid, padding_mode="zeros", align_corners=False)


def _sampling_grid(images_BCHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """The source of each output pixel in grid_sample's coordinates, which run from -1 to 1 over the image."""
    height, width = images_BCHW.shape[2:]
    half = tensor_on(images_BCHW.device, [width / 2, height / 2])
    linear = matrix_B23[:, :, :2] * half[None, None, :] / half[None, :, None]
    theta = torch.cat([linear, matrix_B23[:, :, 2:] / half[None, :, None]], 2)
    return F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)


def warp_masks(masks_BHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """Masks sampled at the nearest source of each output pixel; pixels from outside are to ignore."""
    # Values are moved so that the zero of what lies outside means `IGNORED`; float32 holds them exactly.
    moved = (masks_BHW.float() - IGNORED)[:, None]
    warped = F.grid_sample(
        moved, _sampling_grid(moved, matrix_B23), mode="nearest", padding_mode="zeros", align_corners=False
    )
    return (warped[:, 0] + IGNORED).to(masks_BHW.dtype)


def move_points(points_BN2: Tensor, matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """Positions of points (x, y in pixels) of images [B, C, H, W] after the images are warped."""
    centre = tensor_on(points_BN2.device, [shape[3] / 2, shape[2] / 2], points_BN2.dtype)
    offsets = points_BN2 - centre - matrix_B23[:, None, :, 2]
    # solve_ex: `solve` would make the host wait for a check that the matrices always pass, since they have an inverse.
    moved: Tensor = torch.linalg.solve_ex(matrix_B23[:, :, :2], offsets.mT).result.mT + centre
    return moved


def move_boxes(boxes_BN4: Tensor, matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """The upright boxes (x1, y1, x2, y2) around the warped corners of boxes, clipped to the image."""
    x1, y1, x2, y2 = boxes_BN4.unbind(2)
    corners = torch.stack([torch.stack(pair, 2) for pair in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))], 2)
    moved = move_points(corners.flatten(1, 2), matrix_B23, shape).view_as(corners)
    low, high = moved.amin(2), moved.amax(2)
    edge = tensor_on(moved.device, [shape[3], shape[2]], moved.dtype)
    return torch.cat([low.clamp(min=0).minimum(edge), high.clamp(min=0).minimum(edge)], 2)


def grow_crops(crop_B4: Tensor, targets: dict[str, Tensor], matrix_B23: Tensor, shape: Sequence[int]) -> Tensor:
    """Crops grown until they contain all objects of the warped images."""
    boxes = move_boxes(targets["boxes"], matrix_B23, shape)
    is_object = (targets["objects"] >= 0)[..., None]
    low = torch.where(is_object, boxes[..., :2], math.inf).amin(1).minimum(crop_B4[:, :2])
    high = torch.where(is_object, boxes[..., 2:], -math.inf).amax(1).maximum(crop_B4[:, 2:])
    return torch.cat([low, high], 1)


def move_targets(
    targets: dict[str, Tensor], matrix_B23: Tensor, shape: Sequence[int], min_visible: float
) -> dict[str, Tensor]:
    """Targets with their `boxes` moved like the images [B, C, H, W], without the objects that left the image.

    An object is dropped if less than the fraction `min_visible` of its box is left, or a side of less than a pixel.
    """
    moved = move_boxes(targets["boxes"], matrix_B23, shape)
    # The area of the upright box around the warped box before clipping; its sides follow from the box's sides.
    stretch = torch.linalg.inv_ex(matrix_B23[:, :, :2]).inverse.abs()
    full_area = ((targets["boxes"][..., 2:] - targets["boxes"][..., :2]) @ stretch.mT).prod(2)
    return drop_hidden_objects(targets, moved, full_area, min_visible)


def drop_hidden_objects(
    targets: dict[str, Tensor], boxes: Tensor, full_area: Tensor, min_visible: float
) -> dict[str, Tensor]:
    """Replace the targets' boxes, and drop each object that keeps less than `min_visible` of its `full_area`.

    An object with a side of less than a pixel is dropped too. Dropped objects have the label -1 and an empty box.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    is_visible = (sides >= 1).all(-1) & (sides.prod(-1) >= min_visible * full_area)
    objects = torch.where(is_visible, targets["objects"], -1)
    return {**targets, "boxes": boxes * (objects >= 0)[..., None], "objects": objects}


@dataclass(frozen=True)
class Flip:
    """The possible flips, each as axes of [B, C, H, W], and the index of each image's flip."""

    axes: tuple[tuple[int, ...], ...]
    choice_B: Tensor


@dataclass(frozen=True)
class Shift:
    """Whole pixels down and to the right; `max_shift` is the maximum (vertically, horizontally) in either direction."""

    down_B: Tensor
    right_B: Tensor
    max_shift: tuple[int, int]


def flip_and_shift(images: Tensor, flip: Flip, shift: Shift | None) -> Tensor:
    """Flip images, then shift them. The result equals that of `warp`, without its interpolation.

    In the flattened batch, an image shifted by whole pixels is one contiguous piece that starts elsewhere. So each
    image is copied as one piece of the batch or of a flipped version, and pixels from outside it are made black.
    """
    batch, channels, height, width = images.shape
    size, margin_size = channels * height * width, height * width + width
    margin = images.new_zeros(margin_size)
    versions = [images.flip(axes) if axes else images for axes in flip.axes]
    flat = torch.cat([margin, *(version.reshape(-1) for version in versions), margin])
    pieces = flat.as_strided((len(flat) - size + 1, size), (1, 1))
    start_B = margin_size + size * (torch.arange(batch, device=images.device) + batch * flip.choice_B)
    if shift is None:
        return pieces.index_select(0, start_B).view_as(images)
    moved = pieces.index_select(0, start_B - shift.down_B * width - shift.right_B).view(batch, channels, -1)
    inside = _inside_masks(height, width, shift)[:, None]
    if images.is_floating_point():  # images of 16 bits
        return moved.mul_(inside.bool()).view_as(images)
    # A bitwise `and` with 0 or 255 is many times as fast as `where` with a bool mask.
    return moved.bitwise_and_(inside).view_as(images)


def _inside_masks(height: int, width: int, shift: Shift) -> Tensor:
    """Masks for shifted images, uint8 [B, H * W]: 255 for pixels of the image, 0 for those that come from outside."""
    down_B, right_B, (max_down, max_right) = shift.down_B, shift.right_B, shift.max_shift
    if (2 * max_down + 1) * (2 * max_right + 1) > len(down_B):
        rows, columns = _axis_masks(height, down_B), _axis_masks(width, right_B)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)
    # Few shifts are possible, so they repeat within a batch: look their masks up in a cached table.
    masks = _masks_of_all_shifts(height, width, max_down, max_right, down_B.device)
    return masks.index_select(0, (down_B + max_down) * (2 * max_right + 1) + (right_B + max_right))


@lru_cache(8)
def _masks_of_all_shifts(height: int, width: int, max_down: int, max_right: int, device: torch.device) -> Tensor:
    """The masks of all shifts up to the maximum in either direction, uint8 [shifts, H * W]."""
    rows = _axis_masks(height, torch.arange(-max_down, max_down + 1, device=device))
    columns = _axis_masks(width, torch.arange(-max_right, max_right + 1, device=device))
    return (rows[:, None, :, None] & columns[None, :, None, :]).view(-1, height * width)


def _axis_masks(size: int, shift_N: Tensor) -> Tensor:
    """Masks for one axis, uint8 [N, size]: 255 for positions that come from inside the image, else 0."""
    source = torch.arange(size, device=shift_N.device) - shift_N[:, None]
    return (source.clamp(0, size - 1) == source).byte().mul_(255)


def draw_crops(
    area: tuple[float, float], ratio: tuple[float, float], draws: Sequence[Tensor], shape: Sequence[int]
) -> Tensor:
    """Crops [B, 4] inside the image with a random fraction of its area and a random ratio of width to height.

    The four draws are for area, ratio, y and x. A side that would be longer than the image's is cut to it.
    """
    height, width = shape[2:]
    area_draw, ratio_draw, y, x = draws
    low, high = math.log(ratio[0]), math.log(ratio[1])
    pixels = (area[0] + (area[1] - area[0]) * area_draw) * height * width
    aspect = torch.exp(low + (high - low) * ratio_draw)
    box_width = torch.sqrt(pixels * aspect).clamp(1, width)
    box_height = torch.sqrt(pixels / aspect).clamp(1, height)
    left, top = x * (width - box_width), y * (height - box_height)
    return torch.stack([left, top, left + box_width, top + box_height], 1)
