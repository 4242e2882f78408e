"""Boxes as (x1, y1, x2, y2) in pixels: area, intersection over union, non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor


def intersection_over_union(a_BM4: Tensor, b_BN4: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes (a, b) in each image: [B, M, N]; 0 for boxes without area."""
    intersection = _intersections(a_BM4, b_BN4)
    union = box_areas(a_BM4)[:, :, None] + box_areas(b_BN4)[:, None] - intersection
    return intersection / union.clamp(min=1e-9)


def _intersections(a_BM4: Tensor, b_BN4: Tensor) -> Tensor:
    """Area of the intersection of every pair of boxes (a, b) in each image: [B, M, N]."""

    def overlap_along(low: int, high: int) -> Tensor:
        start = torch.maximum(a_BM4[:, :, None, low], b_BN4[:, None, :, low])
        return (torch.minimum(a_BM4[:, :, None, high], b_BN4[:, None, :, high]) - start).clamp_(min=0)

    return overlap_along(0, 2) * overlap_along(1, 3)


def box_areas(boxes_N4: Tensor) -> Tensor:
    """Areas in square pixels: [..., 4] -> [...]."""
    return (boxes_N4[..., 2] - boxes_N4[..., 0]) * (boxes_N4[..., 3] - boxes_N4[..., 1])


def non_maximum_suppression(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, max_overlap: float) -> Tensor:
    """Mask of the boxes that remain after greedy non-maximum suppression per class: bool [B, M].

    Scores must be sorted in descending order along M. A box is suppressed if an earlier remaining box of its class has
    an intersection over union with it above `max_overlap`.
    """
    if torch.compiler.is_exporting():  # as a single operator, which ONNX has
        exported: Tensor = torch.ops.cnnrun.non_maximum_suppression(boxes_BM4, scores_BM, labels_BM, max_overlap)
        return exported
    if hasattr(torch.ops.torchvision, "nms"):  # once torchvision is loaded: many times as fast
        return _suppress_by_torchvision(boxes_BM4, scores_BM, labels_BM, max_overlap)
    area = box_areas(boxes_BM4)
    # intersection / (area a + area b - intersection) > max_overlap, without a division
    suppresses = (
        _intersections(boxes_BM4, boxes_BM4) * (1 + max_overlap) > (area[:, :, None] + area[:, None]) * max_overlap
    )
    return suppress_greedily(suppresses & (labels_BM[:, :, None] == labels_BM[:, None]))


def suppress_greedily(suppresses_BMM: Tensor) -> Tensor:
    """Mask of what remains if each, in order, suppresses those after it, unless it is suppressed itself: bool [B, M].

    `suppresses_BMM[b, i, j]` is True if i would suppress j. The rule is applied to all at once until nothing changes,
    which takes as many rounds as the longest chain (Zheng et al. 2021, Cluster-NMS, proposition 1).
    """
    suppresses = suppresses_BMM.triu(1).float()
    remaining = suppresses.new_ones(suppresses.shape[:2])
    while True:
        updated = ((remaining[:, None] @ suppresses)[:, 0] == 0).float()
        if torch.equal(updated, remaining):
            return remaining.bool()
        remaining = updated


def _suppress_by_torchvision(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, max_overlap: float) -> Tensor:
    """Suppress with torchvision's operator, image by image; boxes are moved so that two classes never overlap."""
    remaining = torch.zeros_like(labels_BM, dtype=torch.bool)
    # In float64 the shift does not round any coordinate.
    class_offset = labels_BM * (boxes_BM4.amax() - boxes_BM4.amin() + 1).double()
    moved, scores = boxes_BM4.double() + class_offset[:, :, None], scores_BM.double()
    for row in range(len(remaining)):
        remaining[row, torch.ops.torchvision.nms(moved[row], scores[row], max_overlap)] = True
    return remaining


@torch.library.custom_op("cnnrun::non_maximum_suppression", mutates_args=())
def _exported_operator(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, max_overlap: float) -> Tensor:
    return non_maximum_suppression(boxes_BM4, scores_BM, labels_BM, max_overlap)


@_exported_operator.register_fake
def _exported_shape(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, max_overlap: float) -> Tensor:
    return torch.empty_like(scores_BM, dtype=torch.bool)


def pad_to(values_BN: Tensor, size: int, fill: float) -> Tensor:
    """Pad with `fill` along the second dimension up to `size`; longer tensors stay as they are."""
    missing = size - values_BN.shape[1]
    if missing <= 0:
        return values_BN
    return torch.cat([values_BN, values_BN.new_full((values_BN.shape[0], missing, *values_BN.shape[2:]), fill)], 1)
