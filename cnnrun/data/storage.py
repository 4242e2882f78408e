"""Storage of decoded images: in memory, in a file of the cache, or nowhere, decoded again at each use.

The kind depends on the images' size and the limits of the config.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cnnrun.base.errors import StorageError, escape
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.config.spec import Spec
from cnnrun.contracts.drawn_masks import DrawnMask
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.source import Masks, Split
from cnnrun.data import cache
from cnnrun.data.cache import ProgressBar
from cnnrun.data.cached_split import CacheEntry
from cnnrun.data.decode import DEFAULT_TIMEOUT, Decoder, start_threads
from cnnrun.data.file_listing import content_digest
from cnnrun.data.image_records import digest, record_dtype
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.image_stores import DecodingStore, DiskStore, ImageStore, MemoryStore, map_file

_NOT_DECODING = {
    "size",
    "channels",
    "mean",
    "std",
    "bits",
    "white",
    "black",
    "clip",
}  # they change no pixel, or join the key below
_DECODER_VERSION = 6  # raise it when the same file would be decoded to other pixels, or get another record

CacheKind = Literal["auto", "disk", "memory", "none"]


@dataclass(frozen=True)
class StoredSplit:
    """The decoded images of one of the source's splits."""

    images: ImageStore
    records: Callable[[], NDArray[Any]] | None  # returns a row of RECORD per image; None if the source gave pixels
    problems: dict[int, str]  # why an image cannot be used, by its index

    def digests(self) -> NDArray[np.uint64]:
        """A hash of each image's pixels: uint64 [M]. Each bad image has a unique number in its place."""
        if self.records is not None:
            digests = np.array(self.records()["pixel_hash"])
            bad_rows = np.fromiter(self.problems, np.int64, len(self.problems))
            digests[bad_rows] = bad_rows
            return digests
        return self._pixel_digests

    @cached_property
    def _pixel_digests(self) -> NDArray[np.uint64]:
        parts = torch.arange(len(self.images)).split(cache.images_per_block(int(np.prod(self.images.shape))))
        levels = self.images.pixel_format.without_black()
        stored = (image for part in parts for image in levels.to_file(self.images.take(part)))
        return np.array([digest(image.numpy().tobytes()) for image in stored], np.uint64)


class StorageSettings(Spec):
    """Storage of decoded images, and the threads that decode them."""

    cache: CacheKind = "auto"
    """`disk`: decode once and keep for later runs; `memory`: decode in each run; `none`: decode at each use; `auto`: \
the first of these that the limits below allow."""
    cache_dir: str | None = None
    """Folder for `disk`; by default cnnrun's folder under the user's cache folder (see `cnnrun cache list`)."""
    disk_gib: float = Field(20.0, ge=0)
    """The most that the cache folder may take on the disk, in GiB."""
    memory_gib: float = Field(4.0, ge=0)
    """The most that the decoded images of one split of the source may take in memory, in GiB."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Threads that decode; by default one for each processor. The result does not depend on it."""
    timeout: float = Field(DEFAULT_TIMEOUT, gt=0)
    """Seconds to wait for images that are being read, before the run ends with an error."""


def store_split(
    split: Split | Masks,
    shape: Shape,
    image_settings: ImageSettings,
    settings: StorageSettings,
    listing: NDArray[np.int64] | None,
    progress: ProgressBar,
) -> StoredSplit:
    """Store the split's images, and decode those that are not in the cache yet. Raises StorageError."""
    decoder = Decoder(split, shape, image_settings, listing)
    if (pixels := _ready_pixels(split, decoder)) is not None:
        return StoredSplit(MemoryStore(pixels, decoder.pixel_format), None, {})
    workers = processor_count() if settings.workers is None else settings.workers
    folder = Path(settings.cache_dir) if settings.cache_dir else cache.user_cache_folder()
    key = _cache_key(split, shape, image_settings, listing)
    kind = _choose_kind(settings, folder, key, decoder)
    if folder is None or kind == "memory":
        return _decode_to_memory(decoder, workers, settings.timeout, progress)
    # An entry without pixels has a key of its own, because a run may build each kind at the same time.
    name = key if kind == "disk" else hashlib.sha256(f"records of {key}".encode()).hexdigest()[:32]
    fits_memory = len(decoder) * decoder.image_bytes <= settings.memory_gib * 2**30
    entry = CacheEntry(
        folder / name, len(decoder), shape, decoder.pixel_format, keep_pixels=kind == "disk", verify=fits_memory
    )
    with start_threads(workers, settings.timeout) as parallel_map:
        entry.build(decoder, {"source": _source_name(split)}, parallel_map, progress)
    return StoredSplit(
        _open_images(entry, decoder, workers, settings.timeout, fits_memory), entry.open_records(), entry.problems()
    )


def _ready_pixels(split: Split | Masks, decoder: Decoder) -> NDArray[Any] | None:
    """The pixels of a split in memory, [N, C, H, W], that need no conversion; None for others."""
    images, shape, pixel_format = split.images, decoder.shape, decoder.pixel_format
    if not isinstance(images, np.ndarray) or images.shape[1:] != (*shape[1:], shape[0]):
        return None
    is_shifted = pixel_format.black != 0
    is_outside = pixel_format.is_deep and images.max(initial=0) > pixel_format.white
    if images.dtype != pixel_format.dtype or is_shifted or is_outside:
        return None
    return np.require(images.transpose(0, 3, 1, 2), requirements=["C", "W"])


