"""Files of pairs in LFW's format: which pictures are compared, in which fold.

`name  1  4` are two pictures of one person, `name  1  other  2` of two; a number n is the picture `name_000n` or `n` of
the person's folder, anything else a file there by its name. A first line `10  300` says that there are ten folds, each
of 300 pairs of one person and then 300 of two, `500` that there are 500 of each; without folds there, they are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from torch import Tensor

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.error_lines import refuse_problems
from cnnrun.base.errors import DataError, escape

_MOST_BYTES = 1 << 28
_NUMBER = re.compile("[0-9]{1,9}")
_DRAWN = 10  # folds where the file has none

ImagesByPerson = Mapping[str, Sequence[tuple[str, int]]]  # person -> file name and number of each picture


@dataclass(frozen=True)
class PairLine:
    """A pair: person and picture of both, as written, and where."""

    people: tuple[str, str]
    images: tuple[str, str]
    line: int


def read_pairs(path: Path) -> tuple[list[PairLine], tuple[int, int] | None]:
    """The pairs of a file, and its folds and pairs of a kind in each, where it says them. Raises DataError."""
    lines = _text(path).splitlines()
    words = [line.split("\t") if "\t" in line else line.split() for line in lines]
    first = words[0] if words else []
    header = len(first) in (1, 2) and all(_NUMBER.fullmatch(word.strip()) for word in first)
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
            found.append(PairLine((cells[0], cells[0]), (cells[1], cells[2]), number))
        else:
            found.append(PairLine((cells[0], cells[2]), (cells[1], cells[3]), number))
    refuse_problems(problems)
    if not found:
        raise DataError(f"{path}: has no pairs")
    counts = [int(word) for word in first] if header else []
    return found, None if not counts else (counts[0], counts[1]) if len(counts) == 2 else (1, counts[0])


def _text(path: Path) -> str:
    data = read_bytes(path, DataError, _MOST_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{escape(str(path))}: not text (pickled pairs are not read: they may run code)") from None


def pair_targets(
    path: Path, listed: list[PairLine], header: tuple[int, int] | None, places: ImagesByPerson, count: int
) -> Tensor:
    """For each of `count` pictures the pairs in which it comes first: other picture and fold, int64 [N, P, 2], -1 where
    there is none. Raises DataError with every mistake.
    """
    problems, pairs, before = [], list[tuple[int, int]](), dict[tuple[int, int], int]()
    for each in listed:
        sides = [_place(places, *side) for side in zip(each.people, each.images, strict=True)]
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
    refuse_problems(problems)
    return _padded(pairs, _folds(path, [each.people[0] == each.people[1] for each in listed], header), count)


def _place(places: ImagesByPerson, person: str, picture: str) -> int | str:
    """The number of a picture, or what is wrong with it."""
    if person not in places:
        return f"nobody is called {escape(person)!r} in the test pictures"
    numbered = [f"{person}_{int(picture):04d}"] if _NUMBER.fullmatch(picture) else []
    for wanted in (picture, *numbered):
        found = [number for name, number in places[person] if wanted in (name, PurePath(name).stem)]
        if len(found) > 1:
            return f"{escape(person)!r} has {len(found)} pictures {escape(wanted)!r}"
        if found:
            return found[0]
    return f"{escape(person)!r} has no picture {escape(picture)!r}"


def _folds(path: Path, same: list[bool], header: tuple[int, int] | None) -> list[int]:
    kinds = (sum(same), len(same) - sum(same))
    if min(kinds) < 2:
        counts = f"{kinds[0]:,} pairs of one person and {kinds[1]:,} of two"
        raise DataError(f"{path}: {counts}; two of each kind are needed, or there is no rate of errors")
    if header and header[0] == 1:
        if kinds != (header[1], header[1]):
            raise DataError(
                f"{path}: its first line says {header[1]} pairs of a kind; it has {kinds[0]} and {kinds[1]}"
            )
        header = None
    if header is None:
        many, counted, made = min(_DRAWN, *kinds), [0, 0], []
        for each in same:  # in turns: as many of each kind in each
            made.append(counted[each] % many)
            counted[each] += 1
        return made
    folds, of_kind = header
    as_said = folds > 1 and 2 * of_kind * folds == len(same)
    if not as_said or [*([True] * of_kind), *([False] * of_kind)] * folds != same:
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
