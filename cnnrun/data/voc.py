"""Pascal VOC's layout: an XML file a picture, lists of names a split."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from xml.parsers import expat

from pydantic import Field

from cnnrun.annotations import Box, BoxSource, Listed, split_of
from cnnrun.bounded_files import read_bytes, read_text
from cnnrun.contracts import BadBox, ClassNames, Indexed, Pair, Split
from cnnrun.errors import DataError, printable
from cnnrun.labelling import jail, refuse
from cnnrun.pictures import SUFFIXES, named, opened_header, read

_MAX_XML = 16 << 20
_DEEPEST, _MOST_ELEMENTS = 64, 500_000  # of the elements of an annotation file
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_DIFFICULT = 1
_TRUTHS = {"0": False, "1": True, "false": False, "true": True, "unspecified": False}
_LONGEST, _LARGEST = 256, 1_000_000  # bytes of a file's name; pixels of a side


class Voc(BoxSource):
    """`root/Annotations/*.xml`, `root/JPEGImages/`, and lists of names in `root/ImageSets/Main/`."""

    kind = "voc"
    main = "root"

    root: str
    classes: ClassNames | None = None
    """The classes in the order wanted; by default those of the training split, sorted."""
    splits: dict[Literal["train", "val", "test"], str] | None = None
    """Which list is which split; by default those that are called so. Without lists `data.split` divides."""
    difficult: Literal["ignore", "keep"] = "ignore"
    """Objects marked difficult: neither learned nor counted, as VOC has it, or objects like others."""
    first_pixel: int = Field(0, ge=0, le=1)
    """The number of the picture's first pixel: 1 in VOC's own files, 0 in what most tools write."""

    def boxed(self) -> Indexed:
        root = Path(self.root)
        for folder in ("Annotations", "JPEGImages"):
            if not (root / folder).is_dir():
                raise DataError(f"{root}: no folder {folder}")
        problems: list[str] = []
        found = {
            name: [file for each in names if (file := _file(root, each, problems))]
            for name, names in self._names(root).items()
        }
        refuse(problems)
        classes = self.classes or sorted({label for file in found["train"] for label, *_ in file.objects})
        splits: dict[str, Split] = {}
        bad: list[BadBox] = []
        for name, files in found.items():
            listed = [self._listed(file, {label: k for k, label in enumerate(classes)}, problems) for file in files]
            refuse(problems)
            splits[name], wrong = split_of(name, listed, str(root))
            bad += wrong
        return Indexed(tuple(classes), splits, tuple(bad))

    def _names(self, root: Path) -> dict[str, list[str]]:
        """The names of each split's pictures."""
        lists = root / "ImageSets" / "Main"
        given = {str(key): value for key, value in (self.splits or {}).items()}
        if not given:
            given = {name: name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()}
        if not given:
            return {"train": sorted((entry.stem for entry in (root / "Annotations").glob("*.xml")), key=os.fsencode)}
        if "train" not in given:
            raise DataError(f"{lists}: no train.txt; say with `splits` which list is which")
        names = {}
        for split, name in given.items():
            if problem := jail(lists)(f"{name}.txt"):
                raise DataError(f"splits.{split}: the path {printable(name)!r} {problem}")
            lines = read_text(lists / f"{name}.txt", DataError).splitlines()
            names[split] = _listed_names(lists / f"{name}.txt", lines)
        return names

    def _listed(self, file: _File, numbers: dict[str, int], problems: list[str]) -> Listed:
        boxes = []
        for place, (label, difficult, corners) in enumerate(file.objects, 1):
            if label not in numbers:
                problems.append(f"{printable(file.where)}: object {place} is a {printable(label)!r}, not a class")
                continue
            x1, y1, x2, y2 = corners
            role = _DIFFICULT if difficult and self.difficult == "ignore" else 0
            first = self.first_pixel
            boxes.append(Box((x1 - first, y1 - first, x2, y2), numbers[label], role, f"object {place}"))
        return Listed(file.path, file.size, file.where, boxes)


def _listed_names(path: Path, lines: list[str]) -> list[str]:
    """The pictures that a list names, a line each. Raises DataError for lists of one class, and for names twice."""
    words = [line.strip().rsplit(None, 1) for line in lines if line.strip()]
    flags = [pair[1] if len(pair) == 2 and pair[1] in ("-1", "0", "1") else "" for pair in words]
    if all(flags) and "-1" in flags:
        raise DataError(f"{path}: a list of one class, with -1 for pictures without it; give a list of all")
    names = [pair[0] if flag else " ".join(pair) for pair, flag in zip(words, flags, strict=True)]
    names = [Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name for name in names]
    if not names:
        raise DataError(f"{path}: names no picture")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"{path}: names {printable(twice)!r} twice")
    return names


