"""One split's folder in the cache: its images are decoded into it once, and verified each time it is used again.

    pixels.u8      uint8 [N, C, H, W], or pixels.u16 for 16 bits; absent if images are decoded at each use
    records        a row for each image: size, format, statistics and a hash of its pixels (image_records.py)
    problems.jsonl the reasons that bad images cannot be decoded
    progress       a hash for each block's records and problems, zeros until the block is on the disk; a killed build
                   resumes from here
    plan.json      key, shape and files of the entry
    complete.json  the hashes of all these files except the pixels, written last: without it the entry is unfinished

A process that builds an entry holds its lock, and others wait. Damaged blocks are reported, and decoded again from the
user's files.
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
from cnnrun.contracts.pixels import EIGHT_BITS, PixelFormat
from cnnrun.data.block_hashes import (
    HASH_BYTES,
    block_hash,
    expected_pixel_hashes,
    file_hash,
    has_changed,
    parse_problems,
    problem_lines,
)
from cnnrun.data.cache import LOCK_FILE, SEAL_FILE, ProgressBar, images_per_block, read_json
from cnnrun.data.decode import DecodedBlock, Decoder, ParallelMap
from cnnrun.data.image_records import record_dtype

SYNC_BYTES = 64 << 20  # pixels decoded between two syncs: the work that a kill or a power cut can lose
_OWN_FOLDER_ADVICE = "give data.cache_dir a folder of your own"
_BLOCKS_PER_UPDATE = 32  # blocks verified between two updates of the progress bar


class CacheEntry:
    """One split's folder in the cache. With `verify` all its pixels are checked before they are used."""

    def __init__(
        self,
        path: Path,
        count: int,
        shape: Shape,
        pixel_format: PixelFormat = EIGHT_BITS,
        *,
        keep_pixels: bool,
        verify: bool = False,
    ) -> None:
        self.path, self.count, self.shape, self.keep_pixels = path, count, shape, keep_pixels
        self.pixels_path = path / f"pixels.u{8 * pixel_format.dtype.itemsize}"
        self._verify, self._record_dtype = verify and keep_pixels, record_dtype(shape[0])
        self._image_bytes = int(np.prod(shape)) * pixel_format.dtype.itemsize

    def is_complete(self) -> bool:
        """Return whether all files have their full size. Raises StorageError if other users may write the folder."""
        check_ownership(self.path, _OWN_FOLDER_ADVICE)
        if (
            not (self.path / SEAL_FILE).exists()
            or _file_size(self.path / "records") != self.count * self._record_dtype.itemsize
        ):
            return False
        return not self.keep_pixels or _file_size(self.pixels_path) == self.count * self._image_bytes

    def build(
        self, decoder: Decoder, description: dict[str, Any], parallel_map: ParallelMap, progress: ProgressBar
    ) -> None:
        """Decode the blocks that are missing or damaged. Waits while another process builds the entry.

        `description` is stored in `plan.json`, for people.
        Raises StorageError if the folder cannot be used, or the disk is full.
        """
        if not os.access(self.path, os.W_OK) and self.is_complete():
            if self._is_sealed() and not self._find_damaged_blocks(parallel_map, progress):
                return  # such as an entry that root made for all to read
            raise StorageError(f"{self.path}: damaged, and you may not write it; {_OWN_FOLDER_ADVICE}")
        with storage_errors(self.path, self.count * self._image_bytes, " (data.cache_dir, data.cache)"):
            was_sealed = not self._ensure_sealed(decoder, description, parallel_map, progress)
            if was_sealed and self._find_damaged_blocks(parallel_map, progress):
                self.unseal()
                self._ensure_sealed(decoder, description, parallel_map, progress)

    def _ensure_sealed(
        self, decoder: Decoder, description: dict[str, Any], parallel_map: ParallelMap, progress: ProgressBar
    ) -> bool:
        """Build the entry while holding its lock, unless it is sealed. Returns whether it was built."""

        def say_waiting() -> None:
            say(f"another process is decoding these images into {self.path}; waiting for it")

        while True:
            for folder in (self.path.parent, self.path):  # `mode` does not apply to further parents
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_ownership(self.path, _OWN_FOLDER_ADVICE)
            try:
                with hold_lock(self.path / LOCK_FILE, say_waiting):
                    if not (was_sealed := self._is_sealed()):
                        self._build_locked(decoder, description, parallel_map, progress)
                    os.utime(self.path)  # when it was last used
                    return not was_sealed
            except FileNotFoundError:  # removed while this process waited for the lock: try again
                if self.path.exists():
                    raise

    def _is_sealed(self) -> bool:
        """Return whether all files but the pixels are unchanged since the entry was completed."""
        return self.is_complete() and read_json(self.path / SEAL_FILE) == self._seal_content()

    def _seal_content(self) -> dict[str, Any]:
        """The content that `complete.json` must have: the entry's key and the hashes of its files."""
        names = ("plan.json", "progress", "problems.jsonl", "records")
        try:
            return {"key": self.path.name, "blake2b": {name: file_hash(self.path / name) for name in names}}
        except OSError:
            return {}

    def unseal(self) -> None:
        """Mark the entry as unfinished, so that the next build checks every block and decodes damaged ones again."""
        (self.path / SEAL_FILE).unlink(missing_ok=True)

    def _build_locked(
        self, decoder: Decoder, description: dict[str, Any], parallel_map: ParallelMap, progress: ProgressBar
    ) -> None:
        if (self.path / SEAL_FILE).exists():
            _print_on_any_rank(f"{self.path}: damaged; decoding the damaged parts again")
        self.unseal()
        files = self._open_files(description)
        try:
            self._decode_missing(files, decoder, parallel_map, progress)
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        _write_json(self.path / SEAL_FILE, self._seal_content())

    def _decode_missing(
        self, files: dict[str, int], decoder: Decoder, parallel_map: ParallelMap, progress: ProgressBar
    ) -> None:
        missing, problems = self._find_missing_blocks(parallel_map, progress)
        _replace_content(files["problems.jsonl"], problem_lines(problems))
        unsynced: dict[int, NDArray[np.uint8]] = {}
        with progress("decoding", self.count) as advance:
            advance(self.count - sum(len(self._block_images(block)) for block in missing))
            for block in missing:
                rows = self._block_images(block)
                decoded = decoder.decode_block(np.array(rows), parallel_map)
                unsynced[block] = self._write_block(files, rows[0], decoded)
                advance(len(rows))
                if len(unsynced) * len(rows) * self._image_bytes >= SYNC_BYTES:
                    _sync(files, unsynced)
            _sync(files, unsynced)

    def _block_images(self, block: int) -> range:
        """The indices of the images in a block."""
        block_size = images_per_block(self._image_bytes)
        return range(block * block_size, min((block + 1) * block_size, self.count))

    def _block_count(self) -> int:
        return -(-self.count // images_per_block(self._image_bytes))

    def _open_files(self, description: dict[str, Any]) -> dict[str, int]:
        """Open the entry's files for writing: descriptors by name. An unfinished build of the same plan is resumed."""
        names = [*([self.pixels_path.name] if self.keep_pixels else []), "records", "problems.jsonl", "progress"]
        plan = {
            "key": self.path.name,
            "count": self.count,
            "shape": list(self.shape),
            "block": images_per_block(self._image_bytes),
        }
        plan |= description | {"files": names, "blocks": self._block_count()}
        sizes = {
            self.pixels_path.name: self.count * self._image_bytes,
            "records": self.count * self._record_dtype.itemsize,
            "progress": self._block_count() * HASH_BYTES,
        }
        sizes = {name: size for name, size in sizes.items() if name in names}
        has_full_sizes = all(_file_size(self.path / name) == size for name, size in sizes.items())
        if read_json(self.path / "plan.json") != plan or not has_full_sizes:
            for name in ("progress", self.pixels_path.name, "records", "problems.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            _write_json(self.path / "plan.json", plan)
        files = {name: os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600) for name in names}
        for name, size in sizes.items():
            os.ftruncate(files[name], size)
        return files

    def _find_missing_blocks(
        self, parallel_map: ParallelMap, progress: ProgressBar
    ) -> tuple[list[int], dict[int, str]]:
        """The blocks that are missing or damaged, and the image problems noted in the others."""
        expected_hashes = np.fromfile(self.path / "progress", np.uint8).reshape(-1, HASH_BYTES)
        records, problems, hashes = self.open_records()(), self.problems(), self.pixel_hashes()

        def is_damaged(block: int) -> bool:
            rows = self._block_images(block)
            block_problems = {row: problems[row] for row in rows if row in problems}
            if not np.array_equal(block_hash(records[rows.start : rows.stop], block_problems), expected_hashes[block]):
                return True
            return self._has_damaged_pixels(rows, hashes)

        written = np.flatnonzero(expected_hashes.any(1)).tolist()
        damaged = self._filter_blocks(written, is_damaged, parallel_map, progress)
        if damaged:
            ranges = ", ".join(
                f"{self._block_images(block)[0]:,} to {self._block_images(block)[-1]:,}" for block in damaged[:8]
            )
            _print_on_any_rank(f"{self.path}: images {ranges} are damaged; decoding them again")
        intact = set(written) - set(damaged)
        block_size = images_per_block(self._image_bytes)
        intact_problems = {row: text for row, text in problems.items() if row // block_size in intact}
        return [block for block in range(self._block_count()) if block not in intact], intact_problems

    def _find_damaged_blocks(self, parallel_map: ParallelMap, progress: ProgressBar) -> list[int]:
        """The blocks of a sealed entry whose pixels are damaged. Empty if pixels are verified at first use."""
        blocks = list(range(self._block_count())) if self._verify else []
        try:
            hashes = self.pixel_hashes()
            return self._filter_blocks(
                blocks,
                lambda block: self._has_damaged_pixels(self._block_images(block), hashes),
                parallel_map,
                progress,
            )
        except FileNotFoundError:  # another process cleared the cache meanwhile
            return blocks

    def _filter_blocks(
        self, blocks: Sequence[int], predicate: Callable[[int], bool], parallel_map: ParallelMap, progress: ProgressBar
    ) -> list[int]:
        """The blocks for which the predicate is true. Calls it in several threads."""
        matching: list[int] = []
        with progress("verifying", len(blocks)) as advance:
            for first in range(0, len(blocks), _BLOCKS_PER_UPDATE):
                part = blocks[first : first + _BLOCKS_PER_UPDATE]
                matching += [
                    block for block, matches in zip(part, parallel_map(predicate, part), strict=True) if matches
                ]
                advance(len(part))
        return matching

    def _has_damaged_pixels(self, rows: range, hashes: NDArray[np.uint64]) -> bool:
        if not self.keep_pixels:
            return False
        pixels = np.empty((len(rows), self._image_bytes), np.uint8)
        with self.pixels_path.open("rb", buffering=0) as file:
            file.seek(rows.start * self._image_bytes)
            is_full = file.readinto(pixels.data.cast("B")) == pixels.nbytes
        return not is_full or bool(has_changed(pixels, hashes[rows.start : rows.stop]).any())

    def pixel_hashes(self) -> NDArray[np.uint64]:
        """The hash that each image's pixels must have, by its records."""
        return expected_pixel_hashes(self.open_records()(), self.problems(), self._image_bytes)

    def _write_block(self, files: dict[str, int], first: int, decoded: DecodedBlock) -> NDArray[np.uint8]:
        """Write a block that begins with image `first`; returns its hash."""
        if self.keep_pixels:
            _write_all(files[self.pixels_path.name], decoded.pixels.data, first * self._image_bytes)
        _write_all(files["records"], decoded.records.data, first * self._record_dtype.itemsize)
        os.lseek(files["problems.jsonl"], 0, os.SEEK_END)
        os.write(files["problems.jsonl"], problem_lines(decoded.problems))
        return block_hash(decoded.records, decoded.problems)

    def open_records(self) -> Callable[[], NDArray[Any]]:
        """Open the records file. Calling the result gives its rows, one per image; copy rows that you keep.

        It works after the folder is removed.
        """
        return RecordsFile(self.path / "records", self._record_dtype)

    def problems(self) -> dict[int, str]:
        """The reason that each bad image cannot be decoded, by its index."""
        problems = parse_problems((self.path / "problems.jsonl").read_bytes())
        return {number: text for number, text in sorted(problems.items()) if 0 <= number < self.count}


class RecordsFile:
    """The open records file of an entry. It stays readable if the entry is removed from the cache."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def __call__(self) -> NDArray[Any]:
        return np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), self._dtype)


def _print_on_any_rank(line: str) -> None:
    """Print a line on stderr. `say` prints on the first rank only, and any rank may find damage."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{escape(line)}\n")


def _sync(files: dict[str, int], hashes: dict[int, NDArray[np.uint8]]) -> None:
    """Wait until blocks are on the disk, and only then write their hashes to `progress`. Empties `hashes`."""
    for name in files:
        if name != "progress":
            os.fsync(files[name])
    for block, hash_bytes in hashes.items():
        _write_all(files["progress"], hash_bytes.data, block * HASH_BYTES)
    os.fsync(files["progress"])
    hashes.clear()


def _replace_content(descriptor: int, data: bytes) -> None:
    """Make `data` the whole content of a file. Writes nothing if it is already."""
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


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
