"""Guess the `source` section of the YAML from a path to data."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cnnrun.base.bounded_files import read_bytes, read_json_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.user_paths import read_errors
from cnnrun.data.image_files import SUFFIX_LIST, is_image_name
from cnnrun.data.sources.table_files import Rows, read_rows
from cnnrun.data.sources.yolo import Yolo
from cnnrun.data.split_names import parse_split_name

_TABLE_SUFFIXES = {".csv", ".tsv", ".parquet"}
# Usual names of columns, the most likely first.
_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "diagnosis", "species", "breed", "dx", "name")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")
_GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id", "person", "session", "camera", "lesion_id")
_MAX_BYTES = 1 << 30
_CHECKED_ROWS = 20  # rows of a table whose files are checked to exist


def guess_source(path_or_name: str) -> tuple[Any, str]:
    """The `source` setting for a path (or `digits`), and a name for it.

    Raises DataError if the path holds no known kind of data, and ConfigError for data that `init` has no config for.
    """
    if path_or_name == "digits":
        return "digits", "digits"
    path = Path(path_or_name)
    if not path.exists():
        raise DataError(f"{escape(path_or_name)}: no such file or folder")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem).strip("-._") or "data"
    with read_errors():
        return (_guess_folder(path) if path.is_dir() else _guess_file(path)), name


def _guess_file(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in _TABLE_SUFFIXES:
        return {"table": _guess_table(path)}
    if suffix == ".npz":
        return {"arrays": str(path)}
    if suffix == ".tar":
        return {"shards": str(path)}
    if suffix == ".json":
        raise _coco_error(path)
    raise DataError(f"{escape(str(path))}: not a table, a .npz file or a tar shard")


def _guess_folder(path: Path) -> Any:
    entries = sorted(entry for entry in path.iterdir() if not is_hidden_or_system_name(entry.name))
    if (path / "Annotations").is_dir():
        raise _voc_error(path / "Annotations")
    if json_files := sorted((path / "annotations").glob("*.json")):
        raise _coco_error(json_files[0])
    if ((path / "images").is_dir() and (path / "labels").is_dir()) or (path / "data.yaml").is_file():
        raise _yolo_error(path)
    if any("-idx3-ubyte" in entry.name for entry in entries):
        return {"idx": str(path)}
    if _has_image_folders(entries):
        return {"folder": str(path)}
    if json_files := sorted(path.glob("*.json")):
        raise _coco_error(json_files[0])
    if shards := [entry for entry in entries if entry.suffix.lower() == ".tar"]:
        by_split = {
            name: [str(shard) for shard in shards if _has_split_prefix(shard, name)]
            for name in ("train", "val", "test")
        }
        return {"shards": {key: value for key, value in by_split.items() if value} or {"train": list(map(str, shards))}}
    tables = [entry for entry in entries if entry.suffix.lower() in _TABLE_SUFFIXES]
    if len(tables) == 1:
        return {"table": _guess_table(tables[0])}
    return {"folder": str(path)}


def _has_split_prefix(path: Path, split: str) -> bool:
    return parse_split_name(re.split(r"[^A-Za-z]", path.name)[0]) == split


def _has_image_folders(entries: list[Path]) -> bool:
    """Return whether two or more folders have images in them, and so are classes or splits."""
    folders = [entry for entry in entries if entry.is_dir()]
    return sum(any(is_image_name(path.name) for path in folder.rglob("*")) for folder in folders) > 1


def _guess_table(path: Path) -> dict[str, Any]:
    """The settings for a table with any names of columns. Raises DataError if there is no image or label column."""
    rows = read_rows(path)
    image_column = next((name for name, cells in rows.columns.items() if _are_image_names(cells)), None)
    if image_column is None:
        raise DataError(f"{path}: no column of image files ({SUFFIX_LIST})")
    root = _guess_root(path, rows.columns[image_column])
    settings: dict[str, Any] = {"path": str(path), "root": str(root), "image": image_column}
    rest = {name: cells for name, cells in rows.columns.items() if name != image_column}
    by_name = {name.lower(): name for name in rest}
    for setting, words in (("split", _SPLIT_COLUMNS), ("group", _GROUP_COLUMNS)):
        name = next((by_name[word] for word in words if word in by_name), None)
        if name and (setting == "group" or all(parse_split_name(cell) for cell in rest[name])):
            settings[setting] = name
            del rest[name], by_name[name.lower()]
    settings["label"] = _guess_label(path, rows, rest, by_name)
    return settings


def _are_image_names(cells: list[str]) -> bool:
    return sum(is_image_name(Path(cell).name) for cell in cells) > 0.9 * len(cells)


def _guess_root(path: Path, cells: list[str]) -> Path:
    """The folder that a table's paths are relative to: the table's own folder, or one inside it that has the files."""
    folders = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    counts = {folder: sum((folder / cell).is_file() for cell in cells[:_CHECKED_ROWS]) for folder in folders}
    root = max(counts, key=lambda folder: counts[folder])
    if not counts[root]:
        raise DataError(f"{path}: none of its first image files exists, such as {escape(cells[0])}")
    return root


def _guess_label(path: Path, rows: Rows, rest: dict[str, list[str]], by_name: dict[str, str]) -> str | list[str]:
    """The label column by its name; else 0/1 columns with a single 1 in each row; else the one with fewest values."""
    if name := next((by_name[word] for word in _LABEL_COLUMNS if word in by_name), None):
        return name
    one_hot = [name for name, cells in rest.items() if set(cells) <= {"0", "1", "0.0", "1.0"}]
    if len(one_hot) > 1 and all(sum(float(rest[name][row]) for name in one_hot) == 1 for row in range(len(rows))):
        return one_hot
    value_counts = {name: len(set(cells)) for name, cells in rest.items()}
    candidates = {name: count for name, count in value_counts.items() if 2 <= count <= max(2, len(rows) // 4)}
    if not candidates:
        columns = ", ".join(map(escape, rest))
        raise DataError(f"{path}: which column is the label? (columns: {columns}); rename it to label")
    return min(candidates, key=lambda name: candidates[name])


def _voc_error(folder: Path) -> ConfigError:
    """Error that `init` writes no config for a VOC tree, with the objects that it has."""
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() == ".xml" and not is_hidden_or_system_name(file.name)
    )
    objects: Counter[str] = Counter()
    for file in files:
        if file.is_file() and file.stat().st_size < 1 << 20:
            text = read_bytes(file, DataError, 1 << 20).decode("utf-8", "replace")
            objects.update(re.findall(r"<object>\s*<name>([^<]{1,100})</name>", text))
    return _detection_error(folder, "a VOC tree", len(files), dict(objects))


def _yolo_error(path: Path) -> ConfigError:
    """Error that `init` writes no config for YOLO's layout, with the objects that it has."""
    contents = Yolo(path=str(path)).read_boxes()
    images = sum(len(split) for split in contents.splits.values())
    objects: Counter[str] = Counter()
    for split in contents.splits.values():
        assert split.objects is not None
        objects.update(contents.classes[label] for label in split.objects.columns["objects"].tolist())
    return _detection_error(path, "YOLO's layout", images, dict(objects))


def _coco_error(path: Path) -> ConfigError:
    """Error that `init` writes no config for a COCO file, with the objects that it has."""
    try:
        data = json.loads(read_json_bytes(path, ConfigError, _MAX_BYTES))
        names = {category["id"]: str(category["name"]) for category in data["categories"]}
        objects = Counter(names[annotation["category_id"]] for annotation in data["annotations"])
        return _detection_error(path, "a COCO file", len(data["images"]), dict(objects))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ConfigError(f"{escape(str(path))}: a JSON file, but not COCO's")


def _detection_error(path: Path, kind: str, image_count: int, objects: dict[str, int]) -> ConfigError:
    by_count = sorted(objects.items(), key=lambda item: -item[1])
    counts = join_names([f"{name} {count:,}" for name, count in by_count])
    return ConfigError(
        f"{escape(str(path))}: {kind} of {format_count(image_count, 'image')}, objects: {counts or 'none'}",
        "this is for object detection (task: detect), for which init writes no config yet: copy configs/bccd.yaml and "
        "give data.source this path; nothing was written",
    )