class _File:
    """What an annotation file says: the picture's path and size; label, difficult and corners of each object."""

    def __init__(self, path: str, size: Pair, where: str, objects: list[tuple[str, bool, list[float]]]) -> None:
        self.path, self.size, self.where, self.objects = path, size, where, objects


def _file(root: Path, name: str, problems: list[str]) -> _File | None:
    """A picture's annotation file, read; None, with the reason among the problems, where it cannot be."""
    where = root / "Annotations" / f"{name}.xml"
    inside = jail(root)
    if problem := inside(f"Annotations/{name}.xml"):
        problems.append(f"{printable(str(root))}: the name {printable(name)!r} {problem}")
        return None
    try:
        tree = _parsed(where)
        path = _picture(root, name, tree.findtext("filename") or "", inside)
        objects = [_object(each) for each in tree.iter("object")]
        return _File(str(path), _size(tree, path), str(where), objects)
    except _Wrong as wrong:
        problems.append(f"{printable(str(where))}: {wrong}")
        return None


class _Wrong(Exception):
    """What is wrong with an annotation file."""


def _parsed(path: Path) -> ElementTree.Element:
    try:
        data = read_bytes(path, DataError, _MAX_XML)
    except DataError as error:
        raise _Wrong(str(error).removeprefix(f"{printable(str(path))}: ")) from None
    try:
        _look_through(data)
        return ElementTree.fromstring(data)  # noqa: S314
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last for encodings
        raise _Wrong(f"not XML in UTF-8: {error}") from None


def _look_through(data: bytes) -> None:
    """Raises _Wrong for XML whose tree would be far larger than an annotation's, in whatever encoding it is."""
    depth = elements = 0

    def refuse_document_type(*about: object) -> None:  # its entities can grow without end
        raise _Wrong("declares a document type, which annotations do not need")

    def count(name: str, attributes: object) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > _DEEPEST or elements > _MOST_ELEMENTS:
            raise _Wrong(f"more than {_MOST_ELEMENTS:,} elements, or deeper than {_DEEPEST}")

    def leave(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler = refuse_document_type, refuse_document_type
    parser.StartElementHandler, parser.EndElementHandler = count, leave
    parser.Parse(data, True)


def _picture(root: Path, name: str, written: str, inside: Callable[[str], str | None]) -> Path:
    """The file that is called as the XML is, or the one that it names."""
    folder = root / "JPEGImages"
    names = [*(name + end for end in sorted(SUFFIXES)), *([written] if Path(written).name == written else [])]
    for each in names:
        if each and len(os.fsencode(each)) < _LONGEST and (folder / each).is_file():
            if problem := inside(f"JPEGImages/{each}"):
                raise _Wrong(f"its picture {problem}")
            return folder / each
    raise _Wrong(f"no picture {printable(written or name)!r} in {printable(str(folder))}")


def _size(tree: ElementTree.Element, path: Path) -> Pair:
    """Height and width as written; as the picture's own header has them where they are not."""
    try:
        size = int(_number(tree.findtext("size/height") or "0")), int(_number(tree.findtext("size/width") or "0"))
    except (ValueError, OverflowError):
        raise _Wrong("a size that is no number") from None
    if max(size) > _LARGEST:
        raise _Wrong(f"a picture of {size[1]}x{size[0]} pixels")
    if min(size) > 0:
        return size
    try:
        with named(str(path)):
            return opened_header(read(path))[0]
    except DataError as error:
        raise _Wrong(error.lines[0]) from None


def _object(tree: ElementTree.Element) -> tuple[str, bool, list[float]]:
    label = (tree.findtext("name") or "").strip()
    if not label:
        raise _Wrong("an object without a name")
    try:
        corners = [_number(tree.findtext(f"bndbox/{side}") or "") for side in _SIDES]
    except ValueError:
        raise _Wrong(f"the bndbox of a {printable(label)!r} lacks a number for {', '.join(_SIDES)}") from None
    difficult = (tree.findtext("difficult") or "0").strip().lower()
    if difficult not in _TRUTHS:
        raise _Wrong(f"difficult is {printable(difficult)!r}; expected 0 or 1")
    return label, _TRUTHS[difficult], corners


def _number(text: str) -> float:
    """A number as XML has it: Python's own reading takes `1_0` for ten."""
    if "_" in text:
        raise ValueError(text)
    return float(text)
