"""Compact sequences of image files and of members of tar shards, which are read without unpacking."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

_SYSTEM_NAMES = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


def is_hidden_or_system_name(name: str) -> bool:
    """Return whether a folder's entry is hidden or written by an operating system, and so is not part of the data."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


class Files(Sequence[Path]):
    """Paths joined into one bytes object: 8 bytes per path plus its name, where a list of `Path` takes about 300."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        names = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def digest(self) -> bytes:
        """SHA-256 of all paths in order."""
        return hashlib.sha256(self._bytes + self._ends.tobytes()).digest()

    def select(self, indices: Sequence[int]) -> Files:
        """The paths at these indices."""
        return Files(os.fsdecode(self.path_bytes(index)) for index in indices)

    def path_bytes(self, index: int) -> bytes:
        """Path in the file system's own bytes."""
        return self._bytes[self._ends[index] : self._ends[index + 1]]

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return Path(os.fsdecode(self.path_bytes(range(len(self))[index])))


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar shard: `size` bytes from `offset`."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class Members(Sequence[Member]):
    """Compact sequence of members of several shards, from rows of (index of the shard, name, offset, size)."""

    def __init__(self, shards: Sequence[Path], rows: Sequence[tuple[int, str, int, int]]) -> None:
        self.shards = tuple(shards)
        self._names = Files(name for _, name, _, _ in rows)
        locations = [(shard, offset, size) for shard, _, offset, size in rows]
        self._locations: NDArray[np.int64] = np.array(locations, np.int64).reshape(-1, 3)

    def digest(self) -> bytes:
        """SHA-256 of all shards, names and locations in order."""
        shards = repr([str(shard) for shard in self.shards]).encode()
        return hashlib.sha256(self._names.digest() + self._locations.tobytes() + shards).digest()

    def __len__(self) -> int:
        return len(self._locations)

    def select(self, indices: Sequence[int]) -> Members:
        """The members at these indices."""
        locations = ((index, self._locations[index].tolist()) for index in indices)
        rows = [(shard, self._name(index), offset, size) for index, (shard, offset, size) in locations]
        return Members(self.shards, rows)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> list[Member]: ...
    def __getitem__(self, index: int | slice) -> Member | list[Member]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        shard, offset, size = self._locations[index].tolist()
        return Member(self.shards[shard], self._name(index), offset, size)

    def _name(self, index: int) -> str:
        return os.fsdecode(self._names.path_bytes(index))
