"""Guess a table's columns: which one holds images, which ones hold what is to be learned, and of which kind."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from cnnrun.base.bounded_files import open_file
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.config.messages import did_you_mean
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.image_names import SUFFIX_LIST, SUFFIXES, is_image_name
from cnnrun.data.sources.table_files import Rows, read_rows
from cnnrun.data.split_names import parse_split_name
from cnnrun.experiment.init.paths import is_file, name_of_path, split_of, subfolders
from cnnrun.experiment.init.reading import Reading, Request

TABLE_SUFFIXES = {".csv", ".tsv", ".parquet"}
# Usual names of columns, the most likely first.
_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "diagnosis", "species", "breed", "dx", "tags")
_LABEL_COLUMNS_TOO = ("tag", "classes", "attributes", "categories", "name")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")
_GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id", "person", "session", "camera", "lesion_id")
_GROUP_COLUMNS_TOO = ("person_id", "user", "user_id", "user.id", "video", "scene")
_ID = re.compile(r"(.*[_. ])?(id|uuid|hash|index)", re.IGNORECASE)  # names of columns that identify a row or a person
_SEPARATORS = (";", "|", ",", " ")
_MAX_LINE_BYTES, _MAX_TABLE_BYTES = 1 << 20, 1 << 30
_MIN_GROUPS = 5  # with fewer, whole groups cannot be held out
_MIN_NUMBER_SHARE = 0.9  # of the cells of a column of numbers; the others are gaps
_CHECKED_ROWS = 20  # rows of a table whose files are checked to exist
_MAX_LABEL_VALUES = 20  # whole numbers with more different values are quantities, not classes
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass
class _Columns:
    """A table's columns that are not yet used, and the settings that the used ones became."""

    path: Path
    rows: Rows
    rest: dict[str, list[str]]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, setting: str, name: str) -> None:
        """Use a column for a setting."""
        self.settings[setting] = name
        del self.rest[name]

    def usual(self, words: tuple[str, ...]) -> str | None:
        """The unused column with the first of these names, in any case."""
        by_name = {name.strip().lower(): name for name in self.rest}
        coordinates = {"y"} if "x" in by_name else set()  # `y` beside `x` is a coordinate, not a label
        return next((by_name[word] for word in words if word in by_name.keys() - coordinates), None)


def guess_table(path: Path, request: Request) -> Reading:
    """Read a table with any names of columns. Raises DataError if it has no images, or if its target is not clear."""
    invented = _invent_names(path)
    rows = read_rows(path, invented)
    columns = _Columns(path, rows, dict(rows.columns))
    if invented:
        columns.settings["columns"] = invented
        columns.notes.append(f"the first line names no columns, so they are called {join_names(invented)}")
    _take_images(columns)
    if request.label:
        for name in request.label:
            if name not in columns.rest:
                known = did_you_mean(name, list(columns.rest))
                names = join_names([escape(column) for column in columns.rest])
                raise ConfigError(f"--label {escape(name)}: {escape(str(path))} has the columns {names}{known}")
    _take_split_and_group(columns, request)
    _leave_out_index(columns, request)
    target, task, reason, tasks = _guess_target(columns, list(request.label or ()), request.target_kind)
    source = {"table": {"path": str(path), **columns.settings, **target}}
    return Reading(source, task, reason, name_of_path(path), tasks, notes=tuple(columns.notes))


def _invent_names(path: Path) -> list[str] | None:
    """Names for the columns of a table whose first line is a row, because it names an image; None for others."""
    if path.suffix.lower() == ".parquet":
        return None
    with open_file(path, DataError, _MAX_TABLE_BYTES) as file:
        line = file.readline(_MAX_LINE_BYTES).decode("utf-8-sig", "replace")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((mark for mark in ",;\t" if mark in line), ",")
    cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    images = [index for index, cell in enumerate(cells) if _names_image(path, cell)]
    if len(cells) < 2 or not images:
        return None
    return ["image" if index == images[0] else f"column_{index + 1}" for index in range(len(cells))]


def _names_image(path: Path, cell: str) -> bool:
    """Return whether a cell is the name of an image file, or the number or id of an image beside or below the table."""
    if is_image_name(PureWindowsPath(cell).name):
        return True
    has_digit = any(character.isdigit() for character in cell)  # a column may be called `image`, and so may a file
    folders = [path.parent, *subfolders(path.parent)]
    return has_digit and any(is_file(folder / f"{cell}{end}") for folder in folders for end in SUFFIXES)


def _take_images(columns: _Columns) -> None:
    """Find the column of image files, and the folder that they start from."""
    path = columns.path
    images = next((name for name, cells in columns.rest.items() if _are_image_names(cells)), None)
    if images is None and not (images := _take_ids(columns)):
        names = join_names([escape(name) for name in columns.rest])
        raise DataError(f"{path}: no column of image files ({SUFFIX_LIST}); its columns: {names}")
    cells = [f"{cell}{columns.settings.get('suffix', '')}" for cell in columns.rest[images]]
    if all(cell.startswith("/") for cell in cells[:_CHECKED_ROWS]):
        root = Path("/")
        columns.notes.append("the paths are absolute, so they start from `root: /`")
    else:
        root = _guess_root(path, cells)
    columns.settings["root"] = str(root)
    columns.take("image", images)


