"""Sources of images with boxes: the split that a list of annotated images becomes, and the checks of its boxes.

A split gives the boxes themselves, or only what they add up to: counts or presence of the classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.objects import OBJECT, ObjectTable
from cnnrun.contracts.source import BadBox, BoxTreatment, SourceContents, SourceSpec, Split
from cnnrun.contracts.target_kind import UNKNOWN, TargetKind
from cnnrun.data.sources.annotated_images import AnnotatedImage, Box
from cnnrun.data.sources.segmentations import draw_masks

_ROUNDING_PX = 1.0  # a box may reach this far out of its image without being reported
_MAX_OBJECTS = 10_000  # in one image
_TARGET_KINDS = {
    "boxes": TargetKind.BOXES,
    "counts": TargetKind.NUMBERS,
    "presence": TargetKind.LABEL_SETS,
    "masks": TargetKind.MASKS,
}

BoxProblem = tuple[str, str, BoxTreatment]  # kind, details, treatment: see BadBox


class BoxSource(SourceSpec):
    """A source of images with boxes."""

    give: Literal["boxes", "counts", "presence"] = "boxes"
    """The targets of an image: its boxes, the number of objects of each class (for `regress`), or which classes it \
shows (for `multilabel`)."""

    @property
    def target_kind(self) -> TargetKind:
        return _TARGET_KINDS[self.give]

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        contents = self.read_boxes()
        if self.give == "boxes":
            return contents
        if self.target_kind is TargetKind.MASKS:
            return _without_boxes(contents, self.kind)
        class_count = len(contents.classes)
        if not class_count:
            raise DataError(f"data.source.{self.kind}: no image has an object, so there is no class to count")
        counts = {name: _count_objects(split, class_count) for name, split in contents.splits.items()}
        if self.give == "counts":
            targets = {name: {"numbers": counts_NK} for name, counts_NK in counts.items()}
            contents = replace(contents, classes=(), class_ids=(), number_names=contents.classes)
        else:
            targets = {name: {"present": counts_NK > 0} for name, counts_NK in counts.items()}
        splits = {
            name: replace(split, targets=targets[name], objects=None, sizes=None)
            for name, split in contents.splits.items()
        }
        return replace(contents, splits=splits)

    def read_boxes(self) -> SourceContents:
        """Read the annotations; image files are listed, not decoded. Raises DataError if the source cannot be used."""
        raise NotImplementedError


def mask_classes(names: Sequence[str]) -> tuple[str, ...]:
    """The classes of masks of these objects: `background`, which one of them may be named, and then the others.

    Raises DataError if there are more than a mask can tell apart.
    """
    classes = "background", *(name for name in names if name != "background")
    if len(classes) >= UNKNOWN:
        raise DataError(f"{len(classes):,} classes with the background; `give: masks` takes at most {UNKNOWN - 1}")
    return classes


def _without_boxes(contents: SourceContents, kind: str) -> SourceContents:
    """The contents with masks alone. Raises DataError if no training image shows an object."""
    train = contents.splits["train"].objects
    if train is None or not (train.columns["roles"] == OBJECT).any():
        raise DataError(f"data.source.{kind}: no training image has an object, so every pixel is background")
    splits = {name: replace(split, objects=None, sizes=None) for name, split in contents.splits.items()}
    return replace(contents, splits=splits, class_ids=())


def _count_objects(split: Split, class_count: int) -> Tensor:
    """The number of objects of each class in each image, float32 [N, K]; difficult objects and crowds do not count."""
    assert split.objects is not None
    is_object = split.objects.columns["roles"] == OBJECT
    cells = split.objects.image_index_M[is_object] * class_count + split.objects.columns["objects"][is_object]
    return torch.bincount(cells, minlength=len(split) * class_count).view(-1, class_count).float()


def build_split(
    name: str, images: Sequence[AnnotatedImage], origin: str, mask_labels: Sequence[int] | None = None
) -> tuple[Split, list[BadBox]]:
    """The split that the images make, and the boxes that are wrong or doubtful.

    With `mask_labels`, the class index of each label in masks, the usable objects are drawn as masks.
    Raises DataError if the boxes are in other units than pixels, or if an image has more than 10,000 objects.
    """
    _refuse_other_units(images)
    boxes_by_image, bad_boxes = [], []
    for image in images:
        boxes, first_of_corners = list[Box](), dict[tuple[float, ...], Box]()
        for box in image.boxes:
            problem = _box_problem(box, image.size)
            is_used = problem is None or problem[2] != "left out"
            if is_used:
                problem = _repeat_problem(box, first_of_corners.setdefault(box.corners, box)) or problem
                boxes.append(box)
            if problem:
                bad_boxes.append(BadBox(name, escape(f"{image.where}: {box.id}"), *problem))
        if len(boxes) > _MAX_OBJECTS:
            raise DataError(f"{escape(image.where)}: {len(boxes):,} objects in one image; at most {_MAX_OBJECTS:,}")
        boxes_by_image.append(boxes)
    sizes_N2 = np.array([image.size for image in images], np.int64).reshape(-1, 2)
    files = Files([image.path for image in images])
    objects = build_object_table(boxes_by_image, sizes_N2)
    masks = None if mask_labels is None else draw_masks(images, boxes_by_image, mask_labels, origin)
    return Split(files, {}, origin, sizes=sizes_N2, objects=objects, masks=masks), bad_boxes


def build_object_table(boxes_by_image: Sequence[Sequence[Box]], sizes_N2: np.ndarray) -> ObjectTable:
    """The boxes of each image, cut at the image's edges; `sizes_N2` are heights and widths in pixels."""
    boxes = [box for image_boxes in boxes_by_image for box in image_boxes]
    counts = np.array([len(image_boxes) for image_boxes in boxes_by_image], np.int64)
    edges = np.tile(sizes_N2[:, ::-1], 2).repeat(counts, 0)
    corners = np.array([box.corners for box in boxes], np.float64).reshape(-1, 4).clip(0, edges)
    annotated_areas = np.array([math.nan if box.area is None else box.area for box in boxes], np.float64)
    box_areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    columns = {
        "boxes": corners.astype(np.float32),
        "objects": np.array([box.label for box in boxes], np.int64),
        "roles": np.array([box.role for box in boxes], np.uint8),
        "areas": np.where(np.isnan(annotated_areas), box_areas, annotated_areas).astype(np.float32),
    }
    ends = torch.from_numpy(np.r_[0, counts.cumsum()])
    return ObjectTable({name: torch.from_numpy(values) for name, values in columns.items()}, ends)


