"""The files of a split as they were found: sizes and times, or hashes of their bytes; and a digest of the whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.bounded_files import open_file
from cnnrun.base.errors import DataError
from cnnrun.base.file_sequences import Members
from cnnrun.contracts.source import Split
from cnnrun.data.decode import processor_count, start_threads
from cnnrun.data.image_files import image_errors, read_image_bytes
from cnnrun.data.image_records import digest


def list_files(split: Split, by_content: bool, workers: int | None) -> NDArray[np.int64] | None:
    """[N, 2] of each file's (size, time in ns), or of (size, time, hash of its bytes); -1 where it is not there.

    None for pictures in memory.
    """
    pictures = split.images
    if isinstance(pictures, np.ndarray):
        return None
    if isinstance(pictures, Members):
        shards = {shard: (*_stat(shard), *([_hashed(shard)] if by_content else [])) for shard in pictures.shards}
        return np.array([shards[member.shard] for member in pictures], np.int64)
    made = np.array([_stat(path) for path in pictures], np.int64)
    return np.column_stack([made, _contents(split, workers)]) if by_content else made


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _hashed(shard: Path) -> int:
    with open_file(shard, DataError) as file:
        made = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
    return int.from_bytes(made, "little", signed=True)


def _contents(split: Split, workers: int | None) -> NDArray[np.int64]:
    def hashed(number: int) -> int:
        item = split.images[number]
        assert isinstance(item, Path)
        try:
            with image_errors(str(item)):
                return digest(read_image_bytes(item))
        except DataError:  # told with all others when they are decoded
            return 0

    with start_threads(processor_count() if workers is None else workers) as run:
        return np.array(run(hashed, range(len(split))), np.uint64).view(np.int64)


def content_digest(split: Split, listed: NDArray[np.int64] | None) -> bytes:
    """A digest of a split's pictures: names and listing of its files, or the pixels themselves."""
    made = hashlib.sha256()
    if isinstance(split.images, np.ndarray):
        made.update(np.ascontiguousarray(split.images).data)
        return made.digest()
    assert listed is not None
    made.update(split.images.digest())
    # Where the bytes were hashed, the files' times say nothing more.
    made.update(np.ascontiguousarray(listed[:, [0, 2]] if listed.shape[1] == 3 else listed).data)
    return made.digest()
