"""YOLO's layout: folders `images` and `labels`, with a text file for each image, and a `data.yaml` with the classes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from cnnrun.base.bounded_files import read_text
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.source import ClassNames, SourceContents, Split
from cnnrun.data.image_files import image_errors, read_image_bytes, read_image_header
from cnnrun.data.image_names import choose_images
from cnnrun.data.sources.annotated_images import AnnotatedImage, Box
from cnnrun.data.sources.box_lists import BoxSource, build_split, mask_classes
from cnnrun.data.split_names import parse_split_name

_SPLITS = ("train", "val", "test")
_CONFIG_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_MAX_OUTSIDE = 0.01  # a fraction of the image that a rounded coordinate may lie outside of it
_BOX_NUMBERS, _MIN_POLYGON_NUMBERS = 4, 6


class Yolo(BoxSource):
    """`images/` and `labels/`, with lines of class, centre, width and height as fractions, and a `data.yaml`."""

    kind = "yolo"
    main = "path"

    give: Literal["boxes", "counts", "presence", "masks"] = "boxes"  # type: ignore[assignment]
    """The targets of an image: its `boxes`, the `counts` of its objects of each class, the `presence` of the classes, \
or `masks`, the class of each pixel, if the lines are polygons."""

    path: str
    """The `data.yaml`, or the folder that holds it; a folder without one needs `classes`."""
    root: str | None = None
    """The folder that the paths in `data.yaml` start from; by default the one that it lies in."""
    classes: ClassNames | None = None
    """The classes in the order of their numbers; by default the `names` of `data.yaml`."""

    @property
    def has_declared_classes(self) -> bool:
        return True  # labels are numbers, so the classes are listed

    def read_boxes(self) -> SourceContents:
        description = self._read_description()
        has_masks, names = self.give == "masks", tuple(description.classes)
        reader = _LabelReader(description.root, len(names), has_masks)
        classes = mask_classes(names) if has_masks else names
        mask_labels = list(map(classes.index, names)) if has_masks else None
        splits: dict[str, Split] = {}
        bad_boxes = []
        for name, folders in description.folders.items():
            images = reader.read_images([path for folder in folders for path in _list_split(description.root, folder)])
            splits[name], split_bad_boxes = build_split(name, images, str(description.root), mask_labels)
            bad_boxes += split_bad_boxes
        reader.say_notes()
        return SourceContents(classes, splits, tuple(bad_boxes))

    def _read_description(self) -> _Description:
        """The classes and the folders of the splits. Raises DataError."""
        path = Path(self.path)
        if path.is_dir():
            files = [path / name for name in _CONFIG_NAMES if (path / name).is_file()]
            if not files:
                return self._describe_folder(path)
            path = files[0]
        content = _read_yaml(path)
        if "kpt_shape" in content:  # a line of a pose would be taken for a polygon
            raise DataError(f"{escape(str(path))}: kpt_shape: lines with key points are not read; remove these numbers")
        root = Path(self.root) if self.root else path.parent
        if not root.is_dir():
            raise DataError(f"{escape(str(root))}: no such folder (data.source.yolo.root)")
        classes = self.classes or _parse_names(path, content)
        folders = {}
        for split in _SPLITS:
            entry = content.get("val", content.get("valid")) if split == "val" else content.get(split)
            if entry is not None:
                entries = entry if isinstance(entry, list) else [entry]
                folders[split] = [_resolve(path, root, split, text, content.get("path")) for text in entries]
        if "train" not in folders:
            raise DataError(f"{escape(str(path))}: has no `train`")
        return _Description(root, classes, folders)

    def _describe_folder(self, path: Path) -> _Description:
        """A folder without a data.yaml: its `images`, with a folder for each split or none, or `train/images`."""
        within = {split: folder for split in _SPLITS if (folder := _split_folder(path, split))}
        if not (path / "images").is_dir() and "train" not in within:
            raise DataError(f"{escape(str(path))}: has neither a data.yaml nor a folder `images`")
        if not self.classes:
            raise DataError(
                f"{escape(str(path))}: has no data.yaml; give data.source.yolo.classes, in the order of their numbers"
            )
        if not (path / "images").is_dir():
            return _Description(path, self.classes, {split: [f"{name}/images"] for split, name in within.items()})
        named = {split: [f"images/{split}"] for split in _SPLITS if (path / "images" / split).is_dir()}
        return _Description(path, self.classes, named or {"train": ["images"]})


@dataclass(frozen=True)
class _Description:
    """The root, the classes, and the folders or list files of each split, relative to the root."""

    root: Path
    classes: list[str]
    folders: dict[str, list[str]]


def _split_folder(root: Path, split: str) -> str | None:
    """The name of the folder of a split that has a folder `images`; None without one."""
    names = sorted(path.name for path in root.iterdir() if (path / "images").is_dir())
    return next((name for name in names if parse_split_name(name) == split), None)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a data.yaml. Raises DataError."""
    try:
        content = yaml.safe_load(read_text(path, DataError))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{escape(str(path))}: not YAML: {escape(reason)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{escape(str(path))}: not a data.yaml: needs train, val and names")
    return content


def _parse_names(path: Path, content: dict[str, Any]) -> list[str]:
    """The classes under `names`, a list or a mapping from numbers. Raises DataError."""
    names, where = content.get("names"), escape(str(path))
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise DataError(f"{where}: names: its numbers are not 0 to {len(names) - 1}")
        names = [names.get(number, names.get(str(number))) for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{where}: needs names, a list of classes")
    texts = [str(name).strip() if isinstance(name, str | int) and not isinstance(name, bool) else "" for name in names]
    for number, text in enumerate(texts):
        if not text or not text.isprintable():
            raise DataError(
                f"{where}: names: number {number} is {escape(repr(names[number])[:80])}; write a text in quotes"
            )
    if repeated := [text for text in texts if texts.count(text) > 1]:
        raise DataError(f"{where}: names: {escape(repeated[0])!r} is there twice")
    count = content.get("nc")
    if count is not None and count != len(texts):
        raise DataError(f"{where}: nc is {escape(str(count))}, but there are {format_count(len(texts), 'name')}")
    return texts


def _resolve(file: Path, root: Path, split: str, text: Any, base: Any) -> str:
    """A split's folder or list relative to the root, from `text` and the file's own `path`. Raises DataError."""
    where = f"{escape(str(file))}: {split}"
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected a folder or a list of images")
    candidates = [text]
    if isinstance(base, str):
        candidates.insert(0, str(PurePosixPath(base) / text))
    if text.startswith("../"):  # Roboflow's files lie beside the folders that they name so
        candidates.append(text.removeprefix("../"))
    problem_of = path_checker(root)
    for candidate in candidates:
        cleaned = os.path.normpath(candidate)
        if cleaned == "." or (problem_of(cleaned) is None and (root / cleaned).exists()):
            return cleaned
    reason = problem_of(os.path.normpath(text)) or f"is not in {escape(str(root))}"
    raise DataError(f"{where}: {escape(text)!r} {reason}; data.source.yolo.root is the folder that it starts from")


def _list_split(root: Path, entry: str) -> list[Path]:
    """The images of a folder, sorted, or those that a text file lists. Raises DataError."""
    path = root / entry
    if path.is_file():
        return _read_list(root, path)
    files = [
        str(file)
        for file in path.rglob("*")
        if file.is_file() and not any(map(is_hidden_or_system_name, file.relative_to(path).parts))
    ]
    images = sorted(map(Path, choose_images(files)))
    if not images:
        raise DataError(f"{escape(str(path))}: no images")
    return images


def _read_list(root: Path, path: Path) -> list[Path]:
    """The images that a text file lists, a path from the root in each line. Raises DataError."""
    problem_of, problems, images = path_checker(root), list[str](), list[Path]()
    for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
        if not (text := line.strip()):
            continue
        cleaned = os.path.normpath(text)
        problem = problem_of(cleaned) or (None if (root / cleaned).is_file() else "is not there")
        if problem:
            problems.append(f"{escape(str(path))}:{number}: {escape(text)!r} {problem}")
        images.append(root / cleaned)
    check_problems(problems)
    if not images:
        raise DataError(f"{escape(str(path))}: lists no images")
    if len(set(images)) < len(images):
        raise DataError(f"{escape(str(path))}: lists an image twice")
    return images


class _LabelReader:
    """Reader of images with their label files; counts what it says at the end."""

    def __init__(self, root: Path, class_count: int, needs_polygons: bool) -> None:
        self._root, self._class_count, self._needs_polygons = root, class_count, needs_polygons
        self._unlabelled, self._polygons = list[str](), 0

    def read_images(self, paths: list[Path]) -> list[AnnotatedImage]:
        """Read the boxes of images. Raises DataError with a line for each file that cannot be used."""
        problems: list[str] = []
        with ThreadPoolExecutor(processor_count()) as pool:
            sizes = list(pool.map(_read_size, paths))
        images = []
        for path, size in zip(paths, sizes, strict=True):
            if isinstance(size, DataError):
                problems += size.lines
                continue
            labels = self._label_path(path)
            boxes = list(self._read_boxes(labels, size, problems)) if labels.is_file() else []
            if not labels.is_file():
                self._unlabelled.append(path.name)
            images.append(AnnotatedImage(str(path), size, str(labels), boxes))
        check_problems(problems)
        return images

    def say_notes(self) -> None:
        """Say which images have no label file, and how many polygons were read as boxes, if they were."""
        where = escape(str(self._root))
        if self._unlabelled:
            count, example = format_count(len(self._unlabelled), "image"), escape(self._unlabelled[0])
            say(f"{where}: {count} without a label file, such as {example!r}: background, without objects")
        if self._polygons and not self._needs_polygons:
            say(f"{where}: {format_count(self._polygons, 'polygon')} read as the boxes around them")

    def _label_path(self, image: Path) -> Path:
        """The label file of an image: below `labels` instead of the last `images` of its path, or else beside it."""
        parts = list(image.relative_to(self._root).parts)
        folders = [index for index, part in enumerate(parts[:-1]) if part == "images"]
        if folders:
            parts[folders[-1]] = "labels"
        return (self._root / Path(*parts)).with_suffix(".txt")

    def _read_boxes(self, path: Path, size: HeightWidth, problems: list[str]) -> Iterator[Box]:
        for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
            if not (words := line.split()):
                continue
            try:
                yield self._parse_line(words, size, number)
            except _LineError as error:
                problems.append(f"{escape(str(path))}:{number}: {error}")

    def _parse_line(self, words: list[str], size: HeightWidth, number: int) -> Box:
        label = int(words[0]) if words[0].isascii() and words[0].isdecimal() else -1
        if not 0 <= label < self._class_count:
            raise _LineError(f"class {escape(words[0])[:40]!r} is not a number from 0 to {self._class_count - 1}")
        fractions = [_parse_fraction(word) for word in words[1:]]
        rows, columns = size
        polygon: list[float] | None = None
        if len(fractions) == _BOX_NUMBERS and self._needs_polygons:
            raise _LineError("a box; `give: masks` needs polygons")
        if len(fractions) == _BOX_NUMBERS:
            x, y, width, height = fractions
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        elif len(fractions) >= _MIN_POLYGON_NUMBERS and len(fractions) % 2 == 0:
            self._polygons += 1
            polygon = [value * side for value, side in zip(fractions, itertools.cycle((columns, rows)), strict=False)]
            corners = (min(fractions[::2]), min(fractions[1::2]), max(fractions[::2]), max(fractions[1::2]))
        else:
            counted = format_count(len(fractions), "number")
            raise _LineError(f"{counted} after the class; expected centre x, centre y, width, height, or a polygon")
        x1, y1, x2, y2 = corners
        pixels = (x1 * columns, y1 * rows, x2 * columns, y2 * rows)
        return Box(pixels, label, id=f"line {number}", segmentation=polygon and [polygon])


class _LineError(Exception):
    """A mistake in a line of a label file."""


def _parse_fraction(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -_MAX_OUTSIDE <= value <= 1 + _MAX_OUTSIDE:
        raise _LineError(f"{escape(word)[:40]!r} is not a fraction of the image, from 0 to 1")
    return value


def _read_size(path: Path) -> HeightWidth | DataError:
    """Height and width of the upright image in a file, or why it cannot be read."""
    try:
        with image_errors(str(path)):
            return read_image_header(read_image_bytes(path)).size
    except DataError as error:
        return error
