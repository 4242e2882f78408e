"""Decoded pictures on the disk, each data set decoded once: found again by the next run, shared by those that run now.

    <folder>/<key>/pixels.u8      uint8 [N, C, H, W]; absent where pictures are decoded anew each time
    <folder>/<key>/records        what is remembered of each picture (records.py)
    <folder>/<key>/problems.jsonl what is wrong with the bad ones
    <folder>/<key>/progress       a byte a block, 1 once the block is on the disk: a killed build goes on from there
    <folder>/<key>/complete.json  written last: without it the rest is unfinished

The key is a digest of the files and of everything that decides what they are decoded to. Whoever builds holds a lock
that ends with the process; others wait.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.bounded_files import read_bytes
from cnnrun.contracts import Shape
from cnnrun.decoding import Block, Decoder, Map
from cnnrun.errors import StorageError
from cnnrun.locks import Locked, hold
from cnnrun.progress import say
from cnnrun.records import RECORD

BLOCK_PICTURES, BLOCK_BYTES = 1024, 32 << 20
SYNC_BYTES = 64 << 20  # decoded between two waits for the disk: what a kill or a power cut can cost

LOCK = "lock"
MAX_JSON_BYTES = 1 << 20
COPIES = "shards"  # beside the data sets: shards fetched from elsewhere
_KEY, _COPY = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.(tar|[0-9]+\.tmp)")
_PLANNED = {"source", "count", "shape", "block", "files", "blocks"}

Progress = Callable[[str, int], Any]


def at_once(bytes_each: int) -> int:
    """How many pictures of that size are decoded, written or summed up together."""
    return max(1, min(BLOCK_PICTURES, BLOCK_BYTES // bytes_each))


def home() -> Path | None:
    """cnnrun's folder under the user's cache folder; None where the user has none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnnrun"
    except RuntimeError:  # neither HOME nor an account
        return None


class Entry:
    """One data set's folder in the cache."""

    def __init__(self, path: Path, count: int, shape: Shape, *, keep_pixels: bool) -> None:
        self.path, self.count, self.shape, self.keep_pixels = path, count, shape, keep_pixels
        self._bytes_each = int(np.prod(shape))

    def complete(self) -> bool:
        """Whether everything is there, whole."""
        if not (self.path / "complete.json").exists() or _size(self.path / "records") != self.count * RECORD.itemsize:
            return False
        return not self.keep_pixels or _size(self.path / "pixels.u8") == self.count * self._bytes_each

    def build(self, decoder: Decoder, about: dict[str, Any], run: Map, progress: Progress) -> None:
        """Decode what is not there yet; waits while another process does. Raises StorageError."""
        if self.complete() and not os.access(self.path, os.W_OK):
            return  # of somebody else's cache: whole, and not to be written
        with storage_errors(self.path, self.count * self._bytes_each, " (data.cache_dir, data.cache)"):
            while not self._build_once(decoder, about, run, progress):
                pass

    def _build_once(self, decoder: Decoder, about: dict[str, Any], run: Map, progress: Progress) -> bool:
        """Build while holding the lock; return False where the folder was removed while this waited for it."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)

        def waiting() -> None:
            say(f"another process is decoding these pictures into {self.path}; waiting for it")

        try:
            with hold(self.path / LOCK, waiting):
                if not self.complete():
                    self._build(decoder, about, run, progress)
                os.utime(self.path)  # when it was last used
        except FileNotFoundError:
            if self.path.exists():
                raise
            return False
        return True

    def _build(self, decoder: Decoder, about: dict[str, Any], run: Map, progress: Progress) -> None:
        (self.path / "complete.json").unlink(missing_ok=True)
        each = at_once(self._bytes_each)
        firsts = range(0, self.count, each)
        about = about | {"count": self.count, "shape": list(self.shape), "block": each}
        files = self._open(len(firsts), about)
        try:
            _drop_torn_line(files["problems.jsonl"])
            done = np.frombuffer(os.pread(files["progress"], len(firsts), 0), np.uint8).astype(bool)
            unsynced: list[int] = []
            with progress("decoding", self.count) as advance:
                advance(int(done.sum()) * each)
                for number in np.flatnonzero(~done).tolist():
                    first = firsts[number]
                    made = decoder.block(np.arange(first, min(first + each, self.count)), run)
                    self._write(files, first, made)
                    advance(len(made.pixels))
                    unsynced.append(number)
                    if len(unsynced) * each * self._bytes_each >= SYNC_BYTES:
                        _sync(files, unsynced)
                _sync(files, unsynced)
            _write_json(self.path / "complete.json", about)
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def _open(self, blocks: int, plan: dict[str, Any]) -> dict[str, int]:
        """Descriptors of the files being built; what an earlier build of the same plan left is gone on with."""
        names = [*(["pixels.u8"] if self.keep_pixels else []), "records", "problems.jsonl", "progress"]
        plan = plan | {"files": names, "blocks": blocks}
        sizes = {
            "pixels.u8": self.count * self._bytes_each,
            "records": self.count * RECORD.itemsize,
            "progress": blocks,
        }
        sizes = {name: size for name, size in sizes.items() if name in names}
        whole = all(_size(self.path / name) == size for name, size in sizes.items())
        if _read_json(self.path / "plan.json") != plan or not whole:
            for name in ("progress", "pixels.u8", "records", "problems.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            _write_json(self.path / "plan.json", plan)
        files = {name: os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600) for name in names}
        for name, size in sizes.items():
            os.ftruncate(files[name], size)
        return files

    def _write(self, files: dict[str, int], first: int, made: Block) -> None:
        if self.keep_pixels:
            _write_all(files["pixels.u8"], made.pixels.data, first * self._bytes_each)
        _write_all(files["records"], made.records.data, first * RECORD.itemsize)
        lines = "".join(json.dumps([number, text]) + "\n" for number, text in sorted(made.problems.items()))
        os.lseek(files["problems.jsonl"], 0, os.SEEK_END)
        os.write(files["problems.jsonl"], lines.encode())

    def records(self) -> Callable[[], NDArray[Any]]:
        """A function that maps a row of RECORD a picture: copy what is to stay. It outlives the folder's removal."""
        return Records(self.path / "records")

    def problems(self) -> dict[int, str]:
        """What is wrong with each bad picture, by its number."""
        lines = (self.path / "problems.jsonl").read_text().splitlines()
        return dict(sorted((number, text) for number, text in map(json.loads, lines)))


