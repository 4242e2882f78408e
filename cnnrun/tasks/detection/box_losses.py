"""Overlap losses of boxes (x1, y1, x2, y2), with the same values as torchvision's, to the bit.

torchvision's functions index by a boolean mask, which makes the host wait for the GPU at every step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

BoxLoss = Literal["ciou", "diou", "giou"]
_EPS = 1e-7


def box_loss(kind: BoxLoss, boxes: Tensor, true: Tensor) -> Tensor:
    """Loss of each box against its true box: [..., 4], [..., 4] -> [...]."""
    return {"ciou": complete_iou_loss, "diou": distance_iou_loss, "giou": generalized_iou_loss}[kind](boxes, true)


def generalized_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - GIoU (Rezatofighi et al. 2019)."""
    intersection, union = _intersection_and_union(boxes, true)
    width, height = _hull_size(boxes, true)
    hull = width * height
    return 1 - (intersection / (union + _EPS) - (hull - union) / (hull + _EPS))


def distance_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - DIoU (Zheng et al. 2020, eq. 7)."""
    return _distance_loss_and_iou(boxes, true)[0]


def complete_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - CIoU (Zheng et al. 2020, eq. 10). The weight of the aspect ratio term has no gradient."""
    loss, iou = _distance_loss_and_iou(boxes, true)
    aspect = (4 / math.pi**2) * torch.pow(_diagonal_angle(true) - _diagonal_angle(boxes), 2)
    with torch.no_grad():
        weight = aspect / (1 - iou + aspect + _EPS)
    return loss + weight * aspect


def _distance_loss_and_iou(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    intersection, union = _intersection_and_union(boxes, true)
    iou = intersection / (union + _EPS)
    width, height = _hull_size(boxes, true)
    (x, y), (true_x, true_y) = _centre(boxes), _centre(true)
    squared_distance = (x - true_x) ** 2 + (y - true_y) ** 2
    return 1 - iou + squared_distance / (width**2 + height**2 + _EPS), iou


def _intersection_and_union(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    (x1, y1, x2, y2), (true_x1, true_y1, true_x2, true_y2) = boxes.unbind(-1), true.unbind(-1)
    width = torch.min(x2, true_x2) - torch.max(x1, true_x1)
    height = torch.min(y2, true_y2) - torch.max(y1, true_y1)
    intersection = torch.where((width > 0) & (height > 0), width * height, 0.0)
    return intersection, (x2 - x1) * (y2 - y1) + (true_x2 - true_x1) * (true_y2 - true_y1) - intersection


def _hull_size(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    (x1, y1, x2, y2), (true_x1, true_y1, true_x2, true_y2) = boxes.unbind(-1), true.unbind(-1)
    return torch.max(x2, true_x2) - torch.min(x1, true_x1), torch.max(y2, true_y2) - torch.min(y1, true_y1)


def _centre(boxes: Tensor) -> tuple[Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 + x1) / 2, (y2 + y1) / 2


def _diagonal_angle(boxes: Tensor) -> Tensor:
    """Angle between a box's diagonal and the vertical, in radians."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.atan((x2 - x1) / (y2 - y1))
