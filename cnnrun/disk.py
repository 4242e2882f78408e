"""Files that are whole or not there, and on the disk once they are; and what to say when a disk fails."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of `path`, whole, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary, data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def rename(folder: Path, target: Path) -> None:
    """Give a folder its name. Raises FileExistsError where that is taken."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(error.errno, error.strerror, str(target)) from None
        raise


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trouble(folder: Path, needed: int, error: OSError) -> str:
    """A line on why so many bytes could not be written there."""
    try:
        free = f"{_amount(shutil.disk_usage(folder).free)} are free"
    except OSError:
        free = "the folder cannot be reached"
    reason = error.strerror or str(error)
    return f"{folder}: cannot write ({reason}); {_amount(needed)} are needed, {free}"


def _amount(size: int) -> str:
    unit, name = next((each for each in ((2**30, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}"
