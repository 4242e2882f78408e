"""Checks of paths that a user's files contain: readable, and inside the data folder."""

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
    """Turn an OSError for one of the user's files or folders into a DataError of one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name = escape(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None


def path_checker(root: Path) -> Callable[[str], str | None]:
    """Return a function from a path relative to `root` to the reason that it is refused, or None."""
    resolved_root = root.resolve()

    @cache
    def folder_is_inside(folder: Path) -> bool:
        return folder.resolve().is_relative_to(resolved_root)

    def leads_outside(path: Path) -> bool:
        is_outside_link = path.is_symlink() and not path.resolve().is_relative_to(resolved_root)
        return is_outside_link or not folder_is_inside(path.parent)

    def path_problem(text: str) -> str | None:
        if not text or "\0" in text:
            return "is empty" if not text else "has a NUL byte in it"
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            return "is a URL; give a path relative to the root"
        is_below_root = root.anchor != "" and root == Path(root.anchor) and text.startswith(root.anchor)
        if (PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive) and not is_below_root:
            return f"is absolute; give a path relative to the root, or `root: {Path(text).anchor or '/'}`"
        if text.startswith("\\"):
            return "is absolute; give a path relative to the root"
        if ".." in PurePosixPath(text).parts:
            return "leaves the root with '..'"
        path = root / text
        if "\\" in text and not path.exists():  # a Windows path; elsewhere a file's name may contain a backslash
            return "has backslashes, and there is no file of that name; write / between folders"
        try:
            if leads_outside(path):
                return f"is a link to outside {escape(os.fspath(root))}"
        except OSError as error:
            return f"cannot be the name of a file ({error.strerror})"
        return None

    return path_problem
