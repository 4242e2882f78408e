"""Files that another user may have written: what is kept to be used later is believed only where that cannot be.

The rule: whoever owns it is this user or root, and nobody else can write it, nor put something else in its place.
Windows has no such owners; nothing is asked there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cnnrun.base.errors import StorageError, escape

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_ownership(path: Path, advice: str) -> None:
    """Raise StorageError, with `advice` on what to do, where `ownership_problem` finds a reason."""
    if why := ownership_problem(path):
        raise StorageError(f"{escape(why)}; {advice}")


def ownership_problem(path: Path) -> str | None:
    """Return why other users may have written what is at `path`, or a file in that folder; None where they cannot.

    A path that does not exist is asked about the folder that it is to be in.
    """
    if not hasattr(os, "geteuid"):
        return None
    try:
        return _foreign(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: cannot be looked at ({error.strerror})"


def _foreign(path: Path) -> str | None:
    above = path.parent.stat()
    if above.st_mode & _BY_OTHERS and not above.st_mode & stat.S_ISVTX:
        return f"{path.parent}: other users can write there (`chmod go-w` ends that)"
    status = path.lstat()
    if (why := _written_by_others(path, status, above)) or not stat.S_ISDIR(status.st_mode):
        return why
    with os.scandir(path) as entries:
        inside = sorted((Path(entry.path), entry.stat(follow_symlinks=False)) for entry in entries)
    return next((why for each, found in inside if (why := _written_by_others(each, found, status))), None)


def _written_by_others(path: Path, status: os.stat_result, above: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return f"{path}: of another user (uid {status.st_uid})"
    if stat.S_ISLNK(status.st_mode):
        return f"{path}: a link"
    # Of those who may write the file, the ones that may also enter its folder: x, one bit below w.
    enter = (above.st_mode & (stat.S_IXGRP | stat.S_IXOTH)) << 1
    return f"{path}: other users can write it (`chmod go-w` ends that)" if status.st_mode & _BY_OTHERS & enter else None
