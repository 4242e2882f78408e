"""Decoder for a split's images by number: one by one, or in blocks over several threads, with their records."""

from __future__ import annotations

import os
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
from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.source import Split
from cnnrun.data.image_files import (
    DecodedImage,
    ImageSettings,
    decode_image,
    fit_image,
    image_errors,
    image_from_pixels,
    read_image_bytes,
)
from cnnrun.data.image_records import RECORD, fill_pixel_sums, fill_record

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

    def _map_slice(
        self, pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> list[Any]:
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
def start_threads(workers: int, timeout: float = 120.0) -> Iterator[ParallelMap]:
    """Context with a `ThreadedMap` of `workers` threads, which end with it."""
    pool = ThreadedMap(workers, timeout)
    try:
        yield pool
    except BaseException:  # such as a signal while a read hangs
        pool.close(wait_for_tasks=False)
        raise
    pool.close()


def processor_count() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DecodedBlock:
    """Decoded images: uint8 [n, C, H, W], their records, and the problems of bad images, whose pixels are black."""

    pixels: NDArray[np.uint8]
    records: NDArray[Any]
    problems: dict[int, str]


class Decoder:
    """Decoder of a split's images to one shape (C, H, W).

    `listing` [N, 2] has each file's (size, time in ns) when it was listed: a file that changed since is refused.
    """

    def __init__(
        self, split: Split, shape: Shape, image_settings: ImageSettings, listing: NDArray[np.int64] | None
    ) -> None:
        self.split, self.shape, self.image_settings, self._listing = split, shape, image_settings, listing
        self._size: HeightWidth = (shape[1], shape[2])
        self._row_by_thread: dict[int, int] = {}  # the image that each thread decodes now

    def __len__(self) -> int:
        return len(self.split)

    def decode_one(self, number: int) -> NDArray[np.uint8]:
        """Decode image `number` to uint8 [C, H, W]. Raises DataError with its name if it cannot be used."""
        return self._decode_in_thread(number, self.split.sample_name(number))[0]

    def rows_being_read(self) -> list[int]:
        """The numbers of the images that threads are reading now."""
        return sorted(self._row_by_thread.values())

    def _decode_in_thread(self, number: int, name: str) -> tuple[NDArray[np.uint8], bytes, DecodedImage]:
        thread = threading.get_ident()
        self._row_by_thread[thread] = number
        try:
            return self._decode(number, name)
        finally:
            del self._row_by_thread[thread]

    def _decode(self, number: int, name: str) -> tuple[NDArray[np.uint8], bytes, DecodedImage]:
        """The fitted pixels [C, H, W], the file's bytes (none for an array), and the decoded image."""
        images = self.split.images
        with image_errors(name):
            if isinstance(images, np.ndarray):
                data, decoded = b"", image_from_pixels(images[number], self.shape[0])
            else:
                data = read_image_bytes(name if isinstance(images, Files) else images[number], self._expected(number))
                decoded = decode_image(data, self.shape[0], self.image_settings)
            pixels_HWC = fit_image(decoded.pillow_image, self._size, self.image_settings)
            return pixels_HWC.transpose(2, 0, 1), data, decoded

    def _expected(self, number: int) -> tuple[int, int] | None:
        """Size and time of an image's file when it was listed."""
        return None if self._listing is None else (int(self._listing[number, 0]), int(self._listing[number, 1]))

    def decode_block(self, numbers: NDArray[np.int64], run: ParallelMap) -> DecodedBlock:
        """Decode images with their records. Bad images become black, and their problems are noted.

        Raises UnreadableFileError for files that cannot be read now, such as on a disk that fails.
        """
        unreadable: list[str] = []
        block = DecodedBlock(np.zeros((len(numbers), *self.shape), np.uint8), np.zeros(len(numbers), RECORD), {})

        def decode(first: int) -> None:
            for position in range(first, min(first + _IMAGES_PER_TASK, len(numbers))):
                number = int(numbers[position])
                name = self.split.sample_name(number)
                try:
                    pixels, data, decoded = self._decode_in_thread(number, name)
                except UnreadableFileError as error:
                    unreadable.append(str(error))
                    continue
                except DataError as error:
                    block.problems[number] = str(error)
                    continue
                block.pixels[position] = pixels
                fill_record(block.records[position], name, data, decoded, pixels)

        self._run_tasks(run, decode, len(numbers))
        if unreadable:
            raise UnreadableFileError(*truncate_lines(sorted(unreadable), "files"))
        fill_pixel_sums(block.records, block.pixels)
        return block

    def decode_batch(self, numbers: NDArray[np.int64], run: ParallelMap) -> NDArray[np.uint8]:
        """Decode images to uint8 [n, C, H, W]. Raises DataError with the names and problems of the bad ones."""
        pixels = np.empty((len(numbers), *self.shape), np.uint8)
        problems: list[str] = []

        def decode(first: int) -> None:
            for position in range(first, min(first + _IMAGES_PER_TASK, len(numbers))):
                try:
                    pixels[position] = self.decode_one(int(numbers[position]))
                except DataError as error:
                    problems.append(str(error))

        self._run_tasks(run, decode, len(numbers))
        if problems:
            raise DataError(*sorted(problems))
        return pixels

    def _run_tasks(self, run: ParallelMap, decode: Callable[[int], None], count: int) -> None:
        try:
            run(decode, range(0, count, _IMAGES_PER_TASK))
        except ReadTimeoutError as error:
            raise ReadTimeoutError(
                error.seconds, [self.split.sample_name(number) for number in self.rows_being_read()]
            ) from None
