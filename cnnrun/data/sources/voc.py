"""Pascal VOC's layout: an XML file a picture, lists of names a split."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from cnnrun.base.bounded_files import read_text
from cnnrun.base.error_lines import refuse_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.objects import DIFFICULT
from cnnrun.contracts.source import BadBox, ClassNames, SourceContents, Split
from cnnrun.data.image_files import is_image_name
from cnnrun.data.sources.box_lists import AnnotatedImage, Box, BoxSource, build_split
from cnnrun.data.sources.voc_files import VocAnnotation, VocFolder
from cnnrun.data.split_names import parse_split_name


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

    def read_boxes(self) -> SourceContents:
        root = Path(self.root)
        for folder in ("Annotations", "JPEGImages"):
            if not (root / folder).is_dir():
                raise DataError(f"{root}: no folder {folder}")
        problems: list[str] = []
        tree = VocFolder(root)
        found = {
            name: [file for each in names if (file := tree.read(each, problems))]
            for name, names in self._names(root, tree).items()
        }
        refuse_problems(problems)
        tree.say_guesses(all_are_read=not self._lists(root))
        _say_unread_lists(root, self._lists(root))
        classes = self.classes or sorted({label for file in found["train"] for label, *_ in file.objects})
        splits: dict[str, Split] = {}
        bad: list[BadBox] = []
        for name, files in found.items():
            listed = [self._listed(file, {label: k for k, label in enumerate(classes)}, problems) for file in files]
            refuse_problems(problems)
            splits[name], wrong = build_split(name, listed, str(root))
            bad += wrong
        return SourceContents(tuple(classes), splits, tuple(bad))

    def _names(self, root: Path, tree: VocFolder) -> dict[str, list[str]]:
        """The names of each split's pictures."""
        lists, given = root / "ImageSets" / "Main", self._lists(root)
        if not given:
            return {"train": sorted(tree.annotation_names(), key=os.fsencode)}
        if "train" not in given:
            raise DataError(f"{lists}: no train.txt; say with `splits` which list is which")
        names = {}
        for split, name in given.items():
            if problem := path_checker(lists)(f"{name}.txt"):
                raise DataError(f"splits.{split}: the path {escape(name)!r} {problem}")
            lines = read_text(lists / f"{name}.txt", DataError).splitlines()
            names[split] = _listed_names(lists / f"{name}.txt", lines)
        return names

    def _lists(self, root: Path) -> dict[str, str]:
        """The name of each split's list; empty where there are none."""
        if self.splits:
            return {str(key): value for key, value in self.splits.items()}
        lists = root / "ImageSets" / "Main"
        return {name: name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()}

    def _listed(self, file: VocAnnotation, numbers: dict[str, int], problems: list[str]) -> AnnotatedImage:
        boxes = []
        for place, (label, difficult, corners) in enumerate(file.objects, 1):
            if label not in numbers:
                problems.append(f"{escape(file.where)}: object {place} is a {escape(label)!r}, not a class")
                continue
            x1, y1, x2, y2 = corners
            role = DIFFICULT if difficult and self.difficult == "ignore" else 0
            first = self.first_pixel
            boxes.append(Box((x1 - first, y1 - first, x2, y2), numbers[label], role, f"object {place}"))
        return AnnotatedImage(file.path, file.size, file.where, boxes)


def _say_unread_lists(root: Path, given: dict[str, str]) -> None:
    """Say which lists that are called as splits are not read, where they are not another's name for one that is."""
    main = root / "ImageSets" / "Main"
    read = {main / f"{name}.txt" for name in given.values()}
    for path in sorted(path for folder in (root, main.parent, main) for path in folder.glob("*.txt")):
        split = "train" if path.stem == "trainval" else parse_split_name(path.stem)
        if split and split not in given and path not in read:
            where = "ImageSets/Main, where `splits` says which list is which"
            say(f"{escape(str(path))}: not read; the lists of splits that are read lie in {where}")


def _listed_names(path: Path, lines: list[str]) -> list[str]:
    """The pictures that a list names, a line each. Raises DataError for lists of one class, and for names twice."""
    words = [line.strip().rsplit(None, 1) for line in lines if line.strip()]
    flags = [pair[1] if len(pair) == 2 and pair[1] in ("-1", "0", "1") else "" for pair in words]
    if all(flags) and "-1" in flags:
        raise DataError(f"{path}: a list of one class, with -1 for pictures without it; give a list of all")
    names = [pair[0] if flag else " ".join(pair) for pair, flag in zip(words, flags, strict=True)]
    names = [Path(name).stem if is_image_name(name) else name for name in names]
    if not names:
        raise DataError(f"{path}: names no picture")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DataError(f"{path}: names {escape(twice)!r} twice")
    return names
