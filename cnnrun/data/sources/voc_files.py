"""Strict reading of Pascal VOC annotation files: whatever is not understood is an error and never ignored."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from xml.parsers import expat

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.image_files import image_errors, read_image_bytes, read_image_header
from cnnrun.data.image_names import choose_images

_MAX_XML_BYTES = 16 << 20
_MAX_DEPTH, _MAX_ELEMENTS = 64, 500_000  # of the XML tree
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_DIFFICULT_VALUES = {"0": False, "1": True, "false": False, "true": True, "unspecified": False}
_MAX_SIDE_PX = 1_000_000
# The elements that are read. The same name in another case is refused because it would be ignored silently.
_TAGS = ("annotation", "filename", "size", "width", "height", "object", "name", "difficult", "bndbox", *_SIDES)
_BOX_PARENTS = ("object", "part")


@dataclass(frozen=True)
class VocAnnotation:
    """The content of an annotation file: the image's path and size; label, difficult and corners of each object."""

    path: str
    size: HeightWidth
    where: str
    objects: list[tuple[str, bool, list[float]]]


class VocFolder:
    """A folder of annotations and one of images within `root`, and what was read from them."""

    def __init__(self, root: Path, annotations: str, images: str) -> None:
        self._root, self._path_problem = root, path_checker(root)
        self._annotation_folder, self._image_folder = annotations, images
        self._annotations = _files_by_stem(root / annotations, _choose_annotations)
        self._images = _files_by_stem(root / images, choose_images)
        self._annotation_of_image: dict[str, str] = {}
        self._guesses: list[str] = []

    def annotation_names(self) -> set[str]:
        """The names of the annotation files, without their suffix."""
        return set(self._annotations)

    def read(self, name: str, problems: list[str]) -> VocAnnotation | None:
        """Read the annotation file of an image. If it cannot be used, add the reason to `problems` and return None."""
        files = self._annotations.get(name, [f"{name}.xml"])
        where = self._root / self._annotation_folder / files[0]
        if problem := self._path_problem(f"{self._annotation_folder}/{files[0]}"):
            problems.append(f"{escape(str(self._root))}: the name {escape(name)!r} {problem}")
            return None
        try:
            if len(files) > 1:
                raise _AnnotationError(f"differs from {escape(files[1])} in its suffix alone; remove one of them")
            tree = _parse_xml(where)
            _check_elements(tree)
            path = self._find_image(name, (tree.findtext("filename") or "").strip())
            if (earlier := self._annotation_of_image.setdefault(str(path), files[0])) != files[0]:
                problem = f"describes {escape(path.name)}, as {escape(earlier)} does"
                raise _AnnotationError(f"{problem}; an image has one annotation file")
            size = _image_size(tree, path)
            return VocAnnotation(str(path), size, str(where), [_read_object(child) for child in tree.iter("object")])
        except _AnnotationError as error:
            problems.append(f"{escape(str(where))}: {error}")
            return None

    def _find_image(self, name: str, written: str) -> Path:
        """The image `written` in the annotation file, else the one with the annotation file's own name."""
        file = PureWindowsPath(written).name  # some tools write the whole path, with / or \
        same_stem = self._images.get(os.path.splitext(file)[0], [])  # noqa: PTH122
        candidates = [file] if file in same_stem else self._images.get(name, [])
        if not candidates:
            folder = escape(str(self._root / self._image_folder))
            raise _AnnotationError(f"no image {escape(file or name)!r} in {folder}")
        if len(candidates) > 1:
            problem = f"its <filename> {escape(file)!r} is not there" if file else "has no <filename>"
            problem += f", and several images have the annotation's own name: {' and '.join(map(escape, candidates))}"
            raise _AnnotationError(f"{problem}; write one of them into <filename>")
        image = candidates[0]
        if file and file != image:
            self._guesses.append(f"{name}.xml for {file}")
        if path_problem := self._path_problem(f"{self._image_folder}/{image}"):
            raise _AnnotationError(f"its image {path_problem}")
        return self._root / self._image_folder / image

    def say_guesses(self, *, all_are_read: bool) -> None:
        """Say which images were found by the annotation's own name and, if all files are read, which have none."""
        where = escape(str(self._root))
        if self._guesses:
            count = format_count(len(self._guesses), "annotation file")
            say(
                f"{where}: the <filename> of {count} is not there; the image with the annotation's own name is used, "
                f"such as {escape(self._guesses[0])}"
            )
        annotated = {Path(path).name for path in self._annotation_of_image}
        unannotated = sorted(name for names in self._images.values() for name in names if name not in annotated)
        if unannotated and all_are_read:
            say(
                f"{where}: left out {format_count(len(unannotated), 'image')} without an annotation file, such as "
                f"{escape(unannotated[0])!r}; an image without objects needs a file without <object>"
            )


def _choose_annotations(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(".xml") and not is_hidden_or_system_name(name)]


