"""Reading files that somebody else made: regular files alone, as large as they may be, unpacked to what fits.

A pipe or a device would be read for ever, a small archive may unpack to any amount, and a sparse file takes no disk.
Each reader says which error its caller's files raise: ConfigError, DataError or CheckpointError.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import UserError, escape

MAX_TEXT_BYTES = 64 << 20  # a list of names, a table of contents
_MOST_EXPANSION = 100  # times its own size that an archive may unpack to
_MOST_JSON_EXPANSION = 12  # COCO's own files take about four times their size
_SMALL_BYTES = 256 << 20  # what it may unpack to whatever its size
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

ErrorType = type[UserError]


@contextmanager
def open_file(
    path: Path, error: ErrorType, most: int | None = None, folder: Folder | None = None
) -> Iterator[io.BufferedReader]:
    """Open a regular file of at most `most` bytes for reading; in an opened `folder`, without following a link.

    Raises `error` where that cannot be, or where reading fails inside.
    """
    shown = escape(str(path))
    try:
        descriptor = os.open(path, _FLAGS) if folder is None else folder.open(path.name, _FLAGS)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise error(f"{shown}: not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            if most is not None and status.st_size > most:
                raise error(f"{shown}: {status.st_size:,} bytes; at most {most:,} are read")
            on_disk = 512 * getattr(status, "st_blocks", 0)  # 0 where a file system does not say
            if on_disk and status.st_size > max_unpacked_bytes(on_disk):
                raise error(f"{shown}: a sparse file: {on_disk:,} bytes on the disk that would be {status.st_size:,}")
            yield file
    except (OSError, ValueError) as failure:
        if isinstance(failure, ValueError) and "\0" not in str(path):
            raise
        raise error(f"{shown}: cannot be read ({getattr(failure, 'strerror', None) or failure})") from None


def read_bytes(path: Path, error: ErrorType, most: int | None = None, folder: Folder | None = None) -> bytes:
    """All of a regular file, which must fit the memory. Raises `error`."""
    with open_file(path, error, most, folder) as file:
        size = os.fstat(file.fileno()).st_size
        check_fits_memory(path, size, error)
        data = file.read(size + 1)
    if len(data) != size:
        raise error(f"{escape(str(path))}: changed while it was read")
    return data


def read_text(path: Path, error: ErrorType, most: int = MAX_TEXT_BYTES, folder: Folder | None = None) -> str:
    """All of a text file in UTF-8, a byte order mark left out. Raises `error`."""
    data = read_bytes(path, error, most, folder)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{escape(str(path))}: not UTF-8 (byte {failure.start})") from None


def read_json_bytes(path: Path, error: ErrorType, most: int) -> bytes:
    """All of a JSON file that will not take far more memory than its size explains. Raises `error`."""
    data = read_bytes(path, error, most)
    # Python keeps a text in as many bytes a letter as its widest letter needs.
    wide = 1 if data.isascii() else 4 if re.search(rb"[\xf0-\xf4]", data) else 2
    needed = (1 + wide) * len(data) + 232 * data.count(b"{") + 88 * data.count(b"[") + 40 * data.count(b",")
    if needed > max(_SMALL_BYTES, _MOST_JSON_EXPANSION * len(data)):
        raise error(f"{escape(str(path))}: {len(data):,} bytes of JSON that would take {needed:,}; refused")
    check_fits_memory(path, needed, error)
    return data


@contextmanager
def open_gzip(path: Path, error: ErrorType) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a gzip file, which can be read up to what an archive of that size may hold.

    Raises `error` where it is damaged or holds more.
    """
    with open_file(path, error) as packed:
        size = os.fstat(packed.fileno()).st_size
        try:
            with gzip.GzipFile(fileobj=packed) as unpacked:
                yield io.BufferedReader(_Limited(unpacked, path, max_unpacked_bytes(size), error))
        except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
            raise error(f"{escape(str(path))}: cannot be unpacked ({failure})") from None


def max_unpacked_bytes(packed_bytes: int) -> int:
    """The bytes that an archive of `packed_bytes` may unpack to; images are rarely packed to less than a fiftieth."""
    return max(_SMALL_BYTES, _MOST_EXPANSION * packed_bytes)


def refuse_expansion(path: Path, packed_bytes: int, unpacked_bytes: int, error: ErrorType) -> None:
    """Raises `error` where an archive says that it unpacks to more than one of its size may, or than fits."""
    if unpacked_bytes > max_unpacked_bytes(packed_bytes):
        raise error(
            f"{escape(str(path))}: {packed_bytes:,} bytes that would become {unpacked_bytes:,}; at most "
            f"{_MOST_EXPANSION} times as many are unpacked: store it with less compression"
        )
    check_fits_memory(path, unpacked_bytes, error)


def check_fits_memory(path: Path, needed_bytes: int, error: ErrorType) -> None:
    """Raises `error` where what is to be read needs more than the machine's memory."""
    if needed_bytes > memory_bytes():
        have = memory_bytes() / 2**30
        raise error(f"{escape(str(path))}: would take {needed_bytes / 2**30:,.1f} GiB; this machine has {have:,.1f}")


@cache
def memory_bytes() -> int:
    """The memory of this machine, or of the control group that holds this process."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 62
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            written = Path(place).read_text().strip()
        except OSError:
            continue
        if written.isdigit():
            whole = min(whole, int(written))
    return whole


class _Limited(io.RawIOBase):
    """Another file, of which no more than `most` bytes can be read."""

    def __init__(self, file: gzip.GzipFile, path: Path, most: int, error: ErrorType) -> None:
        self._file, self._path, self._left, self._most, self._error = file, path, most, most, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise self._error(f"{escape(str(self._path))}: unpacks to more than {self._most:,} bytes; refused")
        return count