def _repeat_problem(box: Box, first: Box) -> BoxProblem | None:
    """Problem of a box whose corners its image had before; None if `box` is the first with these corners."""
    if first is box:
        return None
    return f"the same box {'and' if first.label == box.label else 'with another'} class", f"as {first.id}", "kept"


def _box_problem(box: Box, size: HeightWidth) -> BoxProblem | None:
    """Problem of a box on its own, or None."""
    x1, y1, x2, y2 = box.corners
    height, width = size
    written = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not all(map(math.isfinite, box.corners)):
        return "a box with a coordinate that is not finite", written, "left out"
    if x2 < x1 or y2 < y1:
        return "a box with its corners swapped, or of negative size", written, "left out"
    if x2 == x1 or y2 == y1:
        return "a box of no area", written, "left out"
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return "a box outside its image", f"of {width}x{height} {written}", "left out"
    if min(x1, y1) < -_ROUNDING_PX or x2 > width + _ROUNDING_PX or y2 > height + _ROUNDING_PX:
        return "a box that reaches out of its image", f"of {width}x{height} {written}", "cut"
    return None


def _iterate_boxes(images: Sequence[AnnotatedImage]) -> Iterator[tuple[AnnotatedImage, Box]]:
    return ((image, box) for image in images for box in image.boxes)


def _refuse_other_units(images: Sequence[AnnotatedImage]) -> None:
    """Raise DataError if the boxes look like fractions of the image, or like corners in the place of sizes."""
    first = next(_iterate_boxes(images), None)
    if first is None:
        return
    where = escape(first[0].where)
    if all(max(box.corners) <= 1 for _, box in _iterate_boxes(images)):
        raise DataError(f"{where}: all boxes lie within 0..1; write them in pixels")
    count = outside = fit_as_corners = 0
    for image, box in _iterate_boxes(images):
        x1, y1, x2, y2 = box.corners
        height, width = image.size
        count += 1
        if x2 > width + _ROUNDING_PX or y2 > height + _ROUNDING_PX:
            outside += 1
            fit_as_corners += x2 - x1 <= width and y2 - y1 <= height and x2 - x1 > x1 and y2 - y1 > y1
    if outside > max(1, 0.01 * count) and fit_as_corners > 0.9 * outside:
        raise DataError(
            f"{where}: {outside:,} of {count:,} boxes reach out of their images, and would not "
            "if they were written as x1, y1, x2, y2; COCO's bbox is x, y, width, height"
        )
