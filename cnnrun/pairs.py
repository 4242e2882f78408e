"""Files of pairs in LFW's format: which pictures are compared, in which fold.

`name  1  4` are two pictures of one person, `name  1  other  2` of two; a number n is the picture `name_000n` or `n` of
the person's folder, anything else a file there by its name. A first line `10  300` says that there are ten folds, each
of 300 pairs of one person and then 300 of two; without one, folds are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from torch import Tensor

from cnnrun.errors import DataError, printable
from cnnrun.labelling import refuse

_MOST_BYTES = 1 << 28
_DRAWN = 10  # folds where the file has none

Places = Mapping[str, Mapping[str, int]]  # person -> file name -> number of the picture


@dataclass(frozen=True)
class Listed:
    """A pair: person and picture of both, as written, and where."""

    people: tuple[str, str]
    pictures: tuple[str, str]
    line: int


def people_of(path: Path) -> tuple[list[Listed], tuple[int, int] | None]:
    """The pairs of a file, and its folds and pairs of a kind in each. Raises DataError."""
    lines = _text(path).splitlines()
    words = [line.split("\t") if "\t" in line else line.split() for line in lines]
    first = words[0] if words else []
    header = all(word.strip().isdigit() for word in first) and 1 <= len(first) <= 2
    problems, found = [], []
    for number, row in enumerate(words[header:], 1 + header):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) not in (3, 4) or not all(cells):
            problems.append(
                f"{path}:{number}: a pair is written `name 1 2` or `name 1 other 2`; has {len(cells)} words"
            )
        elif len(cells) == 3:
            found.append(Listed((cells[0], cells[0]), (cells[1], cells[2]), number))
        else:
            found.append(Listed((cells[0], cells[2]), (cells[1], cells[3]), number))
    refuse(problems)
    if not found:
        raise DataError(f"{path}: has no pairs")
    return found, (int(first[0]), int(first[1])) if header and len(first) == 2 else None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: too large to be a list of pairs")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(str(path))}: cannot be read ({error.strerror})") from None
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DataError(f"{printable(str(path))}: not text (pickled pairs are not read: they may run code)") from None


def targets_of(path: Path, listed: list[Listed], header: tuple[int, int] | None, places: Places, count: int) -> Tensor:
    """For each of `count` pictures the pairs in which it comes first: other picture and fold, int64 [N, P, 2], -1 where
    there is none. Raises DataError with every mistake.
    """
    problems, pairs, before = [], list[tuple[int, int]](), dict[tuple[int, int], int]()
    for each in listed:
        sides = [_place(places, *side) for side in zip(each.people, each.pictures, strict=True)]
        wrong = [side for side in sides if isinstance(side, str)]
        one, other = (side if isinstance(side, int) else -1 for side in sides)
        if wrong:
            problems.append(f"{path}:{each.line}: {wrong[0]}")
        elif one == other:
            problems.append(f"{path}:{each.line}: the picture is compared with itself")
        elif (before_it := before.get((min(one, other), max(one, other)))) is not None:
            problems.append(f"{path}:{each.line}: the pair of line {before_it} again")
        before[min(one, other), max(one, other)] = each.line
        pairs.append((one, other))
    refuse(problems)
    return _padded(pairs, _folds(path, [each.people[0] == each.people[1] for each in listed], header), count)


def _place(places: Places, person: str, picture: str) -> int | str:
    """The number of a picture, or what is wrong with it."""
    if person not in places:
        return f"there is no folder {printable(person)!r}"
    files = places[person]
    if picture in files:
        return files[picture]
    stems = {PurePath(name).stem: number for name, number in files.items()}
    wanted = [f"{person}_{int(picture):04d}", picture] if picture.isdigit() else [picture]
    found = [stems[stem] for stem in wanted if stem in stems]
    return found[0] if found else f"{printable(person)} has no picture {printable(picture)!r}"


def _folds(path: Path, same: list[bool], header: tuple[int, int] | None) -> list[int]:
    kinds = (sum(same), len(same) - sum(same))
    if min(kinds) < 2:
        counts = f"{kinds[0]:,} pairs of one person and {kinds[1]:,} of two"
        raise DataError(f"{path}: {counts}; two of each kind are needed, or there is no rate of errors")
    if header is None:
        many, counted, made = min(_DRAWN, *kinds), [0, 0], []
        for each in same:  # in turns: as many of each kind in each
            made.append(counted[each] % many)
            counted[each] += 1
        return made
    folds, of_kind = header
    if folds < 2 or [*([True] * of_kind), *([False] * of_kind)] * folds != same:
        wanted = f"{folds} folds of {of_kind} pairs of one person and then {of_kind} of two"
        raise DataError(
            f"{path}: its first line says {wanted}; it has {sum(same)} and {len(same) - sum(same)}, or not so"
        )
    return [number // (2 * of_kind) for number in range(len(same))]


def _padded(pairs: list[tuple[int, int]], folds: list[int], count: int) -> Tensor:
    rows: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for (one, other), fold in zip(pairs, folds, strict=True):
        rows[one].append((other, fold))
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[(-1, -1)] * (longest - len(row))] for row in rows])