class Records:
    """The records of an entry, held open, so that they are these whatever becomes of the cache."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def __call__(self) -> NDArray[Any]:
        return np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), RECORD)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Every data set in the cache, the one used last first."""
    found = []
    for path in _folders(folder):
        plan = _read_json(path / "plan.json") if _KEY.fullmatch(path.name) else None
        if path.name == COPIES and (copies := _copies(path)):
            plan = dict.fromkeys(_PLANNED) | {"source": "shards from elsewhere", "count": len(copies), "shape": []}
        if isinstance(plan, dict) and set(plan) >= _PLANNED:
            found.append(
                {
                    "key": path.name,
                    "source": str(plan.get("source")),
                    "count": int(plan.get("count", 0)),
                    "shape": list(plan.get("shape", [])),
                    "bytes": _bytes_in(path),
                    "complete": path.name == COPIES or (path / "complete.json").exists(),
                    "used": path.stat().st_mtime,
                }
            )
    return sorted(found, key=lambda entry: -float(str(entry["used"])))


def _copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _COPY.fullmatch(path.name)]


def bytes_used(folder: Path, but: str = "") -> int:
    """What the cache takes on the disk; `but` that data set."""
    return sum(_bytes_in(path) for path in _folders(folder) if path.name != but)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def clear(folder: Path, keys: list[str]) -> tuple[list[str], list[str]]:
    """Remove those data sets; returns (removed, left because a process is building them)."""
    removed, left = [], []
    for key in keys:
        if key == COPIES:
            for path in _copies(folder / key):
                path.unlink()
            removed.append(key)
            continue
        try:
            with storage_errors(folder / key, 0), hold(folder / key / LOCK):
                _empty(folder / key)
            removed.append(key)
        except Locked:
            left.append(key)
    return removed, left


def _empty(folder: Path) -> None:
    """Remove a data set, its lock last: whoever waits for that finds nothing half removed, and begins anew."""
    opened = Folder(folder)
    for name in opened.names():
        if not name.startswith(LOCK):
            opened.remove(name)
    shutil.rmtree(folder)


def _sync(files: dict[str, int], blocks: list[int]) -> None:
    """Wait for the disk, and only then note those blocks as done."""
    for name in files:
        if name != "progress":
            os.fsync(files[name])
    for number in blocks:
        os.pwrite(files["progress"], b"\x01", number)
    os.fsync(files["progress"])
    blocks.clear()


def _drop_torn_line(descriptor: int) -> None:
    """Cut off what a killed build began to write; its block is decoded again."""
    text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    os.ftruncate(descriptor, text.rfind(b"\n") + 1)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    view = data.cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_json(path: Path, data: dict[str, Any]) -> None:
    Folder(path.parent).replace(path.name, json_bytes(data))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path, StorageError, MAX_JSON_BYTES))
    except (StorageError, ValueError, RecursionError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _bytes_in(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())
