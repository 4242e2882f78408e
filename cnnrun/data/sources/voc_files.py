"""Annotation files of Pascal VOC's kind, read strictly: what is not understood is named and never passed over."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from xml.parsers import expat

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import is_clutter
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.image_files import image_errors, is_image_name, read_image_bytes, read_image_header

_MAX_XML = 16 << 20
_DEEPEST, _MOST_ELEMENTS = 64, 500_000  # of the elements of an annotation file
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_TRUTHS = {"0": False, "1": True, "false": False, "true": True, "unspecified": False}
_LARGEST = 1_000_000  # pixels of a side
# The elements that are read; in another spelling they would be passed over.
_READ = ("annotation", "filename", "size", "width", "height", "object", "name", "difficult", "bndbox", *_SIDES)
_MAY_HOLD_BOXES = ("object", "part")
_NUMBERS_OF_A_BOX = 4


@dataclass(frozen=True)
class VocAnnotation:
    """The content of an annotation file: the picture's path and size; label, difficult and corners of each object."""

    path: str
    size: HeightWidth
    where: str
    objects: list[tuple[str, bool, list[float]]]


class VocFolder:
    """The folders `Annotations` and `JPEGImages`: which files are there, and what is read of them."""

    def __init__(self, root: Path) -> None:
        self._root, self._inside = root, path_checker(root)
        self._annotations = _by_stem(root / "Annotations", lambda name: name.lower().endswith(".xml"))
        self.pictures = _by_stem(root / "JPEGImages", is_image_name)
        self._taken: dict[str, str] = {}
        self._guessed: list[str] = []

    def annotation_names(self) -> set[str]:
        """The names of the annotation files, without their suffix."""
        return set(self._annotations)

    def read(self, name: str, problems: list[str]) -> VocAnnotation | None:
        """Read a picture's annotation file; None, with the reason among the problems, where it cannot be used."""
        files = self._annotations.get(name, [f"{name}.xml"])
        where = self._root / "Annotations" / files[0]
        if problem := self._inside(f"Annotations/{files[0]}"):
            problems.append(f"{escape(str(self._root))}: the name {escape(name)!r} {problem}")
            return None
        try:
            if len(files) > 1:
                raise _Wrong(f"stands beside {escape(files[1])}; one of them is to be removed")
            tree = _parsed(where)
            _check_elements(tree)
            path = self._picture(name, (tree.findtext("filename") or "").strip())
            if (before := self._taken.setdefault(str(path), files[0])) != files[0]:
                raise _Wrong(f"is of {escape(path.name)}, as {escape(before)} is; a picture has one annotation file")
            return VocAnnotation(
                str(path), _size(tree, path), str(where), [_object(each) for each in tree.iter("object")]
            )
        except _Wrong as wrong:
            problems.append(f"{escape(str(where))}: {wrong}")
            return None

    def _picture(self, name: str, written: str) -> Path:
        """The picture that the file names; where it names none that is there, the one that is called as it is."""
        file = PureWindowsPath(written).name  # some tools write the whole path, in the way of either system
        there = self.pictures.get(os.path.splitext(file)[0], [])  # noqa: PTH122
        chosen = [file] if file in there else self.pictures.get(name, [])
        if not chosen:
            raise _Wrong(f"no picture {escape(file or name)!r} in {escape(str(self._root / 'JPEGImages'))}")
        if len(chosen) > 1:
            which = f"names {escape(file)!r}, which is not there" if file else "names no picture"
            raise _Wrong(f"{which}; {' and '.join(map(escape, sorted(chosen)))} are")
        if file and file != chosen[0]:
            self._guessed.append(f"{name}.xml for {file}")
        if problem := self._inside(f"JPEGImages/{chosen[0]}"):
            raise _Wrong(f"its picture {problem}")
        return self._root / "JPEGImages" / chosen[0]

    def say_guesses(self, *, all_are_read: bool) -> None:
        """Say which pictures were taken for others, and, where all files are read, which have none."""
        where = escape(str(self._root))
        if self._guessed:
            say(
                f"{where}: {len(self._guessed):,} annotation file(s) name a picture that is not there; the one of "
                f"their own name is taken, such as {escape(self._guessed[0])}"
            )
        taken = {Path(path).name for path in self._taken}
        bare = sorted(name for names in self.pictures.values() for name in names if name not in taken)
        if bare and all_are_read:
            say(
                f"{where}: {len(bare):,} picture(s) without an annotation file are left out, such as "
                f"{escape(bare[0])!r}; for one without objects there must be a file without <object>"
            )


