"""Where decoded pictures are: in memory, in a mapped file of the cache, or nowhere, decoded anew each time.

Each gives the same bytes for the same numbers; which it is depends on their size and on what the config allows.
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
from cnnrun.base.progress import say
from cnnrun.config.spec import Spec
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.source import Split
from cnnrun.data import cache
from cnnrun.data.block_hashes import has_changed
from cnnrun.data.cache import Progress
from cnnrun.data.cached_split import CacheEntry
from cnnrun.data.decode import Decoder, ThreadedMap, processor_count, start_threads
from cnnrun.data.file_listing import content_digest
from cnnrun.data.image_files import ImageSettings
from cnnrun.data.image_records import RECORD, digest

_DECODER = 5  # raised whenever the same file would be decoded to other pixels or remembered otherwise

CacheKind = Literal["auto", "disk", "memory", "none"]


class ImageStore(Protocol):
    """Decoded pictures by number."""

    shape: Shape
    is_in_memory: bool  # whether taking some means neither a disk nor a decoder

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Tensor:
        """Those pictures: [n, C, H, W] on the host, uint8 unless they are features."""
        ...

    def rows_being_read(self) -> list[int]:
        """Those that another thread is reading now, as far as that is known."""
        ...


class InMemory:
    """An array in memory, or mapped from a file that fits it."""

    is_in_memory = True

    def __init__(self, array_NCHW: NDArray[Any]) -> None:
        self._array, self.shape = array_NCHW, array_NCHW.shape[1:]

    def __len__(self) -> int:
        return len(self._array)

    def take(self, rows: Tensor) -> Tensor:
        # A second thread that used torch's threads would slow the network's steps by a third (benchmarks/README.md).
        if threading.current_thread() is threading.main_thread():
            return torch.from_numpy(self._array).index_select(0, rows)
        return torch.from_numpy(self._array.take(rows.numpy(), axis=0))

    def rows_being_read(self) -> list[int]:
        return []


class OnDisk:
    """A file of pictures larger than memory may hold: each is read when it is taken, and nothing of it stays.

    Not mapped: the kernel maps up to 2 MiB around each byte that is touched, and counts them to this process. A picture
    is compared with its hash when it is taken for the first time; `unseal` has the damaged ones decoded anew when the
    file is next opened.
    """

    is_in_memory = False

    def __init__(
        self, path: Path, shape: tuple[int, ...], hashes: NDArray[np.uint64], unseal: Callable[[], None]
    ) -> None:
        self._path, self._count, self.shape = path, shape[0], shape[1:]
        self._hashes, self._unseal = hashes, unseal
        self._verified = np.zeros(shape[0], bool)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._reading: list[int] = []
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def rows_being_read(self) -> list[int]:
        return self._reading

    def take(self, rows: Tensor) -> Tensor:
        out = np.empty((len(rows), *self.shape), np.uint8)
        each = int(np.prod(self.shape))
        for place, row in enumerate(rows.tolist()):
            self._reading = [row]
            if os.preadv(self._file, (out[place].data,), row * each) != each:
                raise StorageError(f"{self._path}: picture {row} is cut off; `cnnrun cache clear` removes the file")
        self._verify(out, rows.numpy())
        return torch.from_numpy(out)

    def _verify(self, pixels_NCHW: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        new = ~self._verified[rows]
        if not new.any():
            return
        rows = rows[new]
        changed = has_changed(pixels_NCHW[new], self._hashes[rows])
        if changed.any():
            with contextlib.suppress(OSError):
                self._unseal()
            which = f"{self._path}: picture {rows[changed].min():,}"
            raise StorageError(f"{which} is not as it was written; start again, and it is decoded anew")
        self._verified[rows] = True


def map_file(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A file as an array; what is written to it would stay in this process."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8).reshape(shape)


class Streamed:
    """Pictures decoded each time they are taken, by several threads."""

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
    """A split's pictures, what is remembered of each (None where they were never decoded), and the bad ones."""

    images: ImageStore
    records: Callable[[], NDArray[Any]] | None
    problems: dict[int, str]

    def digests(self) -> NDArray[np.uint64]:
        """A hash of each picture's pixels, as the network sees them: uint64 [M]; of bad ones a number of their own."""
        if self.records is not None:
            found = np.array(self.records()["pixels"])
            bad = np.fromiter(self.problems, np.int64, len(self.problems))
            found[bad] = bad
            return found
        return self._of_pixels

    @cached_property
    def _of_pixels(self) -> NDArray[np.uint64]:
        parts = torch.arange(len(self.images)).split(cache.images_per_block(int(np.prod(self.images.shape))))
        return np.array([digest(one.numpy().tobytes()) for part in parts for one in self.images.take(part)], np.uint64)


class CacheSettings(Spec):
    """Where decoded pictures are kept, and how many threads decode."""

    cache: CacheKind = "auto"
    """`disk`: decoded once, found again by the next run; `memory`: decoded by each run; `none`: decoded at each use; \
`auto`: the first of these that the sizes below allow."""
    cache_dir: str | None = None
    """Where they are kept; by default cnnrun's folder under the user's cache folder (`cnnrun cache list`)."""
    disk_gib: float = Field(20.0, ge=0)
    """What the cache folder may take altogether."""
    memory_gib: float = Field(4.0, ge=0)
    """What decoded pictures may take in memory."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Threads that decode; by default one a processor. The result does not depend on it."""
    timeout: float = Field(120.0, gt=0)
    """Seconds for which reading pictures may bring nothing, before the run ends."""


