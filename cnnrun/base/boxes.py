"""Boxes: always (x1, y1, x2, y2) in pixels. Overlap, the suppression of boxes that show one object twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2 in pixels) to draw, with what to write at it, in one of ten colours."""

    box: tuple[float, float, float, float]
    text: str
    colour: int


def intersection_over_union(ones_BM4: Tensor, others_BN4: Tensor) -> Tensor:
    """Intersection over union of each box with each other box of its picture: [B, M, N]; 0 for boxes of no area."""
    both = _in_common(ones_BM4, others_BN4)
    union = box_areas(ones_BM4)[:, :, None] + box_areas(others_BN4)[:, None] - both
    return both / union.clamp(min=1e-9)


def _in_common(ones_BM4: Tensor, others_BN4: Tensor) -> Tensor:
    """The area that each box has in common with each other box of its picture: [B, M, N]."""

    def along(low: int, high: int) -> Tensor:
        start = torch.maximum(ones_BM4[:, :, None, low], others_BN4[:, None, :, low])
        return (torch.minimum(ones_BM4[:, :, None, high], others_BN4[:, None, :, high]) - start).clamp_(min=0)

    return along(0, 2) * along(1, 3)


def box_areas(boxes_N4: Tensor) -> Tensor:
    """Square pixels: [..., 4] -> [...]."""
    return (boxes_N4[..., 2] - boxes_N4[..., 0]) * (boxes_N4[..., 3] - boxes_N4[..., 1])


def non_maximum_suppression(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, most: float) -> Tensor:
    """Which boxes are left by greedy non-maximum suppression class by class: bool [B, M]. Scores must fall along M.

    A box goes where one of its class that is left, before it, overlaps it by more than `most`. That rule applied to
    all boxes at once until nothing changes comes to what going through them one by one comes to, in as many rounds as
    the longest chain of boxes that decide about each other (Zheng et al. 2021, Cluster-NMS, proposition 1).
    """
    if torch.compiler.is_exporting():  # as one operator, for which ONNX has its own
        left: Tensor = torch.ops.cnnrun.non_maximum_suppression(boxes_BM4, scores_BM, labels_BM, most)
        return left
    if hasattr(torch.ops.torchvision, "nms"):  # where torchvision is loaded: many times as fast
        return _one_by_one(boxes_BM4, scores_BM, labels_BM, most)
    area = box_areas(boxes_BM4)
    # both / (one + other - both) > most, without dividing
    beats = _in_common(boxes_BM4, boxes_BM4) * (1 + most) > (area[:, :, None] + area[:, None]) * most
    beats &= labels_BM[:, :, None] == labels_BM[:, None]
    beats = beats.triu(1).to(boxes_BM4.dtype)
    kept = torch.ones_like(boxes_BM4[..., 0])
    while True:
        now = ((kept[:, None] @ beats)[:, 0] == 0).to(kept.dtype)
        if torch.equal(now, kept):
            return kept.bool()
        kept = now


def _one_by_one(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, most: float) -> Tensor:
    """Suppress by torchvision's operator, image by image, with classes moved apart until no two of them overlap."""
    kept = torch.zeros_like(labels_BM, dtype=torch.bool)
    apart = labels_BM * (boxes_BM4.amax() - boxes_BM4.amin() + 1).double()  # in float64 no box loses a bit by it
    moved, scores = boxes_BM4.double() + apart[:, :, None], scores_BM.double()
    for row in range(len(kept)):
        kept[row, torch.ops.torchvision.nms(moved[row], scores[row], most)] = True
    return kept


@torch.library.custom_op("cnnrun::non_maximum_suppression", mutates_args=())
def _operator(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, most: float) -> Tensor:
    return non_maximum_suppression(boxes_BM4, scores_BM, labels_BM, most)


@_operator.register_fake
def _shaped(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, most: float) -> Tensor:
    return torch.empty_like(scores_BM, dtype=torch.bool)


def pad_to(values_BN: Tensor, size: int, fill: float) -> Tensor:
    """At least `size` along the second dimension."""
    missing = size - values_BN.shape[1]
    if missing <= 0:
        return values_BN
    return torch.cat([values_BN, values_BN.new_full((values_BN.shape[0], missing, *values_BN.shape[2:]), fill)], 1)
