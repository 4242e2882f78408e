"""Arithmetic of the MTCNN cascade's boxes, (x1, y1, x2, y2) in pixels (Zhang et al. 2016, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnrun.base.boxes import suppress_greedily


def move_edges(boxes_N4: Tensor, offsets_N4: Tensor, extra_px: int) -> Tensor:
    """Move each edge by an offset, which is a fraction of the box's width or height plus `extra_px`."""
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2] + extra_px
    return boxes_N4 + offsets_N4 * torch.cat([sizes_N2, sizes_N2], 1)


def make_square(boxes_N4: Tensor) -> Tensor:
    """Enlarge the shorter side to the longer one, around the same centre."""
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    side_N1 = sizes_N2.amax(1, keepdim=True)
    corner_N2 = boxes_N4[:, :2] + sizes_N2 * 0.5 - side_N1 * 0.5
    return torch.cat([corner_N2, corner_N2 + side_N1], 1)


def pixels_of_boxes(boxes_N4: Tensor, height: int, width: int) -> Tensor:
    """Whole pixels of the boxes within the image, as `SummedAreas.crops` takes them; some may be empty.

    The cascade counts pixels from 1.
    """
    limits_4 = torch.tensor([width, height, width, height], device=boxes_N4.device)
    x1, y1, x2, y2 = boxes_N4.long().unbind(1)
    first = torch.stack([x1, y1], 1).clamp(min=1) - 1
    return torch.cat([first, torch.stack([x2, y2], 1).minimum(limits_4[2:])], 1)


def landmarks_in_image(boxes_N4: Tensor, fractions_N10: Tensor) -> Tensor:
    """Landmarks [N, 5, 2] as (x, y) in pixels, from fractions of the boxes: five x, then five y."""
    sizes_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2] + 1
    fractions_N52 = fractions_N10.unflatten(1, (2, 5)).transpose(1, 2)
    landmarks: Tensor = sizes_N2[:, None] * fractions_N52 + boxes_N4[:, None, :2] - 1
    return landmarks


def keep_outermost(boxes_N4: Tensor, scores_N: Tensor, max_overlap: float) -> Tensor:
    """Indices of the boxes that remain, by falling score: overlap is a fraction of the smaller of two boxes.

    A box inside another one is therefore suppressed, however small it is.
    """
    order_N = scores_N.argsort(descending=True, stable=True)
    boxes = boxes_N4[order_N]
    corner = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    overlaps_NN = (torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corner + 1).clamp(min=0).prod(2)
    areas_N = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    suppresses = overlaps_NN > max_overlap * torch.minimum(areas_N[:, None], areas_N)
    remaining: Tensor = order_N[suppress_greedily(suppresses[None])[0]]
    return remaining
