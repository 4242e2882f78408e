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
_NO_OBJECT = 1 << 30  # larger than the number of any object


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


@dataclass(frozen=True)
class _ObjectRows:
    """Objects of all images one after another: the image of each, its number there, and whether it is used."""

    image_N: Tensor
    number_N: Tensor
    is_used_N: Tensor

    def select(self, values_BM: Tensor) -> Tensor:
        """The objects' rows [N, ...] of padded values [B, M, ...]."""
        return values_BM[self.image_N, self.number_N]

    def cells_of_images(self, values_BAF: Tensor) -> Tensor:
        """The cells of each object's image, [N, A, F], of which each column lies together in memory."""
        columns_FBA = values_BAF.permute(2, 0, 1).contiguous()
        return columns_FBA.index_select(1, self.image_N).permute(1, 2, 0)


def _object_rows(is_used_BM: Tensor) -> _ObjectRows:
    """The used objects, so that one crowded image does not make all others as costly.

    On a GPU the padding stays, unused: there the count of the objects is not known without waiting for it.
    """
    return used_rows(is_used_BM) if is_used_BM.device.type == "cpu" else padded_rows(is_used_BM)


def used_rows(is_used_BM: Tensor) -> _ObjectRows:
    """The used objects alone."""
    image_N, number_N = is_used_BM.nonzero(as_tuple=True)
    return _ObjectRows(image_N, number_N, is_used_BM.new_ones(len(image_N)))


def padded_rows(is_used_BM: Tensor) -> _ObjectRows:
    """All objects and the padding."""
    index_N = torch.arange(is_used_BM.numel(), device=is_used_BM.device)
    width = is_used_BM.shape[1]
    return _ObjectRows(index_N // width, index_N % width, is_used_BM.flatten())


@dataclass(frozen=True)
class _Claims:
    """The cells that objects would take, T for each: their overlaps, alignments and places among all cells.

    The places count the cells of all images, and those that an object cannot take have the place after the last.
    """

    place_NT: Tensor
    overlap_NT: Tensor
    align_NT: Tensor


@torch.no_grad()
def assign_cells(
    scores_BAK: Tensor, boxes_BA4: Tensor, cells_BA3: Tensor, objects: Objects, settings: AssignmentSettings
) -> Assignment:
    """Assign cells to objects for these predicted scores and boxes; `cells_BA3` has each cell's x, y and stride."""
    rows = _object_rows(objects.real_BM)
    claims = _claim_cells(scores_BAK, boxes_BA4, _is_inside(cells_BA3, rows, objects), (rows, objects), settings)
    object_BA, quality_BA = _settle_claims(claims, rows.number_N, scores_BAK.shape[:2])
    ignored = _object_rows(objects.ignored_BM)
    ignoring_NA = _is_inside(cells_BA3, ignored, objects).float()
    is_ignored_BA = ignoring_NA.new_zeros(quality_BA.shape).index_add(0, ignored.image_N, ignoring_NA) > 0
    foreground_BA = object_BA >= 0
    return Assignment(object_BA.clamp(min=0), foreground_BA, quality_BA, foreground_BA | ~is_ignored_BA)


def _is_inside(cells_BA3: Tensor, rows: _ObjectRows, objects: Objects) -> Tensor:
    """True where a cell's centre lies in a used box, enlarged to at least one stride on each side: bool [N, A]."""
    x, y, stride = rows.cells_of_images(cells_BA3).unbind(2)
    x1, y1, x2, y2 = (column[:, None] for column in rows.select(objects.boxes_BM4).unbind(1))
    width, height = torch.maximum(x2 - x1, stride), torch.maximum(y2 - y1, stride)
    is_inside_NA = (2 * x - x1 - x2).abs().lt(width) & (2 * y - y1 - y2).abs().lt(height)
    return is_inside_NA & rows.is_used_N[:, None]


def _claim_cells(
    scores_BAK: Tensor,
    boxes_BA4: Tensor,
    is_candidate_NA: Tensor,
    objects: tuple[_ObjectRows, Objects],
    settings: AssignmentSettings,
) -> _Claims:
    """The best aligned candidates of each object."""
    rows, padded = objects
    labels_N = rows.select(padded.labels_BM).clamp(min=0)
    true_N14 = rows.select(padded.boxes_BM4)[:, None]
    overlap_NA = intersection_over_union(true_N14, rows.cells_of_images(boxes_BA4))[:, 0] * is_candidate_NA
    scores_NA = scores_BAK.mT.contiguous().flatten(0, 1)[rows.image_N * scores_BAK.shape[2] + labels_N]
    align_NA = scores_NA.pow(settings.alpha) * overlap_NA.pow(settings.beta)
    # A candidate without overlap still ranks before cells that are no candidates.
    rank_NA = torch.where(is_candidate_NA, align_NA + _EPS, 0.0)
    cell_count = rank_NA.shape[1]
    best_NT, cells_NT = rank_NA.topk(min(settings.top_k, cell_count), 1)
    places_NT = rows.image_N[:, None] * cell_count + cells_NT
    return _Claims(
        torch.where(best_NT > 0, places_NT, len(scores_BAK) * cell_count),
        overlap_NA.gather(1, cells_NT),
        align_NA.gather(1, cells_NT),
    )


def _settle_claims(claims: _Claims, number_N: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Give each cell to the object with which it overlaps most, the first of several: objects [B, A], qualities [B, A].

    The object of a cell that nobody claims is -1.
    """
    places, nobody = claims.place_NT, shape.numel()

    def per_cell(values_NT: Tensor, initial: float, reduce: str) -> Tensor:
        cells = values_NT.new_full((nobody + 1,), initial)
        return cells.scatter_reduce(0, places.flatten(), values_NT.flatten(), reduce)

    is_largest_NT = claims.overlap_NT == per_cell(claims.overlap_NT, -1.0, "amax")[places]
    number_NT = torch.where(is_largest_NT, number_N[:, None], _NO_OBJECT)
    owner = per_cell(number_NT, _NO_OBJECT, "amin")
    is_assigned_NT = (owner[places] == number_NT) & (places < nobody)
    align_NT, overlap_NT = claims.align_NT * is_assigned_NT, claims.overlap_NT * is_assigned_NT
    scale_N = overlap_NT.amax(1) / align_NT.amax(1).clamp(min=_EPS)
    quality = per_cell(align_NT * scale_N[:, None], 0.0, "amax")
    owner = torch.where(owner == _NO_OBJECT, -1, owner)
    return owner[:-1].view(shape), quality[:-1].view(shape)


def batch_objects(targets: Targets) -> Objects:
    """The objects of a batch's targets. Padding is neither real nor ignored."""
    is_box = targets["objects"] >= 0
    real = is_box & (targets["roles"] == OBJECT)
    return Objects(targets["boxes"], targets["objects"], real, is_box & ~real)
