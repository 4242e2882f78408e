"""Pascal VOC's layout: one XML file for each image, one list of names for each split."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cnnrun.base.bounded_files import read_text
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.base.user_paths import path_checker
from cnnrun.contracts.objects import DIFFICULT, OBJECT
from cnnrun.contracts.source import BadBox, ClassNames, SourceContents, Split
from cnnrun.data.image_names import is_image_name
from cnnrun.data.sources.annotated_images import AnnotatedImage, Box
from cnnrun.data.sources.box_lists import BoxSource, build_split
from cnnrun.data.sources.voc_files import VocAnnotation, VocFolder
from cnnrun.data.split_names import parse_split_name

SplitName = Literal["train", "val", "test"]


class Voc(BoxSource):
    """`root/Annotations/*.xml`, `root/JPEGImages/`, and lists of names in `root/ImageSets/Main/`.

    With a folder for each split, `annotations` and `images` name those, and there are no lists.
    """

    kind = "voc"
    main = "root"

    root: str
    annotations: str | dict[SplitName, str] = "Annotations"
    """The folder of the XML files within `root`, or that of each split; `.` is the root itself."""
    images: str | dict[SplitName, str] = "JPEGImages"
    """The folder of the images within `root`, or that of each split."""
    classes: ClassNames | None = None
    """The classes in the order of their labels; by default those of the training split, sorted."""
    splits: dict[SplitName, str] | None = None
    """The list of each split; by default train.txt, val.txt and test.txt. Without lists `data.split` divides."""
    difficult: Literal["ignore", "keep"] = "ignore"
    """How to treat objects marked difficult: `ignore` neither learns nor counts them, as VOC does; `keep` does both."""
    first_pixel: int = Field(0, ge=0, le=1)
    """The coordinate of an image's first pixel: 1 in VOC's own files, 0 in files of most tools."""

    @model_validator(mode="after")
    def _check_folders(self) -> Self:
        annotations, images = self.annotations, self.images
        if isinstance(annotations, dict) and isinstance(images, dict) and "train" in annotations:
            if set(annotations) != set(images):
                raise ValueError("annotations and images name different splits")
            if self.splits:
                raise ValueError("splits are lists of one folder; annotations has a folder for each split")
        elif isinstance(annotations, dict) or isinstance(images, dict):
            raise ValueError("give both annotations and images one folder, or both a folder for train and other splits")
        return self

    def read_boxes(self) -> SourceContents:
        root = Path(self.root)
        annotations = self._read_folders(root) if isinstance(self.annotations, dict) else self._read_lists(root)
        classes = self.classes or sorted({label for image in annotations["train"] for label, *_ in image.objects})
        label_index = {label: k for k, label in enumerate(classes)}
        splits: dict[str, Split] = {}
        bad_boxes: list[BadBox] = []
        problems: list[str] = []
        for split, split_annotations in annotations.items():
            images = [self._annotated_image(annotation, label_index, problems) for annotation in split_annotations]
            check_problems(problems)
            splits[split], split_bad_boxes = build_split(split, images, str(root))
            bad_boxes += split_bad_boxes
        return SourceContents(tuple(classes), splits, tuple(bad_boxes))

    def _read_folders(self, root: Path) -> dict[str, list[VocAnnotation]]:
        """The annotations of each split's folder."""
        assert isinstance(self.annotations, dict)
        assert isinstance(self.images, dict)
        annotations, problems = {}, list[str]()
        for split, name in self.annotations.items():
            folder = _open_folder(root, name, self.images[split])
            names = sorted(folder.annotation_names(), key=os.fsencode)
            annotations[str(split)] = [found for name in names if (found := folder.read(name, problems))]
            folder.say_guesses(all_are_read=True)
        check_problems(problems)
        return annotations

    def _read_lists(self, root: Path) -> dict[str, list[VocAnnotation]]:
        """The annotations of each split's list; all are in train if there are no lists."""
        problems: list[str] = []
        folder = _open_folder(root, str(self.annotations), str(self.images))
        annotations = {
            split: [annotation for name in names if (annotation := folder.read(name, problems))]
            for split, names in self._split_names(root, folder).items()
        }
        check_problems(problems)
        list_names = self._list_names(root)
        folder.say_guesses(all_are_read=not list_names)
        _say_unread_lists(root, list_names)
        return annotations

    def _split_names(self, root: Path, folder: VocFolder) -> dict[str, list[str]]:
        """The names of the images in each split; all are in train if there are no lists."""
        lists, list_names = root / "ImageSets" / "Main", self._list_names(root)
        if not list_names:
            return {"train": sorted(folder.annotation_names(), key=os.fsencode)}
        if "train" not in list_names:
            raise DataError(f"{lists}: no train.txt; name the list of each split with data.source.voc.splits")
        names = {}
        for split, list_name in list_names.items():
            if problem := path_checker(lists)(f"{list_name}.txt"):
                raise DataError(f"splits.{split}: the path {escape(list_name)!r} {problem}")
            lines = read_text(lists / f"{list_name}.txt", DataError).splitlines()
            names[split] = _parse_list(lists / f"{list_name}.txt", lines)
        return names

    def _list_names(self, root: Path) -> dict[str, str]:
        """The name of each split's list, without its suffix; empty if there are no lists."""
        if self.splits:
            return {str(split): name for split, name in self.splits.items()}
        lists = root / "ImageSets" / "Main"
        return {split: split for split in ("train", "val", "test") if (lists / f"{split}.txt").is_file()}

    def _annotated_image(
        self, annotation: VocAnnotation, label_index: dict[str, int], problems: list[str]
    ) -> AnnotatedImage:
        """The image with boxes in pixels from 0; a line is added to `problems` for each object of an unknown class."""
        boxes = []
        for number, (label, is_difficult, corners) in enumerate(annotation.objects, 1):
            if label not in label_index:
                problems.append(
                    f"{escape(annotation.where)}: object {number} is a {escape(label)!r}, which is not a class"
                )
                continue
            x1, y1, x2, y2 = corners
            role = DIFFICULT if is_difficult and self.difficult == "ignore" else OBJECT
            first = self.first_pixel
            boxes.append(Box((x1 - first, y1 - first, x2, y2), label_index[label], role, f"object {number}"))
        return AnnotatedImage(annotation.path, annotation.size, annotation.where, boxes)


