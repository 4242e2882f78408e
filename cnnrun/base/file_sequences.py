"""Many picture files in little memory, and members of tar shards, which are read where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

_CLUTTER = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


def is_clutter(name: str) -> bool:
    """Return whether an entry of a folder is no one's picture, annotation or class: hidden, or made by a system."""
    return name.startswith(".") or name.casefold() in _CLUTTER


class Files(Sequence[Path]):
    """Paths as one run of bytes: 8 bytes each beyond the names, where a list of `Path` takes some 300."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        names = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def digest(self) -> bytes:
        """Of all the names."""
        return hashlib.sha256(self._bytes + self._ends.tobytes()).digest()

    def select(self, numbers: Sequence[int]) -> Files:
        """Those alone."""
        return Files(os.fsdecode(self.path_bytes(number)) for number in numbers)

    def path_bytes(self, number: int) -> bytes:
        """The path as the file system has it."""
        return self._bytes[self._ends[number] : self._ends[number + 1]]

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> list[Path]: ...
    def __getitem__(self, number: int | slice) -> Path | list[Path]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        return Path(os.fsdecode(self.path_bytes(range(len(self))[number])))


@dataclass(frozen=True)
class Member:
    """A picture inside an uncompressed tar: `size` bytes from `offset`."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class Members(Sequence[Member]):
    """Members of several shards in little memory: of each the number of its shard, its name, offset and size."""

    def __init__(self, shards: Sequence[Path], places: Sequence[tuple[int, str, int, int]]) -> None:
        self.shards = tuple(shards)
        self._names = Files(name for _, name, _, _ in places)
        numbers = [(shard, offset, size) for shard, _, offset, size in places]
        self._places: NDArray[np.int64] = np.array(numbers, np.int64).reshape(-1, 3)

    def digest(self) -> bytes:
        """Of all the names and places."""
        shards = repr([str(shard) for shard in self.shards]).encode()
        return hashlib.sha256(self._names.digest() + self._places.tobytes() + shards).digest()

    def __len__(self) -> int:
        return len(self._places)

    def select(self, numbers: Sequence[int]) -> Members:
        """Those alone."""
        rows = ((number, self._places[number].tolist()) for number in numbers)
        places = [(shard, os.fsdecode(self._names.path_bytes(number)), at, size) for number, (shard, at, size) in rows]
        return Members(self.shards, places)

    @overload
    def __getitem__(self, number: int) -> Member: ...
    @overload
    def __getitem__(self, number: slice) -> list[Member]: ...
    def __getitem__(self, number: int | slice) -> Member | list[Member]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        number = range(len(self))[number]
        shard, offset, size = self._places[number].tolist()
        return Member(self.shards[shard], os.fsdecode(self._names.path_bytes(number)), offset, size)
