"""What a path to data is: the `source` section that reads it, found by looking."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cnnrun.base.bounded_files import read_bytes, read_json_bytes
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_clutter
from cnnrun.base.user_paths import read_errors
from cnnrun.data.image_files import SUFFIX_LIST, is_image_name
from cnnrun.data.sources.table_files import Rows, read_rows
from cnnrun.data.split_names import parse_split_name

_TABLES = {".csv", ".tsv", ".parquet"}
# How people call their columns, the usual first.
_LABELS = ("label", "labels", "class", "category", "target", "y", "diagnosis", "species", "breed", "dx", "name")
_SPLITS = ("split", "set", "subset", "partition", "fold")
_GROUPS = ("group", "patient", "patient_id", "subject", "subject_id", "person", "session", "camera", "lesion_id")
_MOST_BYTES = 1 << 30
_LOOK = 20  # rows of a table whose files are looked for


def guess_source(given: str) -> tuple[Any, str]:
    """The `source` setting for a path (or `digits`), and a name for it. Raises DataError or ConfigError."""
    if given == "digits":
        return "digits", "digits"
    path = Path(given)
    if not path.exists():
        raise DataError(f"{escape(given)}: no such file or folder")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem).strip("-._") or "data"
    with read_errors():
        return (_of_folder(path) if path.is_dir() else _of_file(path)), name


def _of_file(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return {"table": _table(path)}
    if suffix == ".npz":
        return {"arrays": str(path)}
    if suffix == ".tar":
        return {"shards": str(path)}
    if suffix == ".json":
        raise _coco(path)
    raise DataError(f"{escape(str(path))}: not a table, a .npz file or a tar shard")


def _of_folder(path: Path) -> Any:
    inside = sorted(entry for entry in path.iterdir() if not is_clutter(entry.name))
    if (path / "Annotations").is_dir():
        raise _voc(path / "Annotations")
    if found := sorted((path / "annotations").glob("*.json")):
        raise _coco(found[0])
    if any("-idx3-ubyte" in entry.name for entry in inside):
        return {"idx": str(path)}
    if _classes_inside(inside):
        return {"folder": str(path)}
    if found := sorted(path.glob("*.json")):
        raise _coco(found[0])
    if shards := [entry for entry in inside if entry.suffix.lower() == ".tar"]:
        by_split = {name: [str(shard) for shard in shards if _begins(shard, name)] for name in ("train", "val", "test")}
        return {"shards": {key: value for key, value in by_split.items() if value} or {"train": list(map(str, shards))}}
    tables = [entry for entry in inside if entry.suffix.lower() in _TABLES]
    if len(tables) == 1:
        return {"table": _table(tables[0])}
    return {"folder": str(path)}


def _begins(path: Path, split: str) -> bool:
    return parse_split_name(re.split(r"[^A-Za-z]", path.name)[0]) == split


def _classes_inside(inside: list[Path]) -> bool:
    """Whether two or more folders have pictures in them: a folder a class, or a split."""
    folders = [entry for entry in inside if entry.is_dir()]
    return sum(any(is_image_name(each.name) for each in folder.rglob("*")) for folder in folders) > 1


def _table(path: Path) -> dict[str, Any]:
    """The settings for a table whose columns may have any names. Raises DataError where they cannot be told."""
    rows = read_rows(path)
    picture = next((name for name, cells in rows.columns.items() if _are_pictures(cells)), None)
    if picture is None:
        raise DataError(f"{path}: no column of picture files ({SUFFIX_LIST})")
    found: dict[str, Any] = {"path": str(path), "root": str(_root(path, rows.columns[picture])), "picture": picture}
    rest = {name: cells for name, cells in rows.columns.items() if name != picture}
    by_name = {name.lower(): name for name in rest}
    for setting, words in (("split", _SPLITS), ("group", _GROUPS)):
        name = next((by_name[word] for word in words if word in by_name), None)
        if name and (setting == "group" or all(parse_split_name(cell) for cell in rest[name])):
            found[setting] = name
            del rest[name], by_name[name.lower()]
    found["label"] = _label(path, rows, rest, by_name)
    return found


def _are_pictures(cells: list[str]) -> bool:
    return sum(is_image_name(Path(cell).name) for cell in cells) > 0.9 * len(cells)


def _root(path: Path, cells: list[str]) -> Path:
    """The folder that the paths start from: the table's own, or one inside it where the first files are."""
    places = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    counts = {place: sum((place / cell).is_file() for cell in cells[:_LOOK]) for place in places}
    best = max(counts, key=lambda place: counts[place])
    if not counts[best]:
        raise DataError(f"{path}: none of its first pictures is there, such as {escape(cells[0])}")
    return best


def _label(path: Path, rows: Rows, rest: dict[str, list[str]], by_name: dict[str, str]) -> str | list[str]:
    if named := next((by_name[word] for word in _LABELS if word in by_name), None):
        return named
    flags = [name for name, cells in rest.items() if set(cells) <= {"0", "1", "0.0", "1.0"}]
    if len(flags) > 1 and all(sum(float(rest[name][i]) for name in flags) == 1 for i in range(len(rows))):
        return flags
    few = {name: len(set(cells)) for name, cells in rest.items() if 2 <= len(set(cells)) <= max(2, len(rows) // 4)}
    if not few:
        known = ", ".join(map(escape, rest))
        raise DataError(f"{path}: which column is the label? (columns: {known}); rename it to label")
    return min(few, key=lambda name: few[name])


def _voc(folder: Path) -> ConfigError:
    """Why a VOC tree cannot be begun with, and what is in it."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".xml" and not is_clutter(file.name))
    objects: Counter[str] = Counter()
    for file in files:
        if file.is_file() and file.stat().st_size < 1 << 20:
            text = read_bytes(file, DataError, 1 << 20).decode("utf-8", "replace")
            objects.update(re.findall(r"<object>\s*<name>([^<]{1,100})</name>", text))
    return _detection(folder, "a VOC tree", len(files), dict(objects))


def _coco(path: Path) -> ConfigError:
    """Why a COCO file cannot be begun with, and what is in it."""
    try:
        data = json.loads(read_json_bytes(path, ConfigError, _MOST_BYTES))
        names = {each["id"]: str(each["name"]) for each in data["categories"]}
        objects = Counter(names[each["category_id"]] for each in data["annotations"])
        return _detection(path, "a COCO file", len(data["images"]), dict(objects))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ConfigError(f"{escape(str(path))}: a JSON file, but not COCO's")


def _detection(path: Path, what: str, pictures: int, objects: dict[str, int]) -> ConfigError:
    counts = join_names([f"{name} {count:,}" for name, count in sorted(objects.items(), key=lambda p: -p[1])])
    return ConfigError(
        f"{escape(str(path))}: {what} of {pictures:,} pictures, objects: {counts or 'none'}",
        "that is for object detection (task: detect), for which init writes no config yet: copy configs/bccd.yaml and "
        "give data.source this path; nothing was written",
    )
