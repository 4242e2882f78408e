"""What sources write for splits; mistakes gathered into one error; paths that stay inside their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.errors import DataError, printable

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
MOST_PROBLEMS = 10_000  # that are gathered
MOST_LINES = 20  # of mistakes of one kind that are told


def split_name(written: str) -> str | None:
    """`train`, `val` or `test` for the usual ways to write them."""
    return _SPLITS.get(written.strip().lower())


@contextmanager
def unreadable_names() -> Iterator[None]:
    """Turn the system's refusal to list or open one of the user's folders or files into a DataError of one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name = printable(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None


def listed(names: Sequence[str], most: int = MOST_LINES) -> str:
    """Names for a message; of more than `most` the first, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def first_lines(lines: Sequence[str], what: str) -> list[str]:
    """The first lines for a message, and how many more `what` there are."""
    more = [f"... and {len(lines) - MOST_LINES:,} more {what}"] if len(lines) > MOST_LINES else []
    return [*lines[:MOST_LINES], *more]


def refuse(problems: Iterable[str]) -> None:
    """Raise a DataError of these lines, the first of them where they are many; nothing where there are none.

    No more of them are gathered than a message needs to say how many there are, roughly.
    """
    if problems := list(islice(problems, MOST_PROBLEMS)):
        left = f"{len(problems) - MOST_LINES:,}" + (" or" if len(problems) >= MOST_PROBLEMS else "")
        more = [f"... and {left} more mistakes"] if len(problems) > MOST_LINES else []
        raise DataError(*problems[:MOST_LINES], *more)


def too_fine(name: str, values: Sequence[float | None] | NDArray[Any]) -> str | None:
    """What is wrong with different numbers that are all one in float32, or None. What is nearly so the task says."""
    exact = np.asarray(values, np.float64)
    spread = float(np.ptp(exact))
    if spread == 0 or np.ptp(exact.astype(np.float32)) > 0:
        return None
    text = f"{printable(name)} varies by {spread:.3g} around {exact.mean():.6g}"
    return f"{text}, too finely for float32; take the mean off it"


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
        if "\\" in written and not path.exists():  # of Windows; elsewhere a file's name may have one
            return "has backslashes, and there is no file of that name; write / between folders"
        try:
            if not folder_is_inside(path.parent) or (path.is_symlink() and not path.resolve().is_relative_to(inside)):
                return f"is a link to outside {printable(os.fspath(root))}"
        except OSError as error:
            return f"cannot be the name of a file ({error.strerror})"
        return None

    return why_not
