"""Storage of decoded images: in memory, in a file of the cache, or nowhere, decoded again at each use.

All kinds return the same bytes for the same rows. The kind depends on the images' size and the limits of the config.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from cnnrun.base.errors import StorageError, escape
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.config.spec import Spec
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.source import Masks, Split
from cnnrun.data import cache
from cnnrun.data.block_hashes import has_changed
from cnnrun.data.cache import ProgressBar
from cnnrun.data.cached_split import CacheEntry
from cnnrun.data.decode import DEFAULT_TIMEOUT, Decoder, ThreadedMap, start_threads
from cnnrun.data.file_listing import content_digest
from cnnrun.data.image_records import RECORD, digest
from cnnrun.data.image_settings import ImageSettings

_DECODER_VERSION = 6  # raise it when the same file would be decoded to other pixels, or get another record

CacheKind = Literal["auto", "disk", "memory", "none"]


class ImageStore(Protocol):
    """Decoded images by index."""

    shape: Shape
    is_in_memory: bool  # True if `take` needs neither the disk nor a decoder

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows, [n, C, H, W] on the host: uint8, or features of frozen layers."""
        ...

    def rows_being_read(self) -> list[int]:
        """The images that another thread is reading now, as far as known."""
        ...


class MemoryStore:
    """Images in an array in memory, or in a mapped file that fits into memory."""

    is_in_memory = True

    def __init__(self, array_NCHW: NDArray[Any]) -> None:
        self._array, self.shape = array_NCHW, array_NCHW.shape[1:]

    def __len__(self) -> int:
        return len(self._array)

    def take(self, rows: Tensor) -> Tensor:
        # A second thread that uses torch's threads slows the network's steps by a third (benchmarks/README.md).
        if threading.current_thread() is threading.main_thread():
            return torch.from_numpy(self._array).index_select(0, rows)
        return torch.from_numpy(self._array.take(rows.numpy(), axis=0))

    def rows_being_read(self) -> list[int]:
        return []


