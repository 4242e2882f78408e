"""Decoder for a split's images by index: one by one, or in blocks over several threads, with their records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.error_lines import join_names, truncate_lines
from cnnrun.base.errors import DataError, NoAnswerError, UnreadableFileError
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.drawn_masks import DrawnMasks
from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.pixels import EIGHT_BITS
from cnnrun.contracts.source import Masks, Split
from cnnrun.data.image_files import decode_image, image_errors, image_from_pixels, read_image_bytes
from cnnrun.data.image_geometry import DecodedImage, fit_image
from cnnrun.data.image_records import fill_pixel_sums, fill_record, record_dtype
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.mask_files import decode_drawn_mask, decode_mask, fit_mask

DEFAULT_TIMEOUT = 120.0  # seconds
_IMAGES_PER_TASK = 16  # images that a thread decodes before it takes the next task
_TASKS_PER_WAIT = 4096  # `wait` locks all of its tasks each time that one is done

ParallelMap = Callable[[Callable[[Any], Any], Sequence[Any]], Any]


class ReadTimeoutError(NoAnswerError):
    """Error for images whose reading does not end."""

    def __init__(self, seconds: float, names: Sequence[str]) -> None:
        images = join_names(names, 8) or "the images"
        super().__init__(f"no data from {images} for {seconds:g} s; check the disk or raise data.timeout")
        self.seconds = seconds


class ThreadedMap:
    """A `map` that calls the function in several threads, or in the calling thread if `workers` is 0.

    Threads help because Pillow releases the interpreter's lock while it decodes.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self._timeout, self._is_hung = timeout, False

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """The function's value for each item. Raises ReadTimeoutError if no item is done for `timeout` seconds."""
        if self._is_hung:
            raise ReadTimeoutError(self._timeout, [])
        if self._pool is None:
            return list(map(function, items))
        slices = (items[first : first + _TASKS_PER_WAIT] for first in range(0, len(items), _TASKS_PER_WAIT))
        return [value for part in slices for value in self._map_slice(self._pool, function, part)]

    def _map_slice(self, pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        tasks = [pool.submit(function, item) for item in items]
        pending = set(tasks)
        while pending:
            done, pending = wait(pending, self._timeout, FIRST_COMPLETED)
            if not done:
                self._is_hung = True
                raise ReadTimeoutError(self._timeout, [])
        return [task.result() for task in tasks]

    def close(self, *, wait_for_tasks: bool = True) -> None:
        """End the threads. Does not wait for threads that hang."""
        if self._pool:
            self._pool.shutdown(wait=wait_for_tasks and not self._is_hung, cancel_futures=True)


@contextmanager
def start_threads(workers: int, timeout: float = DEFAULT_TIMEOUT) -> Iterator[ParallelMap]:
    """Context with a `ThreadedMap` of `workers` threads, which end with it."""
    threads = ThreadedMap(workers, timeout)
    try:
        yield threads
    except BaseException:  # such as a signal while a read hangs
        threads.close(wait_for_tasks=False)
        raise
    threads.close()


@dataclass(frozen=True)
class DecodedBlock:
    """Decoded images [n, C, H, W], their records, and the problems of bad images, whose pixels are black."""

    pixels: NDArray[Any]
    records: NDArray[Any]
    problems: dict[int, str]


class Decoder:
    """Decoder of a split's images to one shape (C, H, W).

    `listing` [N, 2] has each file's (size, time in ns) when it was listed: a file that changed since is refused.
    """

    def __init__(
        self, split: Split | Masks, shape: Shape, image_settings: ImageSettings, listing: NDArray[np.int64] | None
    ) -> None:
        self.split, self.shape, self.image_settings, self._listing = split, shape, image_settings, listing
        self.pixel_format = EIGHT_BITS if isinstance(split, Masks) else image_settings.pixel_format
        self._size: HeightWidth = (shape[1], shape[2])
        self._row_by_thread: dict[int, int] = {}  # the image that each thread decodes now

    def __len__(self) -> int:
        return len(self.split)

    @property
    def image_bytes(self) -> int:
        """Bytes of a decoded image."""
        return int(np.prod(self.shape)) * self.pixel_format.dtype.itemsize

    def decode_one(self, index: int) -> NDArray[Any]:
        """Decode image `index` to [C, H, W]. Raises DataError with its name if it cannot be used."""
        return self._decode_in_thread(index, self.split.sample_name(index))[0]

    def rows_being_read(self) -> list[int]:
        """The indices of the images that threads are reading now, sorted."""
        return sorted(self._row_by_thread.values())

    def _decode_in_thread(self, index: int, name: str) -> tuple[NDArray[Any], bytes, DecodedImage]:
        thread = threading.get_ident()
        self._row_by_thread[thread] = index
        try:
            return self._decode(index, name)
        finally:
            del self._row_by_thread[thread]

    def _decode(self, index: int, name: str) -> tuple[NDArray[Any], bytes, DecodedImage]:
        """The fitted pixels [C, H, W], the file's bytes (none for an array), and the decoded image."""
        images = self.split.images
        with image_errors(name):
            if isinstance(images, np.ndarray):
                data, decoded = b"", image_from_pixels(images[index], self.shape[0], self.image_settings)
            elif isinstance(images, DrawnMasks):
                data, decoded = b"", decode_drawn_mask(images[index])
            else:
                data = read_image_bytes(name if isinstance(images, Files) else images[index], self._expected(index))
                decoded = self._decode_bytes(data)
            fit = fit_mask if isinstance(self.split, Masks) else fit_image
            pixels_HWC = fit(decoded, self._size, self.image_settings)
            return pixels_HWC.transpose(2, 0, 1), data, decoded

    def _decode_bytes(self, data: bytes) -> DecodedImage:
        if isinstance(self.split, Masks):
            return decode_mask(data, self.split, self.image_settings)
        return decode_image(data, self.shape[0], self.image_settings, self._size)

    def _expected(self, index: int) -> tuple[int, int] | None:
        """Size and time of an image's file when it was listed."""
        return None if self._listing is None else (int(self._listing[index, 0]), int(self._listing[index, 1]))

    def decode_block(self, indices: NDArray[np.int64], parallel_map: ParallelMap) -> DecodedBlock:
        """Decode images with their records. Bad images become black, and their problems are noted.

        Raises UnreadableFileError for files that cannot be read now, such as on a disk that fails.
        """
        unreadable: list[str] = []
        pixels = np.zeros((len(indices), *self.shape), self.pixel_format.dtype)
        block = DecodedBlock(pixels, np.zeros(len(indices), record_dtype(self.shape[0])), {})

        def decode(first: int) -> None:
            for position in range(first, min(first + _IMAGES_PER_TASK, len(indices))):
                index = int(indices[position])
                name = self.split.sample_name(index)
                try:
                    image, data, decoded = self._decode_in_thread(index, name)
                except UnreadableFileError as error:
                    unreadable.append(str(error))
                    continue
                except DataError as error:
                    block.problems[index] = str(error)
                    continue
                block.pixels[position] = image
                fill_record(block.records[position], name, data, decoded, image)

        self._run_tasks(parallel_map, decode, len(indices))
        if unreadable:
            raise UnreadableFileError(*truncate_lines(sorted(unreadable), "files"))
        fill_pixel_sums(block.records, block.pixels)
        return block

    def decode_batch(self, indices: NDArray[np.int64], parallel_map: ParallelMap) -> NDArray[Any]:
        """Decode images to [n, C, H, W]. Raises DataError with the names and problems of the bad ones."""
        pixels = np.empty((len(indices), *self.shape), self.pixel_format.dtype)
        problems: list[str] = []

        def decode(first: int) -> None:
            for position in range(first, min(first + _IMAGES_PER_TASK, len(indices))):
                try:
                    pixels[position] = self.decode_one(int(indices[position]))
                except DataError as error:
                    problems.append(str(error))

        self._run_tasks(parallel_map, decode, len(indices))
        if problems:
            raise DataError(*sorted(problems))
        return pixels

    def _run_tasks(self, parallel_map: ParallelMap, decode: Callable[[int], None], count: int) -> None:
        try:
            parallel_map(decode, range(0, count, _IMAGES_PER_TASK))
        except ReadTimeoutError as error:
            raise ReadTimeoutError(
                error.seconds, [self.split.sample_name(index) for index in self.rows_being_read()]
            ) from None