def _open_images(entry: CacheEntry, decoder: Decoder, workers: int, timeout: float, fits_memory: bool) -> ImageStore:
    """The images of a complete cache entry; without pixels in it, they are decoded at each use."""
    if not entry.keep_pixels:
        return DecodingStore(decoder, workers, timeout)
    path, shape, pixel_format = entry.pixels_path, (entry.count, *entry.shape), decoder.pixel_format
    if not fits_memory:
        return DiskStore(path, shape, entry.pixel_hashes(), entry.unseal, pixel_format)
    return MemoryStore(map_file(path, shape, pixel_format.dtype), pixel_format)


def is_cached(
    split: Split | Masks,
    shape: Shape,
    image_settings: ImageSettings,
    settings: StorageSettings,
    listing: NDArray[np.int64] | None,
) -> bool:
    """Return whether the cache has all images of the split."""
    folder = Path(settings.cache_dir) if settings.cache_dir else cache.user_cache_folder()
    if folder is None or settings.cache in ("memory", "none"):
        return False
    key = _cache_key(split, shape, image_settings, listing)
    return _pixels_entry(folder, key, Decoder(split, shape, image_settings, listing)).is_complete()


def _pixels_entry(folder: Path, key: str, decoder: Decoder) -> CacheEntry:
    return CacheEntry(folder / key, len(decoder), decoder.shape, decoder.pixel_format, keep_pixels=True)


def _decode_to_memory(decoder: Decoder, workers: int, timeout: float, progress: ProgressBar) -> StoredSplit:
    pixels = np.empty((len(decoder), *decoder.shape), decoder.pixel_format.dtype)
    records = np.empty(len(decoder), record_dtype(decoder.shape[0]))
    problems: dict[int, str] = {}
    block_count = -(-len(decoder) // cache.images_per_block(pixels[0].nbytes))
    with start_threads(workers, timeout) as parallel_map, progress("decoding", len(decoder)) as advance:
        for rows in np.array_split(np.arange(len(decoder)), block_count):
            block = decoder.decode_block(rows, parallel_map)
            pixels[rows], records[rows] = block.pixels, block.records
            problems |= block.problems
            advance(len(rows))
    return StoredSplit(MemoryStore(pixels, decoder.pixel_format), lambda: records, problems)


def _choose_kind(settings: StorageSettings, folder: Path | None, key: str, decoder: Decoder) -> str:
    """Choose `disk`, `memory` or `none`, with a message if `auto` cannot use the disk. Raises StorageError."""
    needed_gib = len(decoder) * decoder.image_bytes / 2**30
    if folder is None and settings.cache in ("disk", "none"):
        raise StorageError("data.cache: there is no cache folder (HOME is not set); give data.cache_dir")
    if settings.cache in ("memory", "none"):
        return settings.cache
    if folder is not None and _pixels_entry(folder, key, decoder).is_complete():
        return "disk"
    problem = _disk_problem(settings, folder, key, needed_gib)
    if problem and settings.cache == "disk":
        raise StorageError(f"data.cache: disk: {problem}")
    if not problem:
        return "disk"
    if needed_gib <= settings.memory_gib:
        say(f"decoded images are kept in memory and not for the next run: {problem}")
        return "memory"
    if folder is None:
        raise StorageError(f"{needed_gib:,.1f} GiB is more than data.memory_gib, and {problem}; give data.cache_dir")
    say(f"images are decoded again at each use: {needed_gib:,.1f} GiB is more than data.memory_gib, and {problem}")
    return "none"


def _disk_problem(settings: StorageSettings, folder: Path | None, key: str, needed_gib: float) -> str | None:
    """Reason that images of `needed_gib` cannot be kept in the cache folder, or None."""
    if folder is None:
        return "there is no cache folder (HOME is not set)"
    used_gib = cache.bytes_used(folder, except_key=key) / 2**30
    if used_gib + needed_gib > settings.disk_gib:
        sizes = f"{used_gib:,.1f} GiB now, {needed_gib:,.1f} GiB more"
        return f"{folder} would take more than data.disk_gib: {sizes} (cnnrun cache list)"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free_gib = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    has_room = needed_gib * 1.05 <= free_gib
    return None if has_room else f"{folder} has {free_gib:,.1f} GiB free, {needed_gib:,.1f} GiB are needed"


def _source_name(split: Split | Masks) -> str:
    """The folder of the split's images, or the name of the source, for lists of the cache."""
    item = split.images[0]
    return escape(split.origin if isinstance(item, np.ndarray | DrawnMask) else str(Path(str(item)).parent))


def _cache_key(
    split: Split | Masks, shape: Shape, image_settings: ImageSettings, listing: NDArray[np.int64] | None
) -> str:
    """A digest of the files and of every setting that affects the decoded pixels."""
    pixel_settings = image_settings.model_dump(exclude=_NOT_DECODING)
    decoding = repr((_DECODER_VERSION, cache.FORMAT_VERSION, shape, pixel_settings))
    if isinstance(split, Masks):
        decoding += split.meaning
    elif image_settings.pixel_format.is_deep:
        decoding += repr((image_settings.pixel_format, image_settings.clip))
    return hashlib.sha256(content_digest(split, listing) + decoding.encode()).hexdigest()[:32]
