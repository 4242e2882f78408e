"""Masks that a source gives as shapes, polygons or run lengths, and that are drawn where a mask file would be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True)
class DrawnMask:
    """A mask as shapes: its name in messages, and JSON that has `size`, [height, width], and `shapes`.

    A shape is [class, segmentation], and is drawn onto class 0. A segmentation is that of COCO: polygons, or the run
    lengths of a mask.
    """

    name: str
    shapes: bytes

    def __str__(self) -> str:
        return self.name


class DrawnMasks(Sequence[DrawnMask]):
    """The drawn masks of a split, one for each image."""

    def __init__(self, masks: Iterable[DrawnMask]) -> None:
        self._masks = tuple(masks)

    def __len__(self) -> int:
        return len(self._masks)

    def digest(self) -> bytes:
        """SHA-256 of all names and shapes in order."""
        return hashlib.sha256(repr([(mask.name, mask.shapes) for mask in self._masks]).encode()).digest()

    def select(self, indices: Sequence[int]) -> DrawnMasks:
        """The masks at these indices."""
        return DrawnMasks(self._masks[index] for index in indices)

    @overload
    def __getitem__(self, index: int) -> DrawnMask: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[DrawnMask, ...]: ...
    def __getitem__(self, index: int | slice) -> DrawnMask | tuple[DrawnMask, ...]:
        return self._masks[index]