def _take_ids(columns: _Columns) -> str | None:
    """The column of files' names without their suffix, such as ids, and the suffix as a setting; None without one."""
    is_id = {name: len(set(cells)) > 0.9 * len(cells) for name, cells in columns.rest.items()}
    first = {name: cells[:_CHECKED_ROWS] for name, cells in columns.rest.items() if is_id[name]}
    for folder in _near_folders(columns.path):
        for name, cells in first.items():
            for suffix in sorted(SUFFIXES):
                if sum(is_file(folder / f"{cell}{suffix}") for cell in cells if cell) > len(cells) / 2:
                    columns.settings["suffix"] = suffix
                    columns.notes.append(f"column {escape(name)!r} names the images without {suffix}")
                    return name
    return None


def _near_folders(path: Path) -> list[Path]:
    """The folder of a table, those inside it, the one around it and those inside that."""
    own, around = path.parent, path.parent.resolve().parent
    return [own, *subfolders(own), around, *subfolders(around)]


def _are_image_names(cells: list[str]) -> bool:
    return sum(is_image_name(Path(cell).name) for cell in cells) > 0.9 * len(cells)


def _guess_root(path: Path, cells: list[str]) -> Path:
    """The folder that a table's paths are relative to. Raises DataError if none of the first files exists."""
    split = split_of(path.parent, path.with_suffix(""))

    def rank(folder: Path) -> tuple[int, bool]:
        return sum(is_file(folder / cell) for cell in cells[:_CHECKED_ROWS]), split_of(path.parent, folder) == split

    root = max(_near_folders(path), key=rank)
    if not rank(root)[0]:
        raise DataError(f"{path}: none of its first image files exists, such as {escape(cells[0])}")
    return root


def _take_split_and_group(columns: _Columns, request: Request) -> None:
    for setting, words in (("split", _SPLIT_COLUMNS), ("group", _GROUP_COLUMNS + _GROUP_COLUMNS_TOO)):
        name = columns.usual(words)
        if name is None or name in (request.label or ()):
            continue
        is_split = all(parse_split_name(cell) for cell in columns.rest[name])
        if is_split if setting == "split" else len(set(columns.rest[name])) >= _MIN_GROUPS:
            columns.notes.append(f"column {escape(name)!r} is the {setting}")
            columns.take(setting, name)


def _leave_out_index(columns: _Columns, request: Request) -> None:
    """Leave out columns that only number the rows, as pandas and databases write them."""
    for name, cells in list(columns.rest.items()):
        is_numbering = all(cell.isdecimal() and cell.isascii() for cell in cells) and [int(cell) for cell in cells] in (
            list(range(len(cells))),
            list(range(1, len(cells) + 1)),
        )
        if is_numbering and len(cells) > 2 and name not in (request.label or ()):
            del columns.rest[name]
            columns.notes.append(f"column {escape(name)!r} only numbers the rows")


_Target = tuple[dict[str, Any], str, str, tuple[str, ...]]  # settings, task, reason, tasks that the data can serve


def _guess_target(columns: _Columns, names: list[str], asked: TargetKind | None) -> _Target:
    """The settings of the target, its task and the reason; `names` and `asked` are what the user says."""
    if not names and (usual := columns.usual(_LABEL_COLUMNS + _LABEL_COLUMNS_TOO)):
        names = [usual]
    if not names:
        names = _guess_target_columns(columns, asked)
    if asked in (None, TargetKind.NUMBERS):
        _refuse_gaps(columns, names)
    if len(names) > 1:
        return _describe_columns(columns, names, asked)
    return _describe_column(columns, names[0], asked)


def _refuse_gaps(columns: _Columns, names: list[str]) -> None:
    """Raise DataError if a column of numbers has cells that are none, such as empty ones."""
    for name in names:
        cells = columns.rest[name]
        if _are_mostly_numbers(cells) and not _are_numbers(cells):
            gaps = [index for index, cell in enumerate(cells) if not _NUMBER.fullmatch(cell.strip())]
            where, cell = columns.rows.location(gaps[0]), escape(cells[gaps[0]])[:40]
            share = f"{len(gaps):,} of {len(cells):,} rows"
            raise DataError(
                f"{where}: column {escape(name)!r} holds numbers, but {cell!r} here ({share})",
                f"fill in or remove these rows; if the column holds labels: --task classify --label {escape(name)}",
            )


