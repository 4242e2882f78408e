"""Pictures of a split by number: decoded, fitted and remembered, one by one or in blocks over several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts import Pair, Shape, Split
from cnnrun.errors import DataError
from cnnrun.pictures import Image, fitted, named, opened, opened_pixels, read
from cnnrun.records import RECORD, record

_TASK = 16  # pictures that a thread takes at a time

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Any]


@contextmanager
def threads(workers: int) -> Iterator[Map]:
    """A `map` over so many threads; with 0 in the calling one. Pillow lets go of the interpreter while it decodes."""
    if workers == 0:
        yield lambda function, items: list(map(function, items))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        yield lambda function, items: list(pool.map(function, items))


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Block:
    """Some pictures decoded: uint8 [n, C, H, W], their records, and what is wrong with those that are black instead."""

    pixels: NDArray[np.uint8]
    records: NDArray[Any]
    problems: dict[int, str]


class Decoder:
    """Decodes pictures of a split to one shape (C, H, W).

    `listed` is [N, 2] of the files' (size, time in ns) when they were listed: a file that changed since is refused.
    """

    def __init__(self, split: Split, shape: Shape, image: Image, listed: NDArray[np.int64] | None) -> None:
        self.split, self.shape, self.image, self._listed = split, shape, image, listed
        self._size: Pair = (shape[1], shape[2])

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """Picture `number` as uint8 [C, H, W]. Raises DataError that names it."""
        return self._decoded(number, remember=False)[0]

    def _decoded(self, number: int, remember: bool) -> tuple[NDArray[np.uint8], Any]:
        item = self.split.pictures[number]
        name = self.split.name(number)
        with named(name):
            if isinstance(item, np.ndarray):
                data, seen = b"", opened_pixels(item, self.shape[0])
            else:
                listed = None if self._listed is None else (int(self._listed[number, 0]), int(self._listed[number, 1]))
                data = read(item, listed)
                seen = opened(data, self.shape[0], self.image)
            pixels = fitted(seen.picture, self._size, self.image)
            return pixels.transpose(2, 0, 1), record(name, data, seen, pixels) if remember else None

    def block(self, numbers: NDArray[np.int64], run: Map) -> Block:
        """Those pictures with their records; a bad one is black, and its trouble is noted."""
        made = Block(np.zeros((len(numbers), *self.shape), np.uint8), np.zeros(len(numbers), RECORD), {})

        def decode(first: int) -> None:
            for place in range(first, min(first + _TASK, len(numbers))):
                number = int(numbers[place])
                try:
                    made.pixels[place], made.records[place] = self._decoded(number, remember=True)
                except DataError as error:
                    made.problems[number] = str(error)

        run(decode, range(0, len(numbers), _TASK))
        return made

    def batch(self, numbers: NDArray[np.int64], run: Map) -> NDArray[np.uint8]:
        """Those pictures, uint8 [n, C, H, W]. Raises DataError that names the bad ones."""
        out = np.empty((len(numbers), *self.shape), np.uint8)
        bad: list[str] = []

        def decode(first: int) -> None:
            for place in range(first, min(first + _TASK, len(numbers))):
                try:
                    out[place] = self.pixels(int(numbers[place]))
                except DataError as error:
                    bad.append(str(error))

        run(decode, range(0, len(numbers), _TASK))
        if bad:
            raise DataError(*sorted(bad))
        return out
