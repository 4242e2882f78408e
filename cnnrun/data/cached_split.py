"""One split's folder in the cache: its pictures are decoded into it once, and verified whenever it is used again.

    pixels.u8      uint8 [N, C, H, W]; absent where pictures are decoded anew each time
    records        what is remembered of each picture, with a hash of its pixels (records.py)
    problems.jsonl what is wrong with the bad ones
    progress       a hash a block of its records and problems, zeros until the block is on the disk: a killed build goes
                   on from there
    plan.json      what is being built
    complete.json  the hashes of all these but the pixels, written last: without it the rest is unfinished

Whoever builds holds a lock that ends with the process; others wait. What is not as it was written is said, and is
decoded anew: the user's files are there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.base.errors import StorageError, escape
from cnnrun.base.locks import hold_lock
from cnnrun.base.ownership import check_ownership
from cnnrun.base.progress import say
from cnnrun.contracts.layer import Shape
from cnnrun.data.block_hashes import (
    HASH_BYTES,
    block_hash,
    file_hash,
    has_changed,
    parse_problems,
    pixel_hashes,
    problem_lines,
)
from cnnrun.data.cache import LOCK, SEAL, Progress, images_per_block, read_json
from cnnrun.data.decode import DecodedBlock, Decoder, ParallelMap
from cnnrun.data.image_records import RECORD

SYNC_BYTES = 64 << 20  # decoded between two waits for the disk: what a kill or a power cut can cost
_ELSEWHERE = "give data.cache_dir a folder of your own"
_VERIFIED_TOGETHER = 32  # blocks, between two looks of the progress bar


class CacheEntry:
    """One data set's folder in the cache. `verify`: all its pixels are looked at before they are used."""

    def __init__(self, path: Path, count: int, shape: Shape, *, keep_pixels: bool, verify: bool = False) -> None:
        self.path, self.count, self.shape, self.keep_pixels = path, count, shape, keep_pixels
        self._verify, self._bytes_each = verify and keep_pixels, int(np.prod(shape))

    def is_complete(self) -> bool:
        """Return whether everything is there, by the files' sizes. Raises StorageError for what others may write."""
        check_ownership(self.path, _ELSEWHERE)
        if not (self.path / SEAL).exists() or _size(self.path / "records") != self.count * RECORD.itemsize:
            return False
        return not self.keep_pixels or _size(self.path / "pixels.u8") == self.count * self._bytes_each

    def build(self, decoder: Decoder, about: dict[str, Any], run: ParallelMap, progress: Progress) -> None:
        """Decode what is not there yet, or no longer as it was written; waits while another process does.

        Raises StorageError.
        """
        if not os.access(self.path, os.W_OK) and self.is_complete():
            if self._is_sealed() and not self._damaged_blocks(run, progress):
                return  # root made it for all to read
            raise StorageError(f"{self.path}: not as it was written, and you may not write it; {_ELSEWHERE}")
        with storage_errors(self.path, self.count * self._bytes_each, " (data.cache_dir, data.cache)"):
            built = self._ensure_sealed(decoder, about, run, progress)
            if not built and self._damaged_blocks(run, progress):
                self.unseal()
                self._ensure_sealed(decoder, about, run, progress)

    def _ensure_sealed(self, decoder: Decoder, about: dict[str, Any], run: ParallelMap, progress: Progress) -> bool:
        """Build while holding the lock, unless it is sealed. Return whether that was to be done."""

        def waiting() -> None:
            say(f"another process is decoding these pictures into {self.path}; waiting for it")

        while True:
            for folder in (self.path.parent, self.path):  # the mode of further parents is not given
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_ownership(self.path, _ELSEWHERE)
            try:
                with hold_lock(self.path / LOCK, waiting):
                    if not (sealed := self._is_sealed()):
                        self._build(decoder, about, run, progress)
                    os.utime(self.path)  # when it was last used
                    return not sealed
            except FileNotFoundError:  # removed while this waited for the lock: begin anew
                if self.path.exists():
                    raise

    def _is_sealed(self) -> bool:
        """Return whether the files are as they were when they were complete; all but the pixels."""
        return self.is_complete() and read_json(self.path / SEAL) == self._seal()

    def _seal(self) -> dict[str, Any]:
        """What `complete.json` has to say: whose files these are, and their hashes."""
        names = ("plan.json", "progress", "problems.jsonl", "records")
        try:
            return {"key": self.path.name, "blake2b": {name: file_hash(self.path / name) for name in names}}
        except OSError:
            return {}

    def unseal(self) -> None:
        """Have every block looked at, and what is damaged decoded, when this is next opened."""
        (self.path / SEAL).unlink(missing_ok=True)

    def _build(self, decoder: Decoder, about: dict[str, Any], run: ParallelMap, progress: Progress) -> None:
        if (self.path / SEAL).exists():
            _say_from_any_rank(f"{self.path}: not as it was written; what is damaged is decoded anew")
        self.unseal()
        files = self._open(about)
        try:
            self._decode_missing(files, decoder, run, progress)
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        _write_json(self.path / SEAL, self._seal())

    def _decode_missing(self, files: dict[str, int], decoder: Decoder, run: ParallelMap, progress: Progress) -> None:
        missing, problems = self._missing_blocks(run, progress)
        _set_content(files["problems.jsonl"], problem_lines(problems))
        unsynced: dict[int, NDArray[np.uint8]] = {}
        with progress("decoding", self.count) as advance:
            advance(self.count - sum(len(self._numbers(block)) for block in missing))
            for block in missing:
                numbers = self._numbers(block)
                made = decoder.decode_block(np.array(numbers), run)
                unsynced[block] = self._write(files, numbers[0], made)
                advance(len(numbers))
                if len(unsynced) * len(numbers) * self._bytes_each >= SYNC_BYTES:
                    _sync(files, unsynced)
            _sync(files, unsynced)

    def _numbers(self, block: int) -> range:
        """The pictures of a block."""
        each = images_per_block(self._bytes_each)
        return range(block * each, min((block + 1) * each, self.count))

    def _blocks(self) -> int:
        return -(-self.count // images_per_block(self._bytes_each))

    def _open(self, about: dict[str, Any]) -> dict[str, int]:
        """Descriptors of the files being built; what an earlier build of the same plan left is gone on with."""
        names = [*(["pixels.u8"] if self.keep_pixels else []), "records", "problems.jsonl", "progress"]
        plan = {
            "key": self.path.name,
            "count": self.count,
            "shape": list(self.shape),
            "block": images_per_block(self._bytes_each),
        }
        plan |= about | {"files": names, "blocks": self._blocks()}
        sizes = {
            "pixels.u8": self.count * self._bytes_each,
            "records": self.count * RECORD.itemsize,
            "progress": self._blocks() * HASH_BYTES,
        }
        sizes = {name: size for name, size in sizes.items() if name in names}
        whole = all(_size(self.path / name) == size for name, size in sizes.items())
        if read_json(self.path / "plan.json") != plan or not whole:
            for name in ("progress", "pixels.u8", "records", "problems.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            _write_json(self.path / "plan.json", plan)
        files = {name: os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600) for name in names}
        for name, size in sizes.items():
            os.ftruncate(files[name], size)
        return files

    def _missing_blocks(self, run: ParallelMap, progress: Progress) -> tuple[list[int], dict[int, str]]:
        """The blocks that are not on the disk as they were written, and the problems of those that are."""
        noted = np.fromfile(self.path / "progress", np.uint8).reshape(-1, HASH_BYTES)
        records, problems, hashes = self.open_records()(), self.problems(), self.pixel_hashes()

        def is_damaged(block: int) -> bool:
            numbers = self._numbers(block)
            own = {number: problems[number] for number in numbers if number in problems}
            if not np.array_equal(block_hash(records[numbers.start : numbers.stop], own), noted[block]):
                return True
            return self._has_other_pixels(numbers, hashes)

        done = np.flatnonzero(noted.any(1)).tolist()
        damaged = self._blocks_where(done, is_damaged, run, progress)
        if damaged:
            places = ", ".join(f"{self._numbers(block)[0]:,} to {self._numbers(block)[-1]:,}" for block in damaged[:8])
            _say_from_any_rank(f"{self.path}: pictures {places} are not as they were written; decoded anew")
        whole = set(done) - set(damaged)
        each = images_per_block(self._bytes_each)
        kept = {number: text for number, text in problems.items() if number // each in whole}
        return [block for block in range(self._blocks()) if block not in whole], kept

    def _damaged_blocks(self, run: ParallelMap, progress: Progress) -> list[int]:
        """The blocks of a sealed entry whose pixels are not as they were written, where they are to be verified."""
        blocks = list(range(self._blocks())) if self._verify else []
        try:
            hashes = self.pixel_hashes()
            return self._blocks_where(
                blocks, lambda block: self._has_other_pixels(self._numbers(block), hashes), run, progress
            )
        except FileNotFoundError:  # cleared meanwhile
            return blocks

    def _blocks_where(
        self, blocks: Sequence[int], predicate: Callable[[int], bool], run: ParallelMap, progress: Progress
    ) -> list[int]:
        """The blocks for which the predicate is true, asked in several threads."""
        found: list[int] = []
        with progress("verifying", len(blocks)) as advance:
            for first in range(0, len(blocks), _VERIFIED_TOGETHER):
                some = blocks[first : first + _VERIFIED_TOGETHER]
                found += [block for block, is_true in zip(some, run(predicate, some), strict=True) if is_true]
                advance(len(some))
        return found

    def _has_other_pixels(self, numbers: range, hashes: NDArray[np.uint64]) -> bool:
        if not self.keep_pixels:
            return False
        pixels = np.empty((len(numbers), self._bytes_each), np.uint8)
        with (self.path / "pixels.u8").open("rb", buffering=0) as file:
            file.seek(numbers.start * self._bytes_each)
            whole = file.readinto(pixels.data.cast("B")) == pixels.nbytes
        return not whole or bool(has_changed(pixels, hashes[numbers.start : numbers.stop]).any())

    def pixel_hashes(self) -> NDArray[np.uint64]:
        """The hash that each picture's pixels must have."""
        return pixel_hashes(self.open_records()(), self.problems(), self._bytes_each)

    def _write(self, files: dict[str, int], first: int, made: DecodedBlock) -> NDArray[np.uint8]:
        """Write a block that begins with picture `first`; returns its hash."""
        if self.keep_pixels:
            _write_all(files["pixels.u8"], made.pixels.data, first * self._bytes_each)
        _write_all(files["records"], made.records.data, first * RECORD.itemsize)
        os.lseek(files["problems.jsonl"], 0, os.SEEK_END)
        os.write(files["problems.jsonl"], problem_lines(made.problems))
        return block_hash(made.records, made.problems)

    def open_records(self) -> Callable[[], NDArray[Any]]:
        """A function that maps a row of RECORD a picture: copy what is to stay. It outlives the folder's removal."""
        return RecordsFile(self.path / "records")

    def problems(self) -> dict[int, str]:
        """What is wrong with each bad picture, by its number."""
        found = parse_problems((self.path / "problems.jsonl").read_bytes())
        return {number: text for number, text in sorted(found.items()) if 0 <= number < self.count}


class RecordsFile:
    """The records of an entry, held open, so that they are these whatever becomes of the cache."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def __call__(self) -> NDArray[Any]:
        return np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), RECORD)


def _say_from_any_rank(line: str) -> None:
    """Print a line on stderr, whichever rank this is: `say` is the first one's, and any may find the damage."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{escape(line)}\n")


def _sync(files: dict[str, int], hashes: dict[int, NDArray[np.uint8]]) -> None:
    """Wait for the disk, and only then note those blocks as done, by their hashes."""
    for name in files:
        if name != "progress":
            os.fsync(files[name])
    for block, hashed in hashes.items():
        _write_all(files["progress"], hashed.data, block * HASH_BYTES)
    os.fsync(files["progress"])
    hashes.clear()


def _set_content(descriptor: int, data: bytes) -> None:
    """Make `data` all that a file holds, where it is not so already."""
    if os.pread(descriptor, len(data) + 1, 0) != data:
        _write_all(descriptor, memoryview(data), 0)
        os.ftruncate(descriptor, len(data))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    view = data.cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_json(path: Path, data: dict[str, Any]) -> None:
    Folder(path.parent).replace(path.name, json_bytes(data))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
