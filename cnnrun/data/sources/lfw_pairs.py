"""Files of pairs in LFW's format: which images are compared, and in which fold.

A line `name  1  4` is two images of one person, and `name  1  other  2` is images of two persons. A number n stands for
the image `name_000n` or `n` in the person's folder; any other word is the name of a file there. The first line may be
`10  300`: ten folds, each of 300 pairs of one person and then 300 of two. It may also be `500`: 500 pairs of each kind.
Where the file has no folds, the pairs of each kind are dealt to ten folds in turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from torch import Tensor

from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, escape

_MAX_BYTES = 1 << 28
_NUMBER = re.compile("[0-9]{1,9}")
_DEFAULT_FOLDS = 10  # if the file has no folds

ImagesByPerson = Mapping[str, Sequence[tuple[str, int]]]  # person -> file name and index of each image


@dataclass(frozen=True)
class PairLine:
    """A pair as it is written: the person and the image of both sides, and the line number."""

    people: tuple[str, str]
    images: tuple[str, str]
    number: int


def read_pairs(path: Path) -> tuple[list[PairLine], tuple[int, int] | None]:
    """The pairs of a file, and (folds, pairs of each kind in a fold) if its first line has them, or None.

    Raises DataError if the file cannot be read, has a line that is not a pair, or has no pairs.
    """
    lines = _read_text(path).splitlines()
    words = [line.split("\t") if "\t" in line else line.split() for line in lines]
    first = words[0] if words else []
    has_header = len(first) in (1, 2) and all(_NUMBER.fullmatch(word.strip()) for word in first)
    problems, pairs = [], []
    for line, row in enumerate(words[has_header:], 1 + has_header):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) not in (3, 4) or not all(cells):
            problems.append(f"{path}:{line}: a pair is written `name 1 2` or `name 1 other 2`; has {len(cells)} words")
        elif len(cells) == 3:
            pairs.append(PairLine((cells[0], cells[0]), (cells[1], cells[2]), line))
        else:
            pairs.append(PairLine((cells[0], cells[2]), (cells[1], cells[3]), line))
    check_problems(problems)
    if not pairs:
        raise DataError(f"{path}: has no pairs")
    if not has_header:
        return pairs, None
    counts = [int(word) for word in first]
    return pairs, (counts[0], counts[1]) if len(counts) == 2 else (1, counts[0])


def _read_text(path: Path) -> str:
    data = read_bytes(path, DataError, _MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{escape(str(path))}: not text (pickled pairs are not read: they may run code)") from None


def pair_targets(
    path: Path, lines: list[PairLine], header: tuple[int, int] | None, images: ImagesByPerson, count: int
) -> Tensor:
    """The pairs as targets of `count` images, int64 [N, P, 2]: the second image and the fold, in the row of the first.

    Cells without a pair are -1. Raises DataError with a line for every mistake.
    """
    problems, pairs, line_of_pair = [], list[tuple[int, int]](), dict[tuple[int, int], int]()
    for line in lines:
        sides = [_find_person_image(images, *side) for side in zip(line.people, line.images, strict=True)]
        side_problems = [side for side in sides if isinstance(side, str)]
        first, second = (side if isinstance(side, int) else -1 for side in sides)
        pair = min(first, second), max(first, second)
        if side_problems:
            problems.append(f"{path}:{line.number}: {side_problems[0]}")
        elif first == second:
            problems.append(f"{path}:{line.number}: the image is compared with itself")
        elif (earlier_line := line_of_pair.get(pair)) is not None:
            problems.append(f"{path}:{line.number}: repeats the pair of line {earlier_line}")
        line_of_pair[pair] = line.number
        pairs.append((first, second))
    check_problems(problems)
    return _pad_pairs(pairs, _assign_folds(path, [line.people[0] == line.people[1] for line in lines], header), count)


def _find_person_image(images: ImagesByPerson, person: str, image_name: str) -> int | str:
    """The index of an image, or a message if it is not found."""
    if person not in images:
        return f"no person in the test images is called {escape(person)!r}"
    lfw_names = [f"{person}_{int(image_name):04d}"] if _NUMBER.fullmatch(image_name) else []
    for candidate in (image_name, *lfw_names):
        indices = [index for name, index in images[person] if candidate in (name, PurePath(name).stem)]
        if len(indices) > 1:
            return f"{escape(person)!r} has {len(indices)} images {escape(candidate)!r}"
        if indices:
            return indices[0]
    return f"{escape(person)!r} has no image {escape(image_name)!r}"


def _assign_folds(path: Path, is_same: list[bool], header: tuple[int, int] | None) -> list[int]:
    """The fold of each pair; `is_same` says which are pairs of one person.

    Raises DataError if there are too few pairs of a kind, or other pairs than the header announces.
    """
    same, different = sum(is_same), len(is_same) - sum(is_same)
    if min(same, different) < 2:
        counts = f"{same:,} pairs of one person and {different:,} of two"
        raise DataError(f"{path}: {counts}; two of each kind are needed to measure error rates")
    if header and header[0] == 1:
        if (same, different) != (header[1], header[1]):
            raise DataError(f"{path}: its first line says {header[1]} pairs of a kind; it has {same} and {different}")
        header = None
    if header is None:
        fold_count, seen, folds = min(_DEFAULT_FOLDS, same, different), [0, 0], []
        for kind in is_same:  # each kind is dealt in turn, so that all folds get an equal share of it
            folds.append(seen[kind] % fold_count)
            seen[kind] += 1
        return folds
    fold_count, pairs_of_kind = header
    has_length = fold_count > 1 and 2 * pairs_of_kind * fold_count == len(is_same)
    if not has_length or [*([True] * pairs_of_kind), *([False] * pairs_of_kind)] * fold_count != is_same:
        announced = f"{fold_count} folds of {pairs_of_kind} pairs of one person and then {pairs_of_kind} of two"
        raise DataError(
            f"{path}: its first line says {announced}; it has {same} and {different}, or they are in another order"
        )
    return [index // (2 * pairs_of_kind) for index in range(len(is_same))]


def _pad_pairs(pairs: list[tuple[int, int]], folds: list[int], count: int) -> Tensor:
    rows: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for (first, second), fold in zip(pairs, folds, strict=True):
        rows[first].append((second, fold))
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[(-1, -1)] * (longest - len(row))] for row in rows])
