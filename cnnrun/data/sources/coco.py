"""COCO's layout: one JSON file for each split, with images, boxes and categories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from cnnrun.base.bounded_files import read_json_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.objects import CROWD, OBJECT
from cnnrun.contracts.source import BadBox, SourceContents, Split
from cnnrun.data.sources.annotated_images import AnnotatedImage, Box, Corners, is_coordinate
from cnnrun.data.sources.box_lists import BoxSource, build_split, mask_classes
from cnnrun.data.sources.segmentations import segmentation_corners, segmentation_problem

_MAX_JSON = 1 << 30
_MAX_SIDE_PX = 1_000_000
SplitName = Literal["train", "val", "test"]


class Coco(BoxSource):
    """Boxes and labels in COCO's JSON, or masks from its polygons and run lengths.

    `iscrowd` regions are neither learned nor counted; in masks they are ignored.
    """

    kind = "coco"
    old_keys = {"pictures": "images"}
    main = "train"

    give: Literal["boxes", "counts", "presence", "masks"] = "boxes"  # type: ignore[assignment]
    """The targets of an image: its `boxes`, the `counts` of its objects of each class, the `presence` of the classes, \
or `masks`, the class of each pixel, from polygons and run lengths."""

    train: str
    """The annotation file of the training split."""
    val: str | None = None
    """The annotation file of the validation split."""
    test: str | None = None
    """The annotation file of the test split."""
    images: str | dict[SplitName, str] | None = None
    """The folder that `file_name` starts from, for all splits or for each; by default the annotations' folder."""

    @property
    def has_declared_classes(self) -> bool:
        return True  # the file lists its categories

    def read_boxes(self) -> SourceContents:
        splits: dict[str, Split] = {}
        bad_boxes, ids, names = list[BadBox](), list[int](), list[str]()
        classes: tuple[str, ...] = ()
        for split in ("train", "val", "test"):
            if (path := getattr(self, split)) is None:
                continue
            file = _AnnotationFile(Path(path))
            if split == "train":
                ids, names = list(file.categories), list(file.categories.values())
            elif different := set(file.categories.items()) ^ set(zip(ids, names, strict=True)):
                category_id, name = sorted(different)[0]
                raise DataError(f"{path}: its categories are not the training split's, such as {category_id} {name!r}")
            classes = mask_classes(names) if self.give == "masks" else tuple(names)
            images = file.annotated_images(self._image_folder(split, file.path), ids, self.give == "masks")
            mask_labels = list(map(classes.index, names)) if self.give == "masks" else None
            splits[split], split_bad_boxes = build_split(split, images, path, mask_labels)
            bad_boxes += split_bad_boxes
        return SourceContents(classes, splits, tuple(bad_boxes), tuple(ids))

    def _image_folder(self, split: str, annotations: Path) -> Path:
        written = self.images.get(split) if isinstance(self.images, dict) else self.images  # type: ignore[call-overload]
        folder = Path(written) if written else annotations.parent
        if not folder.is_dir():
            raise DataError(f"{escape(str(folder))}: no such folder (data.source.coco.images)")
        return folder