class DiskStore:
    """Images in a file too large for memory: each is read when it is taken, and not kept.

    The file is not mapped, because the kernel maps up to 2 MiB around each byte that is read, and counts them as this
    process's memory. An image is compared with its hash when it is taken for the first time. For damage, `unseal` is
    called, so that the next start decodes damaged images again.
    """

    is_in_memory = False

    def __init__(
        self, path: Path, shape: tuple[int, ...], hashes: NDArray[np.uint64], unseal: Callable[[], None]
    ) -> None:
        self._path, self._count, self.shape = path, shape[0], shape[1:]
        self._hashes, self._unseal = hashes, unseal
        self._is_verified = np.zeros(shape[0], bool)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._reading: list[int] = []
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def rows_being_read(self) -> list[int]:
        return self._reading

    def take(self, rows: Tensor) -> Tensor:
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        image_bytes = int(np.prod(self.shape))
        for position, row in enumerate(rows.tolist()):
            self._reading = [row]
            if os.preadv(self._file, (pixels[position].data,), row * image_bytes) != image_bytes:
                raise StorageError(f"{self._path}: image {row:,} is cut off; remove the file with `cnnrun cache clear`")
        self._verify(pixels, rows.numpy())
        return torch.from_numpy(pixels)

    def _verify(self, pixels_NCHW: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        is_new = ~self._is_verified[rows]
        if not is_new.any():
            return
        rows = rows[is_new]
        is_damaged = has_changed(pixels_NCHW[is_new], self._hashes[rows])
        if is_damaged.any():
            with contextlib.suppress(OSError):
                self._unseal()
            image = f"{self._path}: image {rows[is_damaged].min():,}"
            raise StorageError(f"{image} is damaged; start again to decode it again")
        self._is_verified[rows] = True


def map_file(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Map a file as an array. Changes to the array would not reach the file."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8).reshape(shape)


class DecodingStore:
    """Images that several threads decode each time they are taken."""

    is_in_memory = False

    def __init__(self, decoder: Decoder, workers: int, timeout: float) -> None:
        self._decoder, self.shape = decoder, decoder.shape
        self._threads = ThreadedMap(workers, timeout)

    def __len__(self) -> int:
        return len(self._decoder)

    def take(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._decoder.decode_batch(rows.numpy(), self._threads))

    def rows_being_read(self) -> list[int]:
        return self._decoder.rows_being_read()


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
        return np.array(
            [digest(image.numpy().tobytes()) for part in parts for image in self.images.take(part)], np.uint64
        )


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
    images = split.images
    if isinstance(images, np.ndarray) and images.shape[1:] == (*shape[1:], shape[0]):
        array = np.require(images.transpose(0, 3, 1, 2), requirements=["C", "W"])
        return StoredSplit(MemoryStore(array), None, {})
    decoder = Decoder(split, shape, image_settings, listing)
    workers = processor_count() if settings.workers is None else settings.workers
    folder = Path(settings.cache_dir) if settings.cache_dir else cache.user_cache_folder()
    key = _cache_key(split, shape, image_settings, listing)
    kind = _choose_kind(settings, folder, key, decoder)
    if folder is None or kind == "memory":
        return _decode_to_memory(decoder, workers, settings.timeout, progress)
    # An entry without pixels has a key of its own, because a run may build each kind at the same time.
    name = key if kind == "disk" else hashlib.sha256(f"records of {key}".encode()).hexdigest()[:32]
    full_shape = (len(decoder), *shape)
    fits_memory = int(np.prod(full_shape)) <= settings.memory_gib * 2**30
    entry = CacheEntry(folder / name, len(decoder), shape, keep_pixels=kind == "disk", verify=fits_memory)
    with start_threads(workers, settings.timeout) as parallel_map:
        entry.build(decoder, {"source": _source_name(split)}, parallel_map, progress)
    return StoredSplit(
        _open_images(entry, decoder, workers, settings.timeout, fits_memory), entry.open_records(), entry.problems()
    )


def _open_images(entry: CacheEntry, decoder: Decoder, workers: int, timeout: float, fits_memory: bool) -> ImageStore:
    """The images of a complete cache entry; without pixels in it, they are decoded at each use."""
    if not entry.keep_pixels:
        return DecodingStore(decoder, workers, timeout)
    path, shape = entry.path / "pixels.u8", (entry.count, *entry.shape)
    return (
        MemoryStore(map_file(path, shape))
        if fits_memory
        else DiskStore(path, shape, entry.pixel_hashes(), entry.unseal)
    )


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
    return CacheEntry(folder / key, len(split), shape, keep_pixels=True).is_complete()


def _decode_to_memory(decoder: Decoder, workers: int, timeout: float, progress: ProgressBar) -> StoredSplit:
    pixels = np.empty((len(decoder), *decoder.shape), np.uint8)
    records = np.empty(len(decoder), RECORD)
    problems: dict[int, str] = {}
    block_count = -(-len(decoder) // cache.images_per_block(pixels[0].nbytes))
    with start_threads(workers, timeout) as parallel_map, progress("decoding", len(decoder)) as advance:
        for rows in np.array_split(np.arange(len(decoder)), block_count):
            block = decoder.decode_block(rows, parallel_map)
            pixels[rows], records[rows] = block.pixels, block.records
            problems |= block.problems
            advance(len(rows))
    return StoredSplit(MemoryStore(pixels), lambda: records, problems)


def _choose_kind(settings: StorageSettings, folder: Path | None, key: str, decoder: Decoder) -> str:
    """Choose `disk`, `memory` or `none`, with a message if `auto` cannot use the disk. Raises StorageError."""
    needed_gib = len(decoder) * int(np.prod(decoder.shape)) / 2**30
    if folder is None and settings.cache in ("disk", "none"):
        raise StorageError("data.cache: there is no cache folder (HOME is not set); give data.cache_dir")
    if settings.cache in ("memory", "none"):
        return settings.cache
    if folder is not None and CacheEntry(folder / key, len(decoder), decoder.shape, keep_pixels=True).is_complete():
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
    return escape(split.origin if isinstance(item, np.ndarray) else str(Path(str(item)).parent))


def _cache_key(
    split: Split | Masks, shape: Shape, image_settings: ImageSettings, listing: NDArray[np.int64] | None
) -> str:
    """A digest of the files and of every setting that affects the decoded pixels."""
    pixel_settings = image_settings.model_dump(exclude={"size", "channels", "mean", "std"})
    decoding = repr((_DECODER_VERSION, cache.FORMAT_VERSION, shape, pixel_settings))
    if isinstance(split, Masks):
        decoding += repr(split.class_of_value)
    return hashlib.sha256(content_digest(split, listing) + decoding.encode()).hexdigest()[:32]