def _files_by_stem(folder: Path, choose: Callable[[Iterable[str]], list[str]]) -> dict[str, list[str]]:
    """The files in a folder that `choose` chooses, by their names without the suffix."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(choose(os.listdir(folder)), key=os.fsencode):  # noqa: PTH208
        files[os.path.splitext(name)[0]].append(name)  # noqa: PTH122
    return dict(files)


class _AnnotationError(Exception):
    """A mistake in an annotation file."""


def _check_elements(tree: ElementTree.Element) -> None:
    """Raise _AnnotationError for an element that may describe an object and would be ignored."""
    for element in tree.iter():
        if element.tag.startswith("{"):
            namespace = escape(element.tag[1:].partition("}")[0])
            raise _AnnotationError(f"its elements are in a namespace ({namespace}); remove it")
        if element.tag not in _TAGS and (known := element.tag.casefold()) in _TAGS:
            raise _AnnotationError(f"has <{escape(element.tag)}>, which is not read; write <{known}>")
    if tree.tag != "annotation":
        raise _AnnotationError(f"is a <{escape(tree.tag)}> and not an <annotation>")
    boxes = sum(1 for _ in tree.iter("bndbox"))
    if boxes != sum(len(parent.findall("bndbox")) for tag in _BOX_PARENTS for parent in tree.iter(tag)):
        raise _AnnotationError("has a <bndbox> outside of any <object>")
    for child in tree:
        if child.tag not in _TAGS and not child.findall(".//object") and _count_numbers(child) >= len(_SIDES):
            raise _AnnotationError(f"has a <{escape(child.tag)}> that may be an object; objects are written <object>")


def _count_numbers(element: ElementTree.Element) -> int:
    """The number of elements and attributes in `element` whose text is a number."""
    count = 0
    for text in (text for child in element.iter() for text in (child.text or "", *child.attrib.values())):
        try:
            count += _parse_xml_number(text) is not None
        except ValueError:
            continue
    return count


def _parse_xml(path: Path) -> ElementTree.Element:
    try:
        data = read_bytes(path, DataError, _MAX_XML_BYTES)
    except DataError as error:
        raise _AnnotationError(str(error).removeprefix(f"{escape(str(path))}: ")) from None
    try:
        _check_xml_size(data)
        return ElementTree.fromstring(data)  # noqa: S314
    except (
        expat.ExpatError,
        ElementTree.ParseError,
        ValueError,
        LookupError,
    ) as error:  # LookupError: an unknown encoding
        raise _AnnotationError(f"not XML in UTF-8: {error}") from None


def _check_xml_size(data: bytes) -> None:
    """Raise _AnnotationError for XML with a document type or a tree far larger than an annotation's.

    The check runs on the parser's events, so that it holds in any encoding and before a tree is built.
    """
    depth = elements = 0

    def refuse_document_type(*arguments: object) -> None:  # its entities can expand without limit
        raise _AnnotationError("declares a document type, which annotations do not need")

    def enter_element(name: str, attributes: object) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > _MAX_DEPTH or elements > _MAX_ELEMENTS:
            raise _AnnotationError(f"has more than {_MAX_ELEMENTS:,} elements, or more than {_MAX_DEPTH} levels")

    def leave_element(name: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler = refuse_document_type, refuse_document_type
    parser.StartElementHandler, parser.EndElementHandler = enter_element, leave_element
    parser.Parse(data, True)


def _image_size(tree: ElementTree.Element, path: Path) -> HeightWidth:
    """Height and width from the annotation file, or from the image's header if the file has none."""
    try:
        height, width = (int(_parse_xml_number(tree.findtext(f"size/{side}") or "0")) for side in ("height", "width"))
    except (ValueError, OverflowError):
        raise _AnnotationError("has a size that is not a number") from None
    size = height, width
    if max(size) > _MAX_SIDE_PX:
        raise _AnnotationError(f"has an image of {width}x{height} pixels; at most {_MAX_SIDE_PX:,} a side")
    if min(size) > 0:
        return size
    try:
        with image_errors(str(path)):
            return read_image_header(read_image_bytes(path)).size
    except DataError as error:
        raise _AnnotationError(error.lines[0]) from None


def _read_object(element: ElementTree.Element) -> tuple[str, bool, list[float]]:
    """Label, difficult and corners of an <object>. Raises _AnnotationError if one is missing, repeated or malformed."""
    for tag in ("name", "bndbox", "difficult", *(f"bndbox/{side}" for side in _SIDES)):
        if len(element.findall(tag)) > 1:
            raise _AnnotationError(f"has an object with more than one <{tag.rpartition('/')[2]}>")
    label = (element.findtext("name") or "").strip()
    if not label:
        raise _AnnotationError("has an object without a name")
    try:
        corners = [_parse_xml_number(element.findtext(f"bndbox/{side}") or "") for side in _SIDES]
    except ValueError:
        raise _AnnotationError(f"the bndbox of a {escape(label)!r} needs numbers for {', '.join(_SIDES)}") from None
    difficult = (element.findtext("difficult") or "0").strip().lower()
    if difficult not in _DIFFICULT_VALUES:
        raise _AnnotationError(f"difficult is {escape(difficult)!r}; expected 0 or 1")
    return label, _DIFFICULT_VALUES[difficult], corners


def _parse_xml_number(text: str) -> float:
    """The number in a text. Raises ValueError for `1_0` too, which Python's own `float` takes for ten."""
    if "_" in text:
        raise ValueError(text)
    return float(text)
