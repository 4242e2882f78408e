"""Class names and class numbers out of what a source writes for labels; paths that stay inside their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from cnnrun.errors import DataError, printable

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
MOST_LINES = 20  # of mistakes of one kind that are told


def split_name(written: str) -> str | None:
    """`train`, `val` or `test` for the usual ways to write them."""
    return _SPLITS.get(written.strip().lower())


def class_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels sorted: as numbers where all are whole numbers, else as torchvision sorts folders."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d{1,18}", name) for name in names) else names


def refuse(problems: Sequence[str]) -> None:
    """Raise a DataError of these lines, the first of them where they are many; nothing where there are none."""
    if problems:
        more = [f"... and {len(problems) - MOST_LINES} more mistakes"] if len(problems) > MOST_LINES else []
        raise DataError(*problems[:MOST_LINES], *more)


def jail(root: Path) -> Callable[[str], str | None]:
    """A function that says why a path, relative to `root`, may not be used: None where it may."""
    inside = root.resolve()

    @cache
    def folder_is_inside(folder: Path) -> bool:
        return folder.resolve().is_relative_to(inside)

    def why_not(written: str) -> str | None:
        if not written or "\0" in written:
            return "is empty" if not written else "has a NUL byte in it"
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", written):
            return "is a URL; give a path relative to the root"
        if PurePosixPath(written).is_absolute() or PureWindowsPath(written).drive or written.startswith("\\"):
            return "is absolute; give a path relative to the root"
        if ".." in PurePosixPath(written).parts:
            return "leaves the root with '..'"
        path = root / written
        if not folder_is_inside(path.parent) or (path.is_symlink() and not path.resolve().is_relative_to(inside)):
            return f"is a link to outside {printable(os.fspath(root))}"
        return None

    return why_not