def _open_folder(root: Path, annotations: str, images: str) -> VocFolder:
    """Open the folders of annotations and images within the root. Raises DataError if one is missing or outside."""
    for setting, name in (("annotations", annotations), ("images", images)):
        if name != "." and (problem := path_checker(root)(name)):
            raise DataError(f"data.source.voc.{setting}: the path {escape(name)!r} {problem}")
        if not (root / name).is_dir():
            raise DataError(f"{escape(str(root))}: no folder {escape(name)} (data.source.voc.{setting})")
    return VocFolder(root, annotations, images)


def _say_unread_lists(root: Path, list_names: dict[str, str]) -> None:
    """Say which lists are named like a split that has no list, and are not read."""
    main = root / "ImageSets" / "Main"
    read_lists = {main / f"{name}.txt" for name in list_names.values()}
    for path in sorted(path for folder in (root, main.parent, main) for path in folder.glob("*.txt")):
        split = "train" if path.stem == "trainval" else parse_split_name(path.stem)
        if split and split not in list_names and path not in read_lists:
            say(f"{escape(str(path))}: not read; put lists in ImageSets/Main and name them with data.source.voc.splits")


def _parse_list(path: Path, lines: list[str]) -> list[str]:
    """The names of the images in a list. Raises DataError if it is empty, of one class alone, or repeats a name."""
    words = [line.strip().rsplit(None, 1) for line in lines if line.strip()]
    flags = [pair[1] if len(pair) == 2 and pair[1] in ("-1", "0", "1") else "" for pair in words]
    if all(flags) and "-1" in flags:
        raise DataError(f"{path}: a list of one class, with -1 for images without it; give a list of all images")
    names = [pair[0] if flag else " ".join(pair) for pair, flag in zip(words, flags, strict=True)]
    names = [Path(name).stem if is_image_name(name) else name for name in names]
    if not names:
        raise DataError(f"{path}: lists no images")
    if len(set(names)) < len(names):
        repeated = Counter(names).most_common(1)[0][0]
        raise DataError(f"{path}: lists {escape(repeated)!r} twice")
    return names