def _guess_target_columns(columns: _Columns, asked: TargetKind | None) -> list[str]:
    """The columns that may be targets. Raises DataError if that is not clear."""
    rest = {name: cells for name, cells in columns.rest.items() if not _ID.fullmatch(name.strip())}
    flags = [name for name, cells in rest.items() if _are_flags(cells)]
    if len(flags) > 1 and asked in (None, TargetKind.LABELS, TargetKind.LABEL_SETS):
        return flags
    numbers = [name for name, cells in rest.items() if _are_mostly_numbers(cells) and name not in flags]
    labels = [name for name, cells in rest.items() if name not in numbers and _may_be_labels(cells)]
    if asked is TargetKind.NUMBERS or (not labels and len(numbers) == len(rest)):
        labels = []
    candidates = labels or numbers
    if len(labels) == 1 or (not labels and numbers and len(numbers) == len(rest)):
        return candidates
    names = join_names([escape(name) for name in rest])
    raise DataError(
        f"{columns.path}: which column is to be learned? It has {names or 'no column beside the images'}",
        "say it: --label COLUMN, or --label FIRST,SECOND for several, and --task classify, multilabel or regress",
    )


def _describe_columns(columns: _Columns, names: list[str], asked: TargetKind | None) -> _Target:
    """Several columns: numbers, or a class in each, of which every row has one or any number."""
    listed = join_names([escape(name) for name in names])
    if all(_are_flags(columns.rest[name]) for name in names) and asked is not TargetKind.NUMBERS:
        sums = {sum(float(_flag(columns.rest[name][row])) for name in names) for row in range(len(columns.rows))}
        if sums == {1.0} and asked is not TargetKind.LABEL_SETS:
            reason = f"each row has a single 1 in the columns {listed}"
            return {"label": names}, "classify", reason, ("classify", "multilabel")
        return {"labels": names}, "multilabel", f"the columns {listed} hold 0 and 1", ("multilabel",)
    wrong = [name for name in names if not _are_numbers(columns.rest[name])]
    if wrong:
        raise DataError(f"{columns.path}: column {escape(wrong[0])!r} holds no numbers; give --label other columns")
    return {"numbers": names}, "regress", f"the columns {listed} hold numbers", ("regress",)


def _describe_column(columns: _Columns, name: str, asked: TargetKind | None) -> _Target:
    """One column: numbers, lists of labels, or a label in each row."""
    cells, shown = columns.rest[name], escape(name)
    values = set(cells)
    if _are_numbers(cells):
        is_whole = all(float(cell).is_integer() for cell in values)
        is_quantity = not is_whole or len(values) > min(_MAX_LABEL_VALUES, len(cells) // 2)
        if asked is TargetKind.NUMBERS or (asked is None and is_quantity):
            reason = f"column {shown!r} holds numbers of {len(values):,} different values"
            return {"numbers": [name]}, "regress", reason, ("regress",) + (("classify",) if is_whole else ())
        reason = f"column {shown!r} holds {len(values):,} different whole numbers"
        return {"label": name}, "classify", reason, ("classify", "verify", "regress")
    separator = _find_separator(cells)
    if asked is TargetKind.LABEL_SETS or (separator and asked is None):
        mark = separator or ";"
        parts = {part.strip() for cell in values for part in cell.split(mark) if part.strip()}
        reason = f"column {shown!r} lists labels with {mark!r} between them, {len(parts):,} different ones"
        target = {"labels": name} | ({"separator": mark} if mark != ";" else {})
        return target, "multilabel", reason, ("multilabel", "classify")
    if len(values) > len(cells) // 2 and len(values) > 2 and asked is None:
        raise DataError(
            f"{columns.path}: column {shown!r} has {len(values):,} different values in {len(cells):,} rows, too many "
            "to be classes",
            "say which column is to be learned: --label COLUMN, and --task classify, multilabel or regress",
        )
    reason = f"column {shown!r} holds {len(values):,} different labels"
    return {"label": name}, "classify", reason, ("classify", "verify", "multilabel")


def _find_separator(cells: list[str]) -> str | None:
    """The mark between labels: one whose parts occur in several cells; None if there is none."""
    for mark in _SEPARATORS:
        lists = [[part.strip() for part in cell.split(mark) if part.strip()] for cell in set(cells)]
        if not any(len(parts) > 1 for parts in lists):
            continue
        counts = Counter(part for parts in lists for part in parts)
        joined = [part for parts in lists if len(parts) > 1 for part in parts]
        needed = 0.9 if mark == " " else 0.5  # a label of two words is more usual than one with a comma
        if sum(counts[part] > 1 for part in joined) > needed * len(joined) and len(counts) < len(lists):
            return mark
    return None


def _may_be_labels(cells: list[str]) -> bool:
    """Return whether there are at least two values, and not nearly as many as rows."""
    return 2 <= len(set(cells)) <= max(2, len(cells) // 4) or _find_separator(cells) is not None


def _are_numbers(cells: list[str]) -> bool:
    return all(_NUMBER.fullmatch(cell.strip()) for cell in set(cells))


def _are_mostly_numbers(cells: list[str]) -> bool:
    return sum(_NUMBER.fullmatch(cell.strip()) is not None for cell in cells) > _MIN_NUMBER_SHARE * len(cells)


def _are_flags(cells: list[str]) -> bool:
    return {cell.strip().lower() for cell in set(cells)} <= {"0", "1", "0.0", "1.0", "true", "false"}


def _flag(cell: str) -> float:
    return float(cell.strip().lower() in ("1", "1.0", "true"))
