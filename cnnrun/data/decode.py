"""Pictures of a split by number: decoded, fitted and remembered, one by one or in blocks over several threads."""

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

_TASK = 16  # pictures that a thread takes at a time

ParallelMap = Callable[[Callable[[Any], Any], Sequence[Any]], Any]


class ReadTimeoutError(NoAnswerError):
    """Pictures whose reading does not end."""

    def __init__(self, seconds: float, names: Sequence[str]) -> None:
        shown = join_names(names, 8) or "pictures"
        super().__init__(f"reading {shown} does not end: nothing came for {seconds:g} s (data.timeout)")
        self.seconds = seconds


class ThreadedMap:
    """A `map` over so many threads; with 0 in the calling one. Pillow lets go of the interpreter while it decodes."""

    def __init__(self, workers: int, timeout: float) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self._timeout, self._hung = timeout, False

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Each item's value. Raises Stuck when for `timeout` seconds none is done."""
        if self._hung:
            raise ReadTimeoutError(self._timeout, [])
        if self._pool is None:
            return list(map(function, items))
        tasks = [self._pool.submit(function, item) for item in items]
        left = set(tasks)
        while left:
            done, left = wait(left, self._timeout, FIRST_COMPLETED)
            if not done:
                self._hung = True
                raise ReadTimeoutError(self._timeout, [])
        return [task.result() for task in tasks]

    def close(self, *, patiently: bool = True) -> None:
        """End the threads, or leave those behind that hang."""
        if self._pool:
            self._pool.shutdown(wait=patiently and not self._hung, cancel_futures=True)


@contextmanager
def start_threads(workers: int, timeout: float = 120.0) -> Iterator[ParallelMap]:
    """Threads for as long as the context lasts."""
    pool = ThreadedMap(workers, timeout)
    try:
        yield pool
    except BaseException:  # such as a signal while a read hangs
        pool.close(patiently=False)
        raise
    pool.close()


def processor_count() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DecodedBlock:
    """Some pictures decoded: uint8 [n, C, H, W], their records, and what is wrong with those that are black instead."""

    pixels: NDArray[np.uint8]
    records: NDArray[Any]
    problems: dict[int, str]


class Decoder:
    """Decodes pictures of a split to one shape (C, H, W).

    `listed` is [N, 2] of the files' (size, time in ns) when they were listed: a file that changed since is refused.
    """

    def __init__(self, split: Split, shape: Shape, image: ImageSettings, listed: NDArray[np.int64] | None) -> None:
        self.split, self.shape, self.image, self._listed = split, shape, image, listed
        self._size: HeightWidth = (shape[1], shape[2])
        self._busy: dict[int, int] = {}  # which picture each thread has at hand

    def __len__(self) -> int:
        return len(self.split)

    def decode_one(self, number: int) -> NDArray[np.uint8]:
        """Picture `number` as uint8 [C, H, W]. Raises DataError that names it."""
        return self._decoded(number, self.split.sample_name(number))[0]

    def rows_being_read(self) -> list[int]:
        """The pictures that are being read now."""
        return sorted(self._busy.values())

    def _decoded(self, number: int, name: str) -> tuple[NDArray[np.uint8], bytes, DecodedImage]:
        thread = threading.get_ident()
        self._busy[thread] = number
        try:
            return self._read(number, name)
        finally:
            del self._busy[thread]

    def _read(self, number: int, name: str) -> tuple[NDArray[np.uint8], bytes, DecodedImage]:
        pictures = self.split.images
        with image_errors(name):
            if isinstance(pictures, np.ndarray):
                data, seen = b"", image_from_pixels(pictures[number], self.shape[0])
            else:
                listed = None if self._listed is None else (int(self._listed[number, 0]), int(self._listed[number, 1]))
                data = read_image_bytes(name if isinstance(pictures, Files) else pictures[number], listed)
                seen = decode_image(data, self.shape[0], self.image)
            return fit_image(seen.pillow_image, self._size, self.image).transpose(2, 0, 1), data, seen

    def decode_block(self, numbers: NDArray[np.int64], run: ParallelMap) -> DecodedBlock:
        """Those pictures with their records; a bad one is black, and its trouble is noted.

        Raises Unreadable for files that cannot be read now.
        """
        unread: list[str] = []
        made = DecodedBlock(np.zeros((len(numbers), *self.shape), np.uint8), np.zeros(len(numbers), RECORD), {})

        def decode(first: int) -> None:
            for place in range(first, min(first + _TASK, len(numbers))):
                number = int(numbers[place])
                name = self.split.sample_name(number)
                try:
                    pixels, data, seen = self._decoded(number, name)
                except UnreadableFileError as error:
                    unread.append(str(error))
                    continue
                except DataError as error:
                    made.problems[number] = str(error)
                    continue
                made.pixels[place] = pixels
                fill_record(made.records[place], name, data, seen, pixels)

        self._run(run, decode, len(numbers))
        if unread:
            raise UnreadableFileError(*truncate_lines(sorted(unread), "files"))
        fill_pixel_sums(made.records, made.pixels)
        return made

    def decode_batch(self, numbers: NDArray[np.int64], run: ParallelMap) -> NDArray[np.uint8]:
        """Those pictures, uint8 [n, C, H, W]. Raises DataError that names the bad ones."""
        out = np.empty((len(numbers), *self.shape), np.uint8)
        bad: list[str] = []

        def decode(first: int) -> None:
            for place in range(first, min(first + _TASK, len(numbers))):
                try:
                    out[place] = self.decode_one(int(numbers[place]))
                except DataError as error:
                    bad.append(str(error))

        self._run(run, decode, len(numbers))
        if bad:
            raise DataError(*sorted(bad))
        return out

    def _run(self, run: ParallelMap, decode: Callable[[int], None], count: int) -> None:
        try:
            run(decode, range(0, count, _TASK))
        except ReadTimeoutError as error:
            raise ReadTimeoutError(
                error.seconds, [self.split.sample_name(number) for number in self.rows_being_read()]
            ) from None