def _by_stem(folder: Path, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
    """The files in a folder by their names without the suffix."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(folder), key=os.fsencode):  # noqa: PTH208
        if wanted(name) and not is_clutter(name):
            found[os.path.splitext(name)[0]].append(name)  # noqa: PTH122
    return dict(found)


class _Wrong(Exception):
    """A fault of an annotation file."""


def _check_elements(tree: ElementTree.Element) -> None:
    """Raises _Wrong for what may say something about objects and would be passed over."""
    for element in tree.iter():
        if element.tag.startswith("{"):
            raise _Wrong(f"its elements are of a namespace ({escape(element.tag[1:].partition('}')[0])}); remove it")
        if element.tag not in _READ and (meant := element.tag.casefold()) in _READ:
            raise _Wrong(f"has <{escape(element.tag)}>, which is not read; write <{meant}>")
    if tree.tag != "annotation":
        raise _Wrong(f"is a <{escape(tree.tag)}> and no <annotation>")
    boxes = sum(1 for _ in tree.iter("bndbox"))
    if boxes != sum(len(parent.findall("bndbox")) for kind in _MAY_HOLD_BOXES for parent in tree.iter(kind)):
        raise _Wrong("has a <bndbox> outside of any <object>")
    for child in tree:
        if child.tag not in _READ and not child.findall(".//object") and _numbers_in(child) >= _NUMBERS_OF_A_BOX:
            raise _Wrong(f"has a <{escape(child.tag)}> that may be an object; objects are written <object>")


def _numbers_in(element: ElementTree.Element) -> int:
    """How many elements and attributes within hold a number."""
    count = 0
    for text in (text for inner in element.iter() for text in (inner.text or "", *inner.attrib.values())):
        try:
            count += _number(text) is not None
        except ValueError:
            continue
    return count


def _parsed(path: Path) -> ElementTree.Element:
    try:
        data = read_bytes(path, DataError, _MAX_XML)
    except DataError as error:
        raise _Wrong(str(error).removeprefix(f"{escape(str(path))}: ")) from None
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


def _size(tree: ElementTree.Element, path: Path) -> HeightWidth:
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
        with image_errors(str(path)):
            return read_image_header(read_image_bytes(path))[0]
    except DataError as error:
        raise _Wrong(error.lines[0]) from None


def _object(tree: ElementTree.Element) -> tuple[str, bool, list[float]]:
    for tag in ("name", "bndbox", "difficult", *(f"bndbox/{side}" for side in _SIDES)):
        if len(tree.findall(tag)) > 1:
            raise _Wrong(f"an object with more than one <{tag.rpartition('/')[2]}>")
    label = (tree.findtext("name") or "").strip()
    if not label:
        raise _Wrong("an object without a name")
    try:
        corners = [_number(tree.findtext(f"bndbox/{side}") or "") for side in _SIDES]
    except ValueError:
        raise _Wrong(f"the bndbox of a {escape(label)!r} lacks a number for {', '.join(_SIDES)}") from None
    difficult = (tree.findtext("difficult") or "0").strip().lower()
    if difficult not in _TRUTHS:
        raise _Wrong(f"difficult is {escape(difficult)!r}; expected 0 or 1")
    return label, _TRUTHS[difficult], corners


def _number(text: str) -> float:
    """A number as XML has it: Python's own reading takes `1_0` for ten."""
    if "_" in text:
        raise ValueError(text)
    return float(text)
