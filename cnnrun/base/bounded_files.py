"""Safe reading of untrusted files: only regular files, and no more bytes than a limit allows.

A pipe or a device never ends, a small archive may unpack to any size, and a sparse file takes no space on the disk.
Every reader takes the type of `error` to raise: ConfigError, DataError or CheckpointError.
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
_MAX_EXPANSION = 100  # unpacked size of an archive, as a multiple of its own size
_MAX_JSON_EXPANSION = 12  # memory that JSON may take, as a multiple of its size; COCO's own files take about 4
_ALWAYS_ALLOWED_BYTES = 256 << 20  # any archive may unpack to this much, however small it is
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

ErrorType = type[UserError]


@contextmanager
def open_file(
    path: Path, error: ErrorType, max_bytes: int | None = None, folder: Folder | None = None
) -> Iterator[io.BufferedReader]:
    """Open a regular file of at most `max_bytes` for reading; in an opened `folder`, without following a link.

    Raises `error` if it cannot be opened, or if reading fails inside the `with` block.
    """
    shown = escape(str(path))
    try:
        descriptor = os.open(path, _READ_FLAGS) if folder is None else folder.open(path.name, _READ_FLAGS)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise error(f"{shown}: not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            if max_bytes is not None and status.st_size > max_bytes:
                raise error(f"{shown}: has {status.st_size:,} bytes; at most {max_bytes:,} are read")
            on_disk = 512 * getattr(status, "st_blocks", 0)  # 0 where a file system does not say
            if on_disk and status.st_size > max_unpacked_bytes(on_disk):
                raise error(
                    f"{shown}: is a sparse file of {status.st_size:,} bytes with only {on_disk:,} on the disk; "
                    "write it in full"
                )
            yield file
    except (OSError, ValueError) as failure:
        if isinstance(failure, ValueError) and "\0" not in str(path):
            raise
        raise error(f"{shown}: cannot be read ({getattr(failure, 'strerror', None) or failure})") from None


def read_bytes(path: Path, error: ErrorType, max_bytes: int | None = None, folder: Folder | None = None) -> bytes:
    """Read a regular file whole. Raises `error`, also if it does not fit into memory."""
    with open_file(path, error, max_bytes, folder) as file:
        size = os.fstat(file.fileno()).st_size
        check_fits_memory(path, size, error)
        data = file.read(size + 1)
    if len(data) != size:
        raise error(f"{escape(str(path))}: changed while it was read; try again")
    return data


def read_text(path: Path, error: ErrorType, max_bytes: int = MAX_TEXT_BYTES, folder: Folder | None = None) -> str:
    """Read a UTF-8 text file whole, without its byte order mark. Raises `error`."""
    data = read_bytes(path, error, max_bytes, folder)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{escape(str(path))}: not UTF-8 (byte {failure.start})") from None


def read_json_bytes(path: Path, error: ErrorType, max_bytes: int) -> bytes:
    """Read a JSON file whole. Raises `error`, also if parsing it would take far more memory than its size."""
    data = read_bytes(path, error, max_bytes)
    # Python stores all characters of a text in the width of the widest.
    character_bytes = 1 if data.isascii() else 4 if re.search(rb"[\xf0-\xf4]", data) else 2
    needed_bytes = (
        (1 + character_bytes) * len(data) + 232 * data.count(b"{") + 88 * data.count(b"[") + 40 * data.count(b",")
    )
    if needed_bytes > max(_ALWAYS_ALLOWED_BYTES, _MAX_JSON_EXPANSION * len(data)):
        raise error(f"{escape(str(path))}: {len(data):,} bytes of JSON would take {needed_bytes:,} bytes of memory")
    check_fits_memory(path, needed_bytes, error)
    return data


@contextmanager
def open_gzip(path: Path, error: ErrorType) -> Iterator[io.BufferedReader]:
    """Open a gzip file and give its unpacked bytes. Raises `error` if it is damaged or unpacks to too much."""
    with open_file(path, error) as packed:
        size = os.fstat(packed.fileno()).st_size
        try:
            with gzip.GzipFile(fileobj=packed) as unpacked:
                yield io.BufferedReader(_LimitedReader(unpacked, path, max_unpacked_bytes(size), error))
        except (EOFError, zlib.error, gzip.BadGzipFile) as failure:
            raise error(f"{escape(str(path))}: cannot be unpacked ({failure})") from None


def max_unpacked_bytes(packed_bytes: int) -> int:
    """Maximum size to which an archive of `packed_bytes` may unpack. Real images rarely compress more than 50 times."""
    return max(_ALWAYS_ALLOWED_BYTES, _MAX_EXPANSION * packed_bytes)


def check_expansion(path: Path, packed_bytes: int, unpacked_bytes: int, error: ErrorType) -> None:
    """Raise `error` if an archive's declared size is too large for its packed size, or for the memory."""
    if unpacked_bytes > max_unpacked_bytes(packed_bytes):
        raise error(
            f"{escape(str(path))}: {packed_bytes:,} bytes would unpack to {unpacked_bytes:,}, over the limit of "
            f"{_MAX_EXPANSION} times the size: store it with less compression"
        )
    check_fits_memory(path, unpacked_bytes, error)


def check_fits_memory(path: Path, needed_bytes: int, error: ErrorType) -> None:
    """Raise `error` if reading a file needs more than the machine's memory."""
    if needed_bytes > memory_bytes():
        needed_gib, memory_gib = needed_bytes / 2**30, memory_bytes() / 2**30
        raise error(f"{escape(str(path))}: would take {needed_gib:,.1f} GiB; this machine has {memory_gib:,.1f} GiB")


@cache
def memory_bytes() -> int:
    """Memory in bytes of this machine, or of this process's control group if that is less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 62
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(limit_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            memory = min(memory, int(limit))
    return memory


class _LimitedReader(io.RawIOBase):
    """Reader of another file that raises `error` after `max_bytes`."""

    def __init__(self, file: gzip.GzipFile, path: Path, max_bytes: int, error: ErrorType) -> None:
        self._file, self._path, self._error = file, path, error
        self._remaining = self._max_bytes = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)
        self._remaining -= count
        if self._remaining < 0:
            raise self._error(f"{escape(str(self._path))}: unpacks to more than {self._max_bytes:,} bytes, the limit")
        return count