def store_split(
    split: Split,
    shape: Shape,
    image: ImageSettings,
    settings: CacheSettings,
    listed: NDArray[np.int64] | None,
    progress: Progress,
) -> StoredSplit:
    """The split's pictures, decoded where they are not yet. Raises StorageError."""
    pictures = split.images
    if isinstance(pictures, np.ndarray) and pictures.shape[1:] == (*shape[1:], shape[0]):
        array = np.require(pictures.transpose(0, 3, 1, 2), requirements=["C", "W"])
        return StoredSplit(InMemory(array), None, {})
    decoder = Decoder(split, shape, image, listed)
    workers = processor_count() if settings.workers is None else settings.workers
    folder = Path(settings.cache_dir) if settings.cache_dir else cache.user_cache_folder()
    key = _key(split, shape, image, listed)
    kind = _kind(settings, folder, key, decoder)
    if folder is None or kind == "memory":
        return _in_memory(decoder, workers, settings.timeout, progress)
    # Without pixels it is another data set: both may be built at once.
    name = key if kind == "disk" else hashlib.sha256(f"records of {key}".encode()).hexdigest()[:32]
    full = (len(decoder), *shape)
    fits = int(np.prod(full)) <= settings.memory_gib * 2**30
    entry = CacheEntry(folder / name, len(decoder), shape, keep_pixels=kind == "disk", verify=fits)
    with start_threads(workers, settings.timeout) as run:
        entry.build(decoder, {"source": _where(split)}, run, progress)
    if kind == "none":
        return StoredSplit(Streamed(decoder, workers, settings.timeout), entry.open_records(), entry.problems())
    path = entry.path / "pixels.u8"
    kept = InMemory(map_file(path, full)) if fits else OnDisk(path, full, entry.pixel_hashes(), entry.unseal)
    return StoredSplit(kept, entry.open_records(), entry.problems())


def is_cached(
    split: Split, shape: Shape, image: ImageSettings, settings: CacheSettings, listed: NDArray[np.int64] | None
) -> bool:
    """Whether the cache has the split's pictures, all of them."""
    folder = Path(settings.cache_dir) if settings.cache_dir else cache.user_cache_folder()
    if folder is None or settings.cache in ("memory", "none"):
        return False
    return CacheEntry(folder / _key(split, shape, image, listed), len(split), shape, keep_pixels=True).is_complete()


def _in_memory(decoder: Decoder, workers: int, timeout: float, progress: Progress) -> StoredSplit:
    out = np.empty((len(decoder), *decoder.shape), np.uint8)
    records = np.empty(len(decoder), RECORD)
    problems: dict[int, str] = {}
    with start_threads(workers, timeout) as run, progress("decoding", len(decoder)) as advance:
        for numbers in np.array_split(
            np.arange(len(decoder)), -(-len(decoder) // cache.images_per_block(out[0].nbytes))
        ):
            made = decoder.decode_block(numbers, run)
            out[numbers], records[numbers] = made.pixels, made.records
            problems |= made.problems
            advance(len(numbers))
    return StoredSplit(InMemory(out), lambda: records, problems)


def _kind(settings: CacheSettings, folder: Path | None, key: str, decoder: Decoder) -> str:
    """`disk`, `memory` or `none`. What does not go where it was to go is said. Raises StorageError."""
    needed = len(decoder) * int(np.prod(decoder.shape)) / 2**30
    if folder is None and settings.cache in ("disk", "none"):
        raise StorageError("data.cache: there is no cache folder (HOME is not set); give data.cache_dir")
    if settings.cache in ("memory", "none"):
        return settings.cache
    if folder is not None and CacheEntry(folder / key, len(decoder), decoder.shape, keep_pixels=True).is_complete():
        return "disk"
    why = _no_room(settings, folder, key, needed)
    if why and settings.cache == "disk":
        raise StorageError(f"data.cache: disk: {why}")
    if not why:
        return "disk"
    if needed <= settings.memory_gib:
        say(f"decoded pictures are kept in memory and not for the next run: {why}")
        return "memory"
    if folder is None:
        raise StorageError(f"{needed:,.1f} GiB is more than data.memory_gib, and {why}; give data.cache_dir")
    say(f"pictures are decoded anew at each use: {needed:,.1f} GiB is more than data.memory_gib, and {why}")
    return "none"


def _no_room(settings: CacheSettings, folder: Path | None, key: str, needed: float) -> str | None:
    """Why so many GiB cannot be kept in the cache folder."""
    if folder is None:
        return "there is no cache folder (HOME is not set)"
    used = cache.bytes_used(folder, except_key=key) / 2**30
    if used + needed > settings.disk_gib:
        return (
            f"{folder} would take more than data.disk_gib: {used:,.1f} GiB now, {needed:,.1f} more (cnnrun cache list)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    return f"{folder} has {free:,.1f} GiB free, {needed:,.1f} are needed" if needed * 1.05 > free else None


def _where(split: Split) -> str:
    item = split.images[0]
    return escape(split.origin if isinstance(item, np.ndarray) else str(Path(str(item)).parent))


def _key(split: Split, shape: Shape, image: ImageSettings, listed: NDArray[np.int64] | None) -> str:
    """A digest of what is decoded and of all that decides what to."""
    how = image.model_dump(exclude={"size", "channels", "mean", "std"})
    return hashlib.sha256(
        content_digest(split, listed) + repr((_DECODER, cache.FORMAT, shape, how)).encode()
    ).hexdigest()[:32]
