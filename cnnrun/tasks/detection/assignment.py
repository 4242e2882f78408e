"""Task-aligned assignment of cells to the objects they learn (TOOD, Feng et al. 2021), with static shapes.

A cell whose centre lies in an object is aligned with it by score^alpha * overlap^beta. Each object takes its `top_k`
best aligned cells; a cell that several objects take learns the one it overlaps most. The target of a cell's score, its
quality, is its alignment, scaled so that the object's best cell has the object's best overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.base.boxes import intersection_over_union
from cnnrun.contracts.objects import OBJECT
from cnnrun.contracts.task_parts import Targets

_EPS = 1e-9


@dataclass(frozen=True)
class Assignment:
    """For each cell: the index of its object among the image's M, whether it learns one, and its quality (0 to 1).

    `has_loss_BA` is false for background cells in an ignored object, which have no loss.
    """

    object_BA: Tensor
    foreground_BA: Tensor
    quality_BA: Tensor
    has_loss_BA: Tensor


@dataclass(frozen=True)
class Objects:
    """Objects of a batch's images, padded to M: `real` ones are learned, `ignored` ones (crowds, difficult) are not."""

    boxes_BM4: Tensor
    labels_BM: Tensor
    real_BM: Tensor
    ignored_BM: Tensor


@dataclass(frozen=True)
class AssignmentSettings:
    """Number of cells for an object, and the exponents of score (`alpha`) and overlap (`beta`) in the alignment."""

    top_k: int
    alpha: float
    beta: float


@torch.no_grad()
def assign_cells(
    scores_BAK: Tensor, boxes_BA4: Tensor, cells_BA3: Tensor, objects: Objects, settings: AssignmentSettings
) -> Assignment:
    """Assign cells to objects for these predicted scores and boxes; `cells_BA3` has each cell's x, y and stride."""
    is_inside_BMA = _is_inside(cells_BA3, objects.boxes_BM4)
    is_candidate_BMA = is_inside_BMA & objects.real_BM[:, :, None]
    classes_BMA = objects.labels_BM.clamp(min=0)[:, :, None].expand(-1, -1, scores_BAK.shape[1])
    overlap_BMA = intersection_over_union(objects.boxes_BM4, boxes_BA4) * is_candidate_BMA
    align_BMA = scores_BAK.mT.gather(1, classes_BMA).pow(settings.alpha) * overlap_BMA.pow(settings.beta)
    # A candidate without overlap still ranks before cells that are no candidates.
    rank_BMA = torch.where(is_candidate_BMA, align_BMA + _EPS, 0.0)
    best, indices = rank_BMA.topk(min(settings.top_k, rank_BMA.shape[2]), 2)
    is_top_BMA = torch.zeros_like(is_candidate_BMA).scatter_(2, indices, best > 0)

    top_overlap_BMA = torch.where(is_top_BMA, overlap_BMA, -1.0)
    max_overlap_BA, object_BA = top_overlap_BMA.max(1)
    foreground_BA = max_overlap_BA >= 0
    is_assigned_BMA = torch.zeros_like(is_top_BMA).scatter_(1, object_BA[:, None], foreground_BA[:, None])
    align, overlap = align_BMA * is_assigned_BMA, overlap_BMA * is_assigned_BMA
    scale = overlap.amax(2) / align.amax(2).clamp(min=_EPS)
    quality_BA = (align * scale[:, :, None]).amax(1)

    is_ignored_BA = (is_inside_BMA & objects.ignored_BM[:, :, None]).any(1)
    return Assignment(object_BA, foreground_BA, quality_BA, foreground_BA | ~is_ignored_BA)


def _is_inside(cells_BA3: Tensor, boxes_BM4: Tensor) -> Tensor:
    """True where a cell's centre lies in a box, enlarged to at least one stride on each side: bool [B, M, A]."""
    x, y, stride = (column[:, None] for column in cells_BA3.unbind(2))
    x1, y1, x2, y2 = (column[:, :, None] for column in boxes_BM4.unbind(2))
    width, height = torch.maximum(x2 - x1, stride), torch.maximum(y2 - y1, stride)
    return (2 * x - x1 - x2).abs().lt(width) & (2 * y - y1 - y2).abs().lt(height)


def batch_objects(targets: Targets) -> Objects:
    """The objects of a batch's targets. Padding is neither real nor ignored."""
    is_box = targets["objects"] >= 0
    real = is_box & (targets["roles"] == OBJECT)
    return Objects(targets["boxes"], targets["objects"], real, is_box & ~real)
