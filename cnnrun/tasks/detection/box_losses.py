"""Losses of boxes (x1, y1, x2, y2) by how they overlap: torchvision's numbers, to the bit.

torchvision's own select the boxes that overlap by a mask, for which the host waits for a GPU at every step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

BoxLoss = Literal["ciou", "diou", "giou"]
_EPS = 1e-7


def box_loss(kind: BoxLoss, boxes: Tensor, true: Tensor) -> Tensor:
    """The loss of each box against its true one: [..., 4], [..., 4] -> [...]."""
    return {"ciou": complete_iou_loss, "diou": distance_iou_loss, "giou": generalized_iou_loss}[kind](boxes, true)


def generalized_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - GIoU (Rezatofighi et al. 2019)."""
    intersection, union = _intersection_and_union(boxes, true)
    wide, tall = _hull(boxes, true)
    hull = wide * tall
    return 1 - (intersection / (union + _EPS) - (hull - union) / (hull + _EPS))


def distance_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - DIoU (Zheng et al. 2020, eq. 7)."""
    return _distance_loss_and_iou(boxes, true)[0]


def complete_iou_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """1 - CIoU (Zheng et al. 2020, eq. 10). The weight of the aspect ratios' term has no gradient."""
    loss, iou = _distance_loss_and_iou(boxes, true)
    shape = (4 / math.pi**2) * torch.pow(_slope(true) - _slope(boxes), 2)
    with torch.no_grad():
        weight = shape / (1 - iou + shape + _EPS)
    return loss + weight * shape


def _distance_loss_and_iou(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    intersection, union = _intersection_and_union(boxes, true)
    iou = intersection / (union + _EPS)
    wide, tall = _hull(boxes, true)
    (x, y), (true_x, true_y) = _middle(boxes), _middle(true)
    apart = (x - true_x) ** 2 + (y - true_y) ** 2
    return 1 - iou + apart / (wide**2 + tall**2 + _EPS), iou


def _intersection_and_union(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    (x1, y1, x2, y2), (true_x1, true_y1, true_x2, true_y2) = boxes.unbind(-1), true.unbind(-1)
    wide = torch.min(x2, true_x2) - torch.max(x1, true_x1)
    tall = torch.min(y2, true_y2) - torch.max(y1, true_y1)
    intersection = torch.where((wide > 0) & (tall > 0), wide * tall, 0.0)
    return intersection, (x2 - x1) * (y2 - y1) + (true_x2 - true_x1) * (true_y2 - true_y1) - intersection


def _hull(boxes: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    (x1, y1, x2, y2), (true_x1, true_y1, true_x2, true_y2) = boxes.unbind(-1), true.unbind(-1)
    return torch.max(x2, true_x2) - torch.min(x1, true_x1), torch.max(y2, true_y2) - torch.min(y1, true_y1)


def _middle(boxes: Tensor) -> tuple[Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 + x1) / 2, (y2 + y1) / 2


def _slope(boxes: Tensor) -> Tensor:
    """The angle of a box's diagonal, from the vertical."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.atan((x2 - x1) / (y2 - y1))
