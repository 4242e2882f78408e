"""COCO's layout: a JSON file a split, with pictures, boxes and categories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from cnnrun.base.bounded_files import read_json_bytes
from cnnrun.base.error_lines import refuse_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.objects import CROWD
from cnnrun.contracts.source import SourceContents, Split
from cnnrun.data.sources.box_lists import AnnotatedImage, Box, BoxSource, build_split

_MAX_JSON = 1 << 30
_LARGEST, _FARTHEST = 1_000_000, 1e12  # pixels of a side; what a number may be
SplitName = Literal["train", "val", "test"]


class Coco(BoxSource):
    """Boxes and labels in COCO's JSON files; `iscrowd` regions are passed over, polygons are not read."""

    kind = "coco"
    main = "train"

    train: str
    """The annotations of the training split."""
    val: str | None = None
    test: str | None = None
    pictures: str | dict[SplitName, str] | None = None
    """The folder that `file_name` starts from, one for all splits or each its own; by default the annotations' own."""

    @property
    def has_declared_classes(self) -> bool:
        return True  # its categories

    def read_boxes(self) -> SourceContents:
        splits: dict[str, Split] = {}
        bad, ids, names = [], [], []
        for name in ("train", "val", "test"):
            if (written := getattr(self, name)) is None:
                continue
            data = _File(Path(written))
            if name == "train":
                ids, names = list(data.categories), list(data.categories.values())
            elif different := set(data.categories.items()) ^ set(zip(ids, names, strict=True)):
                number, label = sorted(different)[0]
                raise DataError(f"{written}: its categories are not the training split's, such as {number} {label!r}")
            splits[name], wrong = build_split(name, data.listed(self._folder(name, data.path), ids), written)
            bad += wrong
        return SourceContents(tuple(names), splits, tuple(bad), tuple(ids))

    def _folder(self, name: str, path: Path) -> Path:
        given = self.pictures.get(name) if isinstance(self.pictures, dict) else self.pictures  # type: ignore[call-overload]
        folder = Path(given) if given else path.parent
        if not folder.is_dir():
            raise DataError(f"{escape(str(folder))}: no such folder (data.source.coco.pictures)")
        return folder


class _File:
    """An annotation file, read and checked: every mistake in it named."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _read(path)
        try:
            self._images, self._annotations, categories = (data[key] for key in ("images", "annotations", "categories"))
        except (KeyError, TypeError):
            raise DataError(f"{path}: not COCO's: needs images, annotations and categories") from None
        for key, rows in (("images", self._images), ("annotations", self._annotations), ("categories", categories)):
            if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
                raise DataError(f"{path}: {key} is no list of entries with an id")
            self._once(key, rows)
        self.categories = {row["id"]: row.get("name") for row in sorted(categories, key=lambda row: row["id"])}
        for number, name in self.categories.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise DataError(f"{path}: category {number}: needs a name, has {escape(repr(name))}")
        if not self.categories or len(set(self.categories.values())) < len(self.categories):
            raise DataError(f"{path}: {'two categories have one name' if self.categories else 'no categories'}")

    def _once(self, key: str, rows: list[dict[str, Any]]) -> None:
        seen: set[Any] = set()
        for row in rows:
            if not isinstance(row["id"], int) or isinstance(row["id"], bool):
                raise DataError(f"{self.path}: {key}: the id {escape(str(row['id']))!r} is no whole number")
            if row["id"] in seen:
                raise DataError(f"{self.path}: {key}: the id {row['id']} stands twice")
            seen.add(row["id"])

    def listed(self, folder: Path, ids: list[int]) -> list[AnnotatedImage]:
        """The pictures in the file's order, with their boxes."""
        inside, problems, found = path_checker(folder), list[str](), dict[int, AnnotatedImage]()
        first: dict[str, int] = {}
        for row in self._images:
            name, size = str(row.get("file_name", "")), (row.get("height"), row.get("width"))
            before = first.setdefault(os.path.normpath(name), row["id"])
            if problem := inside(name):
                problems.append(f"{self.path}: image {row['id']}: file_name {escape(name)!r} {problem}")
            elif before != row["id"]:  # each would be taught the other's objects as background
                what = f"image {row['id']}: file_name {escape(name)!r} stands at image {before} already"
                problems.append(f"{self.path}: {what}; give both one id")
            elif not all(type(side) is int and 0 < side <= _LARGEST for side in size):
                problems.append(f"{self.path}: image {row['id']}: needs height and width, has {size}")
            else:
                found[row["id"]] = AnnotatedImage(str(folder / name), size, str(self.path))
        refuse_problems(problems)
        numbers = {number: k for k, number in enumerate(ids)}
        for row in self._annotations:
            if why := _misplaced(row, found, numbers):
                problems.append(f"{self.path}: annotation {row['id']}: {why}")
                continue
            x, y, width, height = row["bbox"]
            role = CROWD if row.get("iscrowd") else 0
            area = row.get("area")
            of = f"annotation {row['id']} of {escape(Path(found[row['image_id']].path).name)}"
            box = Box((x, y, x + width, y + height), numbers[row["category_id"]], role, of, area)
            found[row["image_id"]].boxes.append(box)
        refuse_problems(problems)
        if ignored := sum(bool(row.get("ignore")) and not row.get("iscrowd") for row in self._annotations):
            say(f"{self.path}: {ignored:,} annotation(s) with `ignore` are objects like others; `iscrowd: 1` is read")
        return list(found.values())


def _misplaced(row: dict[str, Any], images: dict[int, AnnotatedImage], numbers: dict[int, int]) -> str | None:
    """Why an annotation cannot be used, whatever its box."""
    for key, known in (("image_id", images), ("category_id", numbers)):
        if isinstance(row.get(key), str):
            return f"its {key} is the text {escape(row[key])[:80]!r}, and no whole number"
        if type(row.get(key)) is not int or row[key] not in known:
            return f"of {key.removesuffix('_id')} {escape(str(row.get(key)))[:80]}, which is not there"
    box, area = row.get("bbox"), row.get("area")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        return "bbox is not [x, y, width, height]"
    if area is not None and not (_is_number(area) and area >= 0):
        return "its area is no number of square pixels"
    return None if row.get("iscrowd", 0) in (0, 1) else "iscrowd is neither 0 nor 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST


def _read(path: Path) -> Any:
    """A JSON file by the letter: no NaN, no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError(f"a key stands twice among {', '.join(sorted(made))[:100]}")
        return made

    def refused(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    data = read_json_bytes(path, DataError, _MAX_JSON)
    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        why = "a number of thousands of digits" if "int_max_str_digits" in str(error) else escape(str(error))
        raise DataError(f"{path}: not JSON: {why}") from None
