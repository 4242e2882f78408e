"""The objects of many images, stored one after the other and padded only in a batch.

A tensor padded to the largest number of objects in a split would be almost empty: one image with 3,000 boxes in a split
of 4,000 images raised the size from 9 MiB to 341 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECT_COLUMNS = ("boxes", "objects", "roles", "areas")
OBJECT, DIFFICULT, CROWD = 0, 1, 2  # roles: to be found, ignored whether found or not, or a region of many objects
_PADDING = {"objects": -1}  # value of unused entries; 0 for the other columns
_BLOCK_IMAGES = 1024


@dataclass(frozen=True)
class ObjectTable:
    """Columns over all objects: boxes [M, 4], objects (their labels) [M], roles [M], areas [M].

    The objects of image n are the rows `offsets_N1[n]` to `offsets_N1[n + 1] - 1`; the first offset is 0.
    """

    columns: dict[str, Tensor]
    offsets_N1: Tensor

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def counts_N(self) -> Tensor:
        """Number of objects in each image."""
        return self.offsets_N1.diff()

    @property
    def image_index_M(self) -> Tensor:
        """Index of the image of each object."""
        return torch.arange(len(self)).repeat_interleave(self.counts_N)

    def select(self, images: Tensor) -> ObjectTable:
        """Return the objects of some images; `images` are their indices, or a mask over all images."""
        images = images.nonzero()[:, 0] if images.dtype == torch.bool else images
        counts = self.counts_N[images]
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        object_rows = torch.arange(int(ends[-1])) + (self.offsets_N1[images] - ends[:-1]).repeat_interleave(counts)
        return ObjectTable({name: values[object_rows] for name, values in self.columns.items()}, ends)

    def pad(self, images: Tensor | None = None, width: int | None = None) -> dict[str, Tensor]:
        """Return the columns of the images at these indices as padded tensors [B, W, ...].

        By default these are all images, and the width W is their largest number of objects, but at least 1.
        """
        images = torch.arange(len(self)) if images is None else images
        counts, starts = self.counts_N[images], self.offsets_N1[images]
        position = torch.arange(width or padded_width(counts))
        is_object = position < counts[:, None]
        object_rows = (starts[:, None] + position)[is_object]
        padded = {}
        for name, values in self.columns.items():
            padded[name] = values.new_full((*is_object.shape, *values.shape[1:]), _PADDING.get(name, 0))
            padded[name][is_object] = values[object_rows]
        return padded

    def padded_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Padded columns of all images, 1,024 images at a time, all of the same width."""
        width = padded_width(self.counts_N)
        for images in torch.arange(len(self)).split(_BLOCK_IMAGES):
            yield self.pad(images, width)


def padded_width(counts_N: Tensor) -> int:
    """Width of a padded tensor for images with these numbers of objects; at least 1."""
    return max(1, int(counts_N.max())) if len(counts_N) else 1
