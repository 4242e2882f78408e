"""Guess images with boxes: COCO's JSON, VOC's XML and YOLO's text files, in the places where tools write them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnnrun.base.bounded_files import read_json_bytes, read_text
from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.data.image_names import is_image_name
from cnnrun.data.split_names import parse_split_name
from cnnrun.experiment.init.paths import folders_below, is_file, name_of_path, split_of, subfolders
from cnnrun.experiment.init.reading import Reading

_TASKS = ("detect", "multilabel", "regress")  # of a source with boxes
_MAX_JSON_BYTES = 1 << 30
_CHECKED_NAMES = 200  # file names of an annotation file that are looked for in a folder
_MAX_FOLDERS = 200
_LABEL_DEPTH = 2  # of YOLO's `labels`: in the folder itself, or in that of a split
_NO_MASKS = {"segment": "not all objects have polygons or run lengths; some have only a box"}
_POLYGON_WORDS = 7  # in a line of YOLO: a class and three corners at least
_CLASS_LISTS = ("classes.txt", "obj.names", "labels.txt", "names.txt")


def guess_coco(root: Path, files: list[Path]) -> Reading | None:
    """COCO's JSON files with boxes; a file's split is named in its name or in that of its folder."""
    found: dict[str, tuple[Path, Path]] = {}  # split -> (annotation file, folder of its images)
    counts: Counter[str] = Counter()
    can_segment = True
    for file in files:
        annotations, split = _read_coco(file), _split_of_file(file)
        if annotations is None:
            continue
        names, has_masks = annotations
        images = _find_images(root, file, names, split)
        if images is None:
            continue
        can_segment &= has_masks
        count = sum(is_file(images / name) for name in names)
        if count > counts[split]:  # of two files of one split, that with more images
            found[split], counts[split] = (file, images), count
    if not found:
        return None
    if "train" not in found:  # one file, under any name
        found["train"] = found.pop(next(iter(found)))
    source: dict[str, Any] = {split: str(file) for split, (file, _) in sorted(found.items(), key=_split_order)}
    folders = {split: str(images) for split, (_, images) in found.items()}
    source["images"] = next(iter(folders.values())) if len(set(folders.values())) == 1 else folders
    kind = format_count(len(found), "COCO file")
    reason = f"{kind} with boxes of {format_count(counts.total(), 'image')}"
    tasks = (*_TASKS, "segment") if can_segment else _TASKS
    return Reading({"coco": source}, "detect", reason, name_of_path(root), tasks, why_not=_NO_MASKS)


def _split_order(item: tuple[str, Any]) -> int:
    return ("train", "val", "test").index(item[0])


def _read_coco(file: Path) -> tuple[list[str], bool] | None:
    """The file names in a COCO file with boxes, and whether all of these have masks; None if it is something else."""
    try:
        data = json.loads(read_json_bytes(file, DataError, _MAX_JSON_BYTES))
        if not data["categories"] or not any("bbox" in annotation for annotation in data["annotations"]):
            return None
        names = [str(image["file_name"]) for image in data["images"]]
        return (names, all(annotation.get("segmentation") for annotation in data["annotations"])) if names else None
    except (DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _find_images(root: Path, file: Path, names: list[str], split: str) -> Path | None:
    """The folder that an annotation file's names start from: the one with most of them, of two that of its split."""
    near = [file.parent, root, file.parent.parent, *subfolders(file.parent.parent), *folders_below(root)[:_MAX_FOLDERS]]
    checked = names[:: max(1, len(names) // _CHECKED_NAMES)]

    def rank(folder: Path) -> tuple[int, bool]:
        return sum(is_file(folder / name) for name in checked), split_of(root, folder) == split

    best = max(dict.fromkeys(near), key=rank)
    return best if rank(best)[0] else None


def _split_of_file(file: Path) -> str:
    """The split that a file's name, or else its folder's, names; train if they name none."""
    words = [*re.split(r"[^A-Za-z]+", file.stem), file.parent.name]
    return next((split for word in words if (split := parse_split_name(word))), "train")


def guess_voc(root: Path) -> Reading | None:
    """Folders of XML files with `<annotation>`, beside or near the images that they describe."""
    folders = {folder: files for folder in folders_below(root) if (files := _xml_files(folder))}
    if not folders:
        return None
    source: dict[str, Any] = {"root": str(root)}
    images = {folder: _find_voc_images(root, folder, files) for folder, files in folders.items()}
    pairs = {folder: place for folder, place in images.items() if place is not None}
    if not pairs:
        return None
    splits = {parse_split_name(folder.name) or parse_split_name(folder.parent.name): folder for folder in pairs}
    if len(pairs) > 1 and None not in splits and "train" in splits and len(splits) == len(pairs):
        for key, places in (("annotations", {folder: folder for folder in pairs}), ("images", pairs)):
            named = {split: _relative(places[folder], root) for split, folder in splits.items()}
            source[key] = dict(sorted(named.items(), key=lambda item: _split_order((str(item[0]), None))))
    else:
        annotations = max(pairs, key=lambda folder: len(folders[folder]))
        if (place := _relative(annotations, root)) != "Annotations":
            source["annotations"] = place
        if (place := _relative(pairs[annotations], root)) != "JPEGImages":
            source["images"] = place
        lists = root / "ImageSets" / "Main"
        if not (lists / "train.txt").is_file() and (lists / "trainval.txt").is_file():
            source["splits"] = {"train": "trainval"} | ({"test": "test"} if (lists / "test.txt").is_file() else {})
    reason = f"{format_count(sum(map(len, folders.values())), 'XML file')} describe the objects of images (VOC)"
    return Reading({"voc": source}, "detect", reason, name_of_path(root), _TASKS)


def _xml_files(folder: Path) -> list[Path]:
    """The XML files in a folder; none if the first one does not describe an image."""
    files = sorted(
        path for path in folder.glob("*") if path.suffix.lower() == ".xml" and not is_hidden_or_system_name(path.name)
    )
    if not files:
        return []
    try:
        return files if "<annotation" in read_text(files[0], DataError)[:4096] else []
    except DataError:
        return []


def _find_voc_images(root: Path, annotations: Path, files: list[Path]) -> Path | None:
    """The folder with most images of the annotation files' names, of two that of their split."""
    stems, split = {file.stem for file in files}, split_of(root, annotations)
    counts = {
        place: sum(path.stem in stems and is_image_name(path.name) for path in place.iterdir())
        for place in dict.fromkeys([annotations, *folders_below(root)[:_MAX_FOLDERS]])
    }
    best = max(counts, key=lambda place: (counts[place], split_of(root, place) == split))
    return best if counts[best] else None


def guess_yolo(path: Path) -> Reading | None:
    """A `data.yaml`, or folders `images` and `labels` of text files with five numbers in a line."""
    root = path if path.is_dir() else path.parent
    names = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
    files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    if files and _is_data_yaml(files[0]):
        reason, name, tasks = f"{files[0].name} is YOLO's", name_of_path(root), _yolo_tasks(root)
        return Reading({"yolo": {"path": str(files[0])}}, "detect", reason, name, tasks, why_not=_NO_MASKS)
    label_folders = [folder for folder in folders_below(root)[:100] if folder.name == "labels"]
    label_folders = [folder for folder in label_folders if (folder.parent / "images").is_dir()]
    label_folders = [folder for folder in label_folders if len(folder.relative_to(root).parts) <= _LABEL_DEPTH]
    if path.is_file() or not label_folders:
        return None
    if any(folder.parent == root for folder in label_folders):
        label_folders = [root / "labels"]  # as the source reads it
    texts = sorted(file for folder in label_folders for file in folder.rglob("*.txt"))
    label_files = [file for file in texts if file.name not in _CLASS_LISTS]
    numbers = {number for file in label_files for number in _class_numbers(file)}
    if not numbers or None in numbers:
        return None
    classes, note = _class_list(path, max(number for number in numbers if number is not None) + 1)
    reason = f"{format_count(len(label_files), 'text file')} in labels/ have YOLO's lines"
    source = {"yolo": {"path": str(path), "classes": classes}}
    notes, tasks = (note,) if note else (), _yolo_tasks(root)
    return Reading(source, "detect", reason, name_of_path(root), tasks, notes=notes, why_not=_NO_MASKS)


def _yolo_tasks(root: Path) -> tuple[str, ...]:
    """The tasks that YOLO's label files serve: segmentation if all lines of some of them are polygons."""
    paths = [path for folder in (root, *folders_below(root)[:_MAX_FOLDERS]) for path in sorted(folder.iterdir())]
    images = {path.stem for path in paths if is_image_name(path.name)}
    label_files = [path for path in paths if path.suffix == ".txt" and path.stem in images]
    lines = []
    for file in label_files[:: max(1, len(label_files) // _CHECKED_NAMES)]:
        with suppress(DataError):  # the source names a file that cannot be read
            lines += [line.split() for line in read_text(file, DataError).splitlines() if line.strip()]
    return (*_TASKS, "segment") if lines and all(len(words) >= _POLYGON_WORDS for words in lines) else _TASKS


def _is_data_yaml(file: Path) -> bool:
    """Return whether a YAML file lists classes under `names`."""
    try:
        return re.search(r"^names\s*:", read_text(file, DataError), re.MULTILINE) is not None
    except DataError:
        return False


def _class_numbers(file: Path) -> Iterator[int | None]:
    """The class of each line of a label file; None for a line that YOLO does not write."""
    for line in read_text(file, DataError).splitlines():
        if words := line.split():
            is_box = len(words) >= 5 and re.fullmatch(r"\d{1,4}( [-+.\deE]+)+", " ".join(words), re.ASCII)
            yield int(words[0]) if is_box else None


def _class_list(root: Path, count: int) -> tuple[list[str], str]:
    """The classes in a list beside the images, else numbered ones with a note."""
    for file in (folder / name for folder in (root, root / "labels") for name in _CLASS_LISTS):
        if file.is_file():
            names = [line.strip() for line in read_text(file, DataError).splitlines() if line.strip()]
            if len(names) >= count:
                return names, f"the classes are those of {file.name}"
    return [f"class_{number}" for number in range(count)], "no list of classes was found: rename class_0 and so on"


def _relative(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()
