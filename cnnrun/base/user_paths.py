"""Paths that a user's files name: readable, and inside their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from cnnrun.base.errors import DataError, escape


@contextmanager
def read_errors() -> Iterator[None]:
    """Turn the system's refusal to list or open one of the user's folders or files into a DataError of one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name = escape(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None


def path_checker(root: Path) -> Callable[[str], str | None]:
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
        if "\\" in written and not path.exists():  # of Windows; elsewhere a file's name may have one
            return "has backslashes, and there is no file of that name; write / between folders"
        try:
            if not folder_is_inside(path.parent) or (path.is_symlink() and not path.resolve().is_relative_to(inside)):
                return f"is a link to outside {escape(os.fspath(root))}"
        except OSError as error:
            return f"cannot be the name of a file ({error.strerror})"
        return None

    return why_not
