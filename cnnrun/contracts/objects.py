"""The objects of many pictures: one after the other, padded only in a batch.

A tensor as wide as the most crowded picture of a split would be empty almost everywhere: one picture of 3,000 boxes
among 4,000 made 341 MiB of 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECT_COLUMNS = ("boxes", "objects", "roles", "areas")
OBJECT, DIFFICULT, CROWD = 0, 1, 2  # roles: to be found, neither to be found nor wrong, or a region of many
_FILL = {"objects": -1}  # of the places that a picture does not need; 0 elsewhere
_PICTURES_AT_ONCE = 1024


@dataclass(frozen=True)
class ObjectTable:
    """Columns over all objects: boxes [M, 4], objects (labels) [M], roles [M], areas [M]; `ends_N1` part the pictures.

    The objects of picture n are `ends_N1[n]` to `ends_N1[n + 1]`.
    """

    columns: dict[str, Tensor]
    ends_N1: Tensor

    def __len__(self) -> int:
        return len(self.ends_N1) - 1

    @property
    def counts_N(self) -> Tensor:
        """How many objects each picture has."""
        return self.ends_N1.diff()

    @property
    def image_index_M(self) -> Tensor:
        """The picture that each object is of."""
        return torch.arange(len(self)).repeat_interleave(self.counts_N)

    def select(self, rows: Tensor) -> ObjectTable:
        """The objects of those pictures, given by numbers or by a mask."""
        numbers = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        counts = self.counts_N[numbers]
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = torch.arange(int(ends[-1])) + (self.ends_N1[numbers] - ends[:-1]).repeat_interleave(counts)
        return ObjectTable({name: values[places] for name, values in self.columns.items()}, ends)

    def pad(self, rows: Tensor | None = None, width: int | None = None) -> dict[str, Tensor]:
        """The columns of those pictures as [B, W, ...], by default as wide as the most crowded, and 1 at least."""
        rows = torch.arange(len(self)) if rows is None else rows
        counts, starts = self.counts_N[rows], self.ends_N1[rows]
        place = torch.arange(width or padded_width(counts))
        held = place < counts[:, None]
        places = (starts[:, None] + place)[held]
        made = {}
        for name, values in self.columns.items():
            made[name] = values.new_full((*held.shape, *values.shape[1:]), _FILL.get(name, 0))
            made[name][held] = values[places]
        return made

    def padded_blocks(self) -> Iterator[dict[str, Tensor]]:
        """What `padded` gives for all pictures, some of them at a time."""
        width = padded_width(self.counts_N)
        for rows in torch.arange(len(self)).split(_PICTURES_AT_ONCE):
            yield self.pad(rows, width)


def padded_width(counts_N: Tensor) -> int:
    """How wide a tensor must be that holds so many objects of each picture."""
    return max(1, int(counts_N.max())) if len(counts_N) else 1
