"""Hashes that detect damage in the files of a cache entry.

Each record holds 64 bits of BLAKE2b of its image's pixels. A block's hash covers its records and its problems, and
hashes of whole files cover the rest. They find damage, not malice: whoever can write an entry can also write matching
hashes. Ownership of the folder keeps other users out (ownership.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.data.image_records import digest

HASH_BYTES = 32  # of a block


def block_hash(records: NDArray[Any], problems: Mapping[int, str]) -> NDArray[np.uint8]:
    """BLAKE2b of a block's records and of its images' problems, by image index: uint8 [HASH_BYTES]."""
    hasher = hashlib.blake2b(problem_lines(problems), digest_size=HASH_BYTES)
    hasher.update(records.tobytes())
    return np.frombuffer(hasher.digest(), np.uint8)


def problem_lines(problems: Mapping[int, str]) -> bytes:
    """The problems of the bad images by their indices, one line of JSON for each image."""
    return "".join(json.dumps([number, text]) + "\n" for number, text in sorted(problems.items())).encode()


def parse_problems(lines: bytes) -> dict[int, str]:
    """Read the lines that `problem_lines` wrote: problems by image index. Other lines are ignored."""
    problems = {}
    for line in lines.split(b"\n"):
        try:
            number, text = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(number) is int and isinstance(text, str):
            problems[number] = text
    return problems


def expected_pixel_hashes(records: NDArray[Any], problems: Mapping[int, str], image_bytes: int) -> NDArray[np.uint64]:
    """The hash that each image's pixels must have. The pixels of a bad image are all black."""
    hashes = records["pixel_hash"].astype(np.uint64)
    hashes[list(problems)] = digest(bytes(image_bytes))
    return hashes


def has_changed(pixels: NDArray[Any], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Compare images [n, ...] with their hashes: bool [n], True where the pixels have changed."""
    size = pixels.nbytes // max(1, len(pixels))
    view = pixels.reshape(-1).view(np.uint8).data
    actual = [digest(view[first : first + size]) for first in range(0, pixels.nbytes, size)]
    return np.not_equal(np.array(actual, np.uint64), hashes)


def file_hash(path: Path) -> str:
    """BLAKE2b of a whole file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).hexdigest()
