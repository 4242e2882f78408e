"""Checks that only this user or root can have written a file, such as a cache that is trusted later.

A file is trusted if this user or root owns it and no other user can write or replace it. Windows has no such owners,
so nothing is checked there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cnnrun.base.errors import StorageError, escape

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_ownership(path: Path, advice: str) -> None:
    """Raise StorageError, with `advice` on what to do, if another user may have written to `path`."""
    if problem := ownership_problem(path):
        raise StorageError(f"{escape(problem)}; {advice}")


def ownership_problem(path: Path) -> str | None:
    """Reason that another user may have written the file or folder at `path`, or a file in it; None if none can.

    If `path` does not exist, its parent folder is checked.
    """
    if not hasattr(os, "geteuid"):
        return None
    try:
        return _write_problem(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: cannot be checked ({error.strerror})"


def _write_problem(path: Path) -> str | None:
    parent_status = path.parent.stat()
    if parent_status.st_mode & _WRITABLE_BY_OTHERS and not parent_status.st_mode & stat.S_ISVTX:
        return f"{path.parent}: other users can write there (`chmod go-w` prevents it)"
    status = path.lstat()
    if (problem := _entry_problem(path, status, parent_status)) or not stat.S_ISDIR(status.st_mode):
        return problem
    with os.scandir(path) as entries:
        children = sorted((Path(entry.path), entry.stat(follow_symlinks=False)) for entry in entries)
    problems = (_entry_problem(child, child_status, status) for child, child_status in children)
    return next(filter(None, problems), None)


def _entry_problem(path: Path, status: os.stat_result, parent_status: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return f"{path}: belongs to another user (uid {status.st_uid})"
    if stat.S_ISLNK(status.st_mode):
        return f"{path}: is a link"
    # Write permission counts only for those who can also enter the folder; the x bit is one below the w bit.
    can_enter = (parent_status.st_mode & (stat.S_IXGRP | stat.S_IXOTH)) << 1
    if status.st_mode & _WRITABLE_BY_OTHERS & can_enter:
        return f"{path}: other users can write it (`chmod go-w` prevents it)"
    return None
