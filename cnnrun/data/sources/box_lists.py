"""Pictures with boxes as a source lists them -> a split; what is wrong with the boxes; and what they say in sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.objects import OBJECT, ObjectTable
from cnnrun.contracts.source import BadBox, SourceContents, SourceSpec, Split

_ROUNDING = 1.0  # pixels that a box may reach out of its picture without a word
_MOST = 10_000  # objects of one picture


class BoxSource(SourceSpec):
    """A source of pictures with boxes."""

    give: Literal["boxes", "counts", "presence"] = "boxes"
    """What is told of a picture: its boxes, how many objects of each class it has (to `regress`), or which classes \
are there at all (`multilabel`)."""

    @property
    def target_kind(self) -> str:
        return {"boxes": "boxes", "counts": "numbers", "presence": "label sets"}[self.give]

    def read(self, apart: bool = False) -> SourceContents:
        indexed = self.read_boxes()
        if self.give == "boxes":
            return indexed
        count = len(indexed.classes)
        if not count:
            raise DataError(f"data.source.{self.kind}: no picture has an object, so there is nothing to tell of it")
        if self.give == "counts":
            splits = {name: _told(split, {"numbers": _counts(split, count)}) for name, split in indexed.splits.items()}
            return replace(indexed, splits=splits, classes=(), class_ids=(), number_names=indexed.classes)
        splits = {name: _told(split, {"present": _counts(split, count) > 0}) for name, split in indexed.splits.items()}
        return replace(indexed, splits=splits)

    def read_boxes(self) -> SourceContents:
        """Look through the source; files are listed, not decoded. Raises DataError."""
        raise NotImplementedError


def _told(split: Split, targets: dict[str, Tensor]) -> Split:
    return replace(split, targets=targets, objects=None, sizes=None)


def _counts(split: Split, classes: int) -> Tensor:
    """Objects of each class in each picture, float32 [N, K]: those that are to be found."""
    assert split.objects is not None
    real = split.objects.columns["roles"] == OBJECT
    cells = split.objects.image_index_M[real] * classes + split.objects.columns["objects"][real]
    return torch.bincount(cells, minlength=len(split) * classes).view(-1, classes).float()


@dataclass(frozen=True)
class Box:
    """A box as it is written: x1, y1, x2, y2 in pixels; `role` as in `average_precision`; `id` names it in its file."""

    corners: tuple[float, float, float, float]
    label: int
    role: int = 0
    id: str = ""
    area: float | None = None


@dataclass
class AnnotatedImage:
    """A picture file with its boxes; `where` names the file that the boxes are written in."""

    path: str
    size: HeightWidth
    where: str
    boxes: list[Box] = field(default_factory=list)


def build_split(name: str, pictures: Sequence[AnnotatedImage], origin: str) -> tuple[Split, list[BadBox]]:
    """The pictures as a split, their boxes padded to equal numbers, and the boxes that are not as they should be."""
    _refuse_other_units(pictures)
    kept, bad = [], []
    for picture in pictures:
        rows, first = list[Box](), dict[tuple[float, ...], Box]()
        for box in picture.boxes:
            what, used = _wrong(box, picture.size)
            if used and (again := _again(box, first.setdefault(box.corners, box))):
                what = again
            if what:
                bad.append(BadBox(name, escape(f"{picture.where}: {box.id}"), what, used))
            if used:
                rows.append(box)
        if len(rows) > _MOST:
            raise DataError(f"{escape(picture.where)}: {len(rows):,} objects in one picture; at most {_MOST:,}")
        kept.append(rows)
    sizes = np.array([picture.size for picture in pictures], np.int64).reshape(-1, 2)
    files = Files([picture.path for picture in pictures])
    return Split(files, {}, origin, sizes=sizes, objects=build_object_table(kept, sizes)), bad


def build_object_table(rows: Sequence[Sequence[Box]], sizes_N2: np.ndarray) -> ObjectTable:
    """The boxes of each picture, cut at the edges of pictures of those sizes (height, width)."""
    flat = [box for row in rows for box in row]
    counts = np.array([len(row) for row in rows], np.int64)
    edges = np.tile(sizes_N2[:, ::-1], 2).repeat(counts, 0)
    corners = np.array([box.corners for box in flat], np.float64).reshape(-1, 4).clip(0, edges)
    given = np.array([math.nan if box.area is None else box.area for box in flat], np.float64)
    own = (corners[:, 2:] - corners[:, :2]).prod(1)
    columns = {
        "boxes": corners.astype(np.float32),
        "objects": np.array([box.label for box in flat], np.int64),
        "roles": np.array([box.role for box in flat], np.uint8),
        "areas": np.where(np.isnan(given), own, given).astype(np.float32),
    }
    ends = torch.from_numpy(np.r_[0, counts.cumsum()])
    return ObjectTable({name: torch.from_numpy(values) for name, values in columns.items()}, ends)


def _again(box: Box, first: Box) -> str | None:
    """The doubt about a box whose picture had it before, whatever its class; None for the first itself."""
    if first is box:
        return None
    return f"the same box {'and' if first.label == box.label else 'with another'} class as {first.id}"


def _wrong(box: Box, size: HeightWidth) -> tuple[str | None, bool]:
    """The fault of a box, if it has one; and True if the part of it inside the picture can be used."""
    x1, y1, x2, y2 = box.corners
    height, width = size
    shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not all(map(math.isfinite, box.corners)):
        return f"a box of no numbers {shown}", False
    if x2 < x1 or y2 < y1:
        return f"a box with its corners swapped, or of negative size {shown}", False
    if x2 == x1 or y2 == y1:
        return f"a box of no area {shown}", False
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return f"a box outside its picture of {width}x{height} {shown}", False
    if min(x1, y1) < -_ROUNDING or x2 > width + _ROUNDING or y2 > height + _ROUNDING:
        return f"a box that reaches out of its picture of {width}x{height} {shown}", True
    return None, True


def _all(pictures: Sequence[AnnotatedImage]) -> Iterator[tuple[AnnotatedImage, Box]]:
    return ((picture, box) for picture in pictures for box in picture.boxes)


def _refuse_other_units(pictures: Sequence[AnnotatedImage]) -> None:
    """Raises DataError where all boxes together look as if they were written in another way than the format's."""
    first = next(_all(pictures), None)
    if first is None:
        return
    if all(max(box.corners) <= 1 for _, box in _all(pictures)):
        raise DataError(f"{escape(first[0].where)}: all boxes lie within 0..1; write them in pixels")
    out, count, otherwise = 0, 0, 0
    for picture, box in _all(pictures):
        x1, y1, x2, y2 = box.corners
        height, width = picture.size
        count += 1
        if x2 > width + _ROUNDING or y2 > height + _ROUNDING:
            out += 1
            otherwise += x2 - x1 <= width and y2 - y1 <= height and x2 - x1 > x1 and y2 - y1 > y1
    if out > max(1, 0.01 * count) and otherwise > 0.9 * out:
        raise DataError(
            f"{escape(first[0].where)}: {out:,} of {count:,} boxes reach out of their pictures, and would not "
            "if they were written as x1, y1, x2, y2; COCO's bbox is x, y, width, height"
        )
