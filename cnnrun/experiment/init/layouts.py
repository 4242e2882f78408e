"""Guess what data is from its files: its source, its task, and the reason for both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.user_paths import read_errors
from cnnrun.data.image_names import FACES_TABLE, is_image_name
from cnnrun.data.split_names import parse_split_name
from cnnrun.experiment.init.box_layouts import guess_coco, guess_voc, guess_yolo
from cnnrun.experiment.init.mask_layouts import guess_masks, is_mask_name
from cnnrun.experiment.init.paths import is_visible, name_of_path, subfolders
from cnnrun.experiment.init.reading import Reading, Request
from cnnrun.experiment.init.table_layouts import TABLE_SUFFIXES, guess_table

_MAX_PARTS = 4  # so few folders may be parts of one data set, such as images and masks
_FACES_COLUMNS = b"photo,file,x1,"  # as the table of faces begins
_MIN_PEOPLE, _MAX_IMAGES_EACH = 10, 40  # folders of so many classes, with so few images each, may be people


def guess_data(path_or_name: str, request: Request) -> Reading:
    """Read what a path (or `digits`) holds, as `request` asks. Raises DataError or ConfigError if it is not clear.

    The error then says which lines to write into a config.
    """
    if path_or_name in ("digits", "digit_scenes"):
        task = "classify" if path_or_name == "digits" else "detect"
        if request.label:
            raise ConfigError(f"--label names columns of a table; {path_or_name} is none")
        return request.check(Reading(path_or_name, task, "it is embedded in cnnrun", path_or_name, (task,)))
    path = Path(path_or_name)
    if not path.exists():
        raise DataError(f"{escape(path_or_name)}: no such file or folder")
    with read_errors():
        reading = _guess_folder(path, request) if path.is_dir() else _guess_file(path, request)
    if request.label and "table" not in reading.source:
        raise ConfigError(f"--label names columns of a table; {escape(path_or_name)} is none")
    return request.check(reading)


def _guess_file(path: Path, request: Request) -> Reading:
    suffix, name = path.suffix.lower(), name_of_path(path)
    if suffix in TABLE_SUFFIXES:
        return guess_table(path, request)
    if suffix == ".npz":
        return Reading({"arrays": str(path)}, "classify", "a .npz file holds images and labels", name, ("classify",))
    if suffix == ".tar":
        return Reading({"shards": str(path)}, "classify", "a tar holds images with labels", name, ("classify",))
    if suffix in (".yaml", ".yml") and (reading := guess_yolo(path)):
        return reading
    if suffix == ".json":
        if reading := guess_coco(path.parent, [path]):
            return reading
        raise ConfigError(f"{escape(str(path))}: a JSON file, but not COCO's")
    raise DataError(f"{escape(str(path))}: not a table, a .npz file, a tar shard, COCO's JSON or YOLO's data.yaml")


def _guess_folder(path: Path, request: Request) -> Reading:
    entries = sorted(entry for entry in path.iterdir() if not is_hidden_or_system_name(entry.name))
    guesses: Sequence[Callable[[], Reading | None]] = (
        lambda: _guess_faces(path),
        lambda: guess_yolo(path),
        lambda: guess_voc(path),
        lambda: guess_coco(path, _json_files(path)),
        lambda: guess_masks(path),
        lambda: _guess_idx(path, entries),
        lambda: _guess_class_folders(path),
        lambda: _guess_shards(path, entries),
        lambda: _guess_only_table(path, entries, request),
        lambda: _guess_within_only_folder(entries, request),
    )
    for guess in guesses:
        if reading := guess():
            return reading
    raise DataError(
        f"{escape(str(path))}: no class folders, table, annotations, masks, arrays or shards are recognised here",
        "say it in a config: `task: ...`, `data: {source: {...}}` (docs/data.md lists the sources) and `model: ...`",
    )


def _json_files(path: Path) -> list[Path]:
    """JSON files that may be annotations: in the folder, and in the folders within it."""
    return sorted([*path.glob("*.json"), *path.glob("*/*.json")])


def _guess_idx(path: Path, entries: list[Path]) -> Reading | None:
    if not any("-idx3-ubyte" in entry.name for entry in entries):
        return None
    return Reading({"idx": str(path)}, "classify", "there are MNIST's files", name_of_path(path), ("classify",))


def _guess_faces(path: Path) -> Reading | None:
    """Folders of the faces that `cnnrun faces` has written are people."""
    table = path / FACES_TABLE
    if not table.is_file() or not read_bytes(table, DataError).startswith(_FACES_COLUMNS):
        return None
    if (reading := _guess_class_folders(path)) is None:
        raise DataError(
            f"{escape(str(path))}: faces that `cnnrun faces` wrote, but not in a folder for each person",
            "put the photos of each person into a folder of theirs, and run `cnnrun faces` on the folder of these",
        )
    reason = "`cnnrun faces` wrote it, and its folders are people"
    return replace(reading, task="verify", reason=reason, questions=(), verifies_faces=True)


def _guess_class_folders(path: Path) -> Reading | None:
    """Folders of images are classes, also below folders named like splits."""
    folders = [entry for entry in subfolders(path) if _has_images(entry)]
    if len(folders) < 2:
        return None
    splits = {folder: parse_split_name(folder.name) for folder in folders}
    if any(splits.values()) and not ("train" in splits.values() and all(splits.values())):
        return None  # such as `images` and `test`: not classes
    if "train" in splits.values():
        (train,) = [folder for folder, split in splits.items() if split == "train"][:1]
        classes = [entry for entry in subfolders(train) if _has_images(entry)]
    else:
        classes = folders
    if len(classes) < 2:
        return None
    if len(classes) < _MAX_PARTS and any(is_mask_name(folder.name) for folder in classes):
        names = ", ".join(escape(folder.name) for folder in classes)
        problem = f"the folders {names} are named like images and masks, but too few images have a mask of their name"
        raise DataError(
            f"{escape(str(path))}: {problem}", "if they are classes, write a config with `source: {folder: ...}`"
        )
    if not any(is_image_name(file.name) for folder in classes for file in folder.iterdir()):
        below = [folder for folder in classes if len([part for part in subfolders(folder) if _has_images(part)]) > 1]
        names = ", ".join(escape(str(folder)) for folder in below or classes)
        raise DataError(
            f"{escape(str(path))}: its folders hold further folders of images; give init one of them: {names}"
        )
    reason = f"{format_count(len(classes), 'folder')} of images are the classes"
    questions = []
    counts = sorted(sum(is_image_name(file.name) for file in folder.rglob("*")) for folder in classes)
    if len(classes) >= _MIN_PEOPLE and counts[len(counts) // 2] <= _MAX_IMAGES_EACH:
        questions = [
            f"{len(classes)} folders of about {format_count(counts[len(counts) // 2], 'image')}: are they people, or "
            "things, that must be told apart although training never shows them? Then: --task verify"
        ]
    tasks = ("classify", "verify")
    return Reading({"folder": str(path)}, "classify", reason, name_of_path(path), tasks, questions=tuple(questions))


def _has_images(folder: Path) -> bool:
    return any(
        is_image_name(path.name) and all(map(is_visible, [path, *path.relative_to(folder).parents][:-1]))
        for path in folder.rglob("*")
    )


def _guess_shards(path: Path, entries: list[Path]) -> Reading | None:
    shards = [entry for entry in entries if entry.suffix.lower() == ".tar"]
    if not shards:
        return None
    by_split = {
        name: [str(shard) for shard in shards if parse_split_name(re.split(r"[^A-Za-z]", shard.name)[0]) == name]
        for name in ("train", "val", "test")
    }
    source: Any = {key: value for key, value in by_split.items() if value} or {"train": list(map(str, shards))}
    reason = f"{format_count(len(shards), 'tar')} hold images with labels"
    return Reading({"shards": source}, "classify", reason, name_of_path(path), ("classify",))


def _guess_only_table(path: Path, entries: list[Path], request: Request) -> Reading | None:
    """The only table in the folder, or else the only one in the folders within it that names images."""
    tables = [entry for entry in entries if entry.suffix.lower() in TABLE_SUFFIXES]
    if len(tables) > 1:
        names = ", ".join(escape(table.name) for table in tables)
        raise DataError(f"{escape(str(path))}: several tables ({names}); give init the one to learn from")
    if tables:
        return replace(guess_table(tables[0], request), name=name_of_path(path))
    within = [table for folder in subfolders(path) for table in sorted(folder.glob("*.*"))]
    readings = []
    for table in within:
        if table.suffix.lower() in TABLE_SUFFIXES:
            with contextlib.suppress(DataError):
                readings.append(replace(guess_table(table, request), name=name_of_path(path)))
    return readings[0] if len(readings) == 1 else None


def _guess_within_only_folder(entries: list[Path], request: Request) -> Reading | None:
    """Read the only folder with images, as an unpacked archive has it, beside files that are none."""
    folders = [entry for entry in entries if entry.is_dir() and _has_images(entry)]
    if len(folders) != 1 or any(is_image_name(entry.name) for entry in entries):
        return None
    return _guess_folder(folders[0], request)
