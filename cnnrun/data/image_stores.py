"""Decoded images by index, in memory, in a file of the cache, or decoded at each use.

All stores return the same bytes for the same rows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import StorageError
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.pixels import EIGHT_BITS, PixelFormat
from cnnrun.data.block_hashes import has_changed
from cnnrun.data.decode import Decoder, ThreadedMap


class ImageStore(Protocol):
    """Decoded images by index."""

    shape: Shape
    pixel_format: PixelFormat
    is_in_memory: bool  # True if `take` needs neither the disk nor a decoder

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows, [n, C, H, W] on the host: pixel values 0..255, or features of frozen layers.

        Pixels of 8 bits are uint8, those of 16 bits float32.
        """
        ...

    def rows_being_read(self) -> list[int]:
        """The images that another thread is reading now, as far as known."""
        ...


class MemoryStore:
    """Images in an array in memory, or in a mapped file that fits into memory."""

    is_in_memory = True

    def __init__(self, array_NCHW: NDArray[Any], pixel_format: PixelFormat = EIGHT_BITS) -> None:
        self._array, self.shape = array_NCHW, array_NCHW.shape[1:]
        self.pixel_format = pixel_format

    def __len__(self) -> int:
        return len(self._array)

    def take(self, rows: Tensor) -> Tensor:
        # A second thread that uses torch's threads slows the network's steps by a third (benchmarks/README.md).
        if threading.current_thread() is threading.main_thread():
            return self.pixel_format.to_network(torch.from_numpy(self._array).index_select(0, rows))
        return self.pixel_format.to_network(torch.from_numpy(self._array.take(rows.numpy(), axis=0)))

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
        self,
        path: Path,
        shape: tuple[int, ...],
        hashes: NDArray[np.uint64],
        unseal: Callable[[], None],
        pixel_format: PixelFormat = EIGHT_BITS,
    ) -> None:
        self._path, self._count, self.shape, self.pixel_format = path, shape[0], shape[1:], pixel_format
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
        pixels = np.empty((len(rows), *self.shape), self.pixel_format.dtype)
        image_bytes = int(np.prod(self.shape)) * pixels.itemsize
        for position, row in enumerate(rows.tolist()):
            self._reading = [row]
            if os.preadv(self._file, (pixels[position].data,), row * image_bytes) != image_bytes:
                raise StorageError(f"{self._path}: image {row:,} is cut off; remove the file with `cnnrun cache clear`")
        self._verify(pixels, rows.numpy())
        return self.pixel_format.to_network(torch.from_numpy(pixels))

    def _verify(self, pixels_NCHW: NDArray[Any], rows: NDArray[np.int64]) -> None:
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


def map_file(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a file as an array. Changes to the array would not reach the file."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype).reshape(shape)


class DecodingStore:
    """Images that several threads decode each time they are taken."""

    is_in_memory = False

    def __init__(self, decoder: Decoder, workers: int, timeout: float) -> None:
        self._decoder, self.shape, self.pixel_format = decoder, decoder.shape, decoder.pixel_format
        self._threads = ThreadedMap(workers, timeout)

    def __len__(self) -> int:
        return len(self._decoder)

    def take(self, rows: Tensor) -> Tensor:
        return self.pixel_format.to_network(torch.from_numpy(self._decoder.decode_batch(rows.numpy(), self._threads)))

    def rows_being_read(self) -> list[int]:
        return self._decoder.rows_being_read()
