"""Which cells learn which objects: task-aligned assignment (TOOD, Feng et al. 2021), all shapes static.

A cell whose middle lies in an object is aligned with it by score^alpha * overlap^beta; each object takes the `top_k`
best of its cells, a cell that several want goes to the one it overlaps most. What a cell's score is to become is how
well it is aligned, scaled so that the object's best cell is to have the object's best overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrun.base.boxes import intersection_over_union

_EPS = 1e-9


@dataclass(frozen=True)
class Assignment:
    """Of each cell: the object it learns (a place among the picture's M), whether it learns one, and how good it is.

    `counted` is false for background cells that lie in a region that is not to be learned.
    """

    object_BA: Tensor
    foreground_BA: Tensor
    quality_BA: Tensor
    has_loss_BA: Tensor


@dataclass(frozen=True)
class Objects:
    """The objects of a batch's pictures, padded to M: `real` to be found, `vague` (crowds, difficult) passed over."""

    boxes_BM4: Tensor
    labels_BM: Tensor
    real_BM: Tensor
    ignored_BM: Tensor


@torch.no_grad()
def assign_cells(
    scores_BAK: Tensor, boxes_BA4: Tensor, place_BA3: Tensor, objects: Objects, top_k: int, alpha: float, beta: float
) -> Assignment:
    """The cells that learn, for these predictions; `place` is each cell's x, y and stride."""
    inside_BMA = _inside(place_BA3, objects.boxes_BM4) & objects.real_BM[:, :, None]
    classes = objects.labels_BM.clamp(min=0)[:, :, None].expand(-1, -1, scores_BAK.shape[1])
    overlap_BMA = intersection_over_union(objects.boxes_BM4, boxes_BA4) * inside_BMA
    align_BMA = scores_BAK.mT.gather(1, classes).pow(alpha) * overlap_BMA.pow(beta)
    # Cells inside are before those that are not, however little they overlap.
    ranked = torch.where(inside_BMA, align_BMA + _EPS, 0.0)
    best, cells = ranked.topk(min(top_k, ranked.shape[2]), 2)
    chosen = torch.zeros_like(inside_BMA).scatter_(2, cells, best > 0)

    wanted = torch.where(chosen, overlap_BMA, -1.0)
    most, owner_BA = wanted.max(1)
    taken_BA = most >= 0
    own = torch.zeros_like(chosen).scatter_(1, owner_BA[:, None], taken_BA[:, None])
    align, overlap = align_BMA * own, overlap_BMA * own
    scale = overlap.amax(2) / align.amax(2).clamp(min=_EPS)
    quality_BA = (align * scale[:, :, None]).amax(1)

    vague = (_inside(place_BA3, objects.boxes_BM4) & objects.ignored_BM[:, :, None]).any(1)
    return Assignment(owner_BA, taken_BA, quality_BA, taken_BA | ~vague)


def _inside(place_BA3: Tensor, boxes_BM4: Tensor) -> Tensor:
    """Whether each cell's middle lies in each box, grown to a stride where it is smaller: bool [B, M, A]."""
    x, y, stride = (each[:, None] for each in place_BA3.unbind(2))
    x1, y1, x2, y2 = (each[:, :, None] for each in boxes_BM4.unbind(2))
    wide, tall = torch.maximum(x2 - x1, stride), torch.maximum(y2 - y1, stride)
    return (2 * x - x1 - x2).abs().lt(wide) & (2 * y - y1 - y2).abs().lt(tall)


def quality_focal_loss(logits_BAK: Tensor, target_BAK: Tensor, gamma: float) -> Tensor:
    """|target - score|^gamma * binary cross-entropy (Li et al. 2020, eq. 1).

    With gamma 0 the cross-entropy, less the target's own, which no score can undercut: 0 where the score is the target.
    """
    loss = F.binary_cross_entropy_with_logits(logits_BAK, target_BAK, reduction="none")
    if gamma:
        return loss * (target_BAK - logits_BAK.sigmoid()).abs().pow(gamma)
    return loss - F.binary_cross_entropy(target_BAK, target_BAK, reduction="none")
