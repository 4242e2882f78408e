"""Listing of a split's files: sizes and times, or hashes of their bytes, and a digest of the whole split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.bounded_files import open_file
from cnnrun.base.errors import DataError
from cnnrun.base.file_sequences import Members
from cnnrun.base.machine_load import processor_count
from cnnrun.contracts.drawn_masks import DrawnMasks
from cnnrun.contracts.source import Masks, Split
from cnnrun.data.decode import start_threads
from cnnrun.data.image_files import image_errors, read_image_bytes
from cnnrun.data.image_records import digest


def list_files(split: Split | Masks, by_content: bool, workers: int | None) -> NDArray[np.int64] | None:
    """List each image's file as (size, time in ns), [N, 2], or with a hash of its bytes as [N, 3].

    Size and time of a missing file are -1. None if the images are in memory.
    """
    images = split.images
    if isinstance(images, np.ndarray | DrawnMasks):
        return None
    if isinstance(images, Members):
        shards = {shard: (*_stat(shard), *([_hash_shard(shard)] if by_content else [])) for shard in images.shards}
        return np.array([shards[member.shard] for member in images], np.int64)
    listing = np.array([_stat(path) for path in images], np.int64)
    return np.column_stack([listing, _hash_images(split, workers)]) if by_content else listing


def _stat(path: Path) -> tuple[int, int]:
    """Size and modification time in ns, or (-1, -1) if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _hash_shard(shard: Path) -> int:
    with open_file(shard, DataError) as file:
        hash_bytes = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
    return int.from_bytes(hash_bytes, "little", signed=True)


def _hash_images(split: Split | Masks, workers: int | None) -> NDArray[np.int64]:
    def hash_image(index: int) -> int:
        item = split.images[index]
        assert isinstance(item, Path)
        try:
            with image_errors(str(item)):
                return digest(read_image_bytes(item))
        except DataError:  # reported with all other bad files when they are decoded
            return 0

    with start_threads(processor_count() if workers is None else workers) as parallel_map:
        return np.array(parallel_map(hash_image, range(len(split))), np.uint64).view(np.int64)


def content_digest(split: Split | Masks, listing: NDArray[np.int64] | None) -> bytes:
    """A digest of a split's images: of the names and the listing of its files, or of the pixels themselves."""
    hasher = hashlib.sha256()
    if isinstance(split.images, np.ndarray):
        hasher.update(np.ascontiguousarray(split.images).data)
        if split.images.dtype != np.uint8:  # as digests were before there were others
            hasher.update(split.images.dtype.str.encode())
        return hasher.digest()
    hasher.update(split.images.digest())
    if listing is None:
        return hasher.digest()
    # If the bytes were hashed, the files' times (column 1) do not matter.
    hasher.update(np.ascontiguousarray(listing[:, [0, 2]] if listing.shape[1] == 3 else listing).data)
    return hasher.digest()