class _AnnotationFile:
    """An annotation file whose images, annotations and categories were checked. Raises DataError if one is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _read_json(path)
        try:
            self._images, self._annotations, categories = (data[key] for key in ("images", "annotations", "categories"))
        except (KeyError, TypeError):
            raise DataError(f"{path}: not a COCO file: needs images, annotations and categories") from None
        for key, rows in (("images", self._images), ("annotations", self._annotations), ("categories", categories)):
            if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
                raise DataError(f"{path}: {key} is not a list of entries with an id")
            self._check_ids(key, rows)
        self.categories = {row["id"]: row.get("name") for row in sorted(categories, key=lambda row: row["id"])}
        for category_id, name in self.categories.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise DataError(f"{path}: category {category_id}: needs a name, has {escape(repr(name))}")
        if not self.categories or len(set(self.categories.values())) < len(self.categories):
            raise DataError(f"{path}: {'two categories have one name' if self.categories else 'no categories'}")

    def _check_ids(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Raise DataError if an id is not a whole number, or is used twice."""
        seen: set[Any] = set()
        for row in rows:
            if not isinstance(row["id"], int) or isinstance(row["id"], bool):
                raise DataError(f"{self.path}: {key}: the id {escape(str(row['id']))!r} is not a whole number")
            if row["id"] in seen:
                raise DataError(f"{self.path}: {key}: the id {row['id']} is used twice")
            seen.add(row["id"])

    def annotated_images(self, folder: Path, category_ids: list[int], with_masks: bool) -> list[AnnotatedImage]:
        """The images in the file's order, with their boxes; a box's label is its category's place in `category_ids`.

        With masks, the boxes are those around the segmentations, and `bbox` is not read. Raises DataError with a line
        for every image and annotation that cannot be used.
        """
        path_problem, problems, images = path_checker(folder), list[str](), dict[int, AnnotatedImage]()
        first_ids: dict[str, int] = {}
        for row in self._images:
            name, size = str(row.get("file_name", "")), (row.get("height"), row.get("width"))
            first_id = first_ids.setdefault(os.path.normpath(name), row["id"])
            if problem := path_problem(name):
                problems.append(f"{self.path}: image {row['id']}: file_name {escape(name)!r} {problem}")
            elif first_id != row["id"]:  # the objects of either entry would be background in the other
                repeat = f"image {row['id']}: file_name {escape(name)!r} is already that of image {first_id}"
                problems.append(f"{self.path}: {repeat}; give both one id")
            elif not all(type(side) is int and 0 < side <= _MAX_SIDE_PX for side in size):
                problems.append(f"{self.path}: image {row['id']}: needs height and width, has {size}")
            else:
                images[row["id"]] = AnnotatedImage(str(folder / name), size, str(self.path))
        check_problems(problems)
        labels = {category_id: label for label, category_id in enumerate(category_ids)}
        for row in self._annotations:
            if problem := _annotation_problem(row, images, labels, with_masks):
                problems.append(f"{self.path}: annotation {row['id']}: {problem}")
                continue
            role = CROWD if row.get("iscrowd") else OBJECT
            image = images[row["image_id"]]
            box_id = f"annotation {row['id']} of {escape(Path(image.path).name)}"
            segmentation = row["segmentation"] if with_masks else None
            corners = segmentation_corners(segmentation, image.size) if with_masks else _box_corners(row["bbox"])
            image.boxes.append(
                Box(corners, labels[row["category_id"]], role, box_id, row.get("area"), segmentation=segmentation)
            )
        check_problems(problems)
        if ignored := sum(bool(row.get("ignore")) and not row.get("iscrowd") for row in self._annotations):
            counted = format_count(ignored, "annotation")
            say(f"{self.path}: `ignore` has no effect on {counted}; write `iscrowd: 1` to ignore one")
        return list(images.values())


def _box_corners(box: list[float]) -> Corners:
    x, y, width, height = box
    return x, y, x + width, y + height


def _annotation_problem(
    row: dict[str, Any], images: dict[int, AnnotatedImage], labels: dict[int, int], with_masks: bool
) -> str | None:
    """Reason that an annotation is unusable regardless of the position of its box, or None."""
    for key, known in (("image_id", images), ("category_id", labels)):
        if isinstance(row.get(key), str):
            return f"its {key} is the text {escape(row[key])[:80]!r}; expected a whole number"
        if type(row.get(key)) is not int or row[key] not in known:
            return f"its {key} is {escape(str(row.get(key)))[:80]}, but there is no such {key.removesuffix('_id')}"
    box, area = row.get("bbox"), row.get("area")
    if with_masks:
        if problem := segmentation_problem(row.get("segmentation"), images[row["image_id"]].size):
            return problem
    elif not isinstance(box, list) or len(box) != 4 or not all(map(is_coordinate, box)):
        return "bbox is not [x, y, width, height]"
    if area is not None and not (is_coordinate(area) and area >= 0):
        return "its area is not a number of square pixels"
    return None if row.get("iscrowd", 0) in (0, 1) else "iscrowd is neither 0 nor 1"


def _read_json(path: Path) -> Any:
    """The content of a JSON file, read strictly. Raises DataError for NaN, infinities and repeated keys too."""

    def build_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError(f"a key appears twice among {', '.join(sorted(content))[:100]}")
        return content

    def refuse_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    data = read_json_bytes(path, DataError, _MAX_JSON)
    try:
        return json.loads(data, object_pairs_hook=build_dict, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "a number of thousands of digits" if "int_max_str_digits" in str(error) else escape(str(error))
        raise DataError(f"{path}: not JSON: {reason}") from None
