"""Hashes by which the files of a cache's entry are known to be as they were written.

Each record holds 64 bits of BLAKE2b of its image's pixels; a block's hash covers its records and its problems; and the
hashes of whole files cover the rest. They find damage, not malice: whoever can write an entry can write hashes that
fit, and is kept out by who owns it (ownership.py).
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
    """BLAKE2b of a block's records and of what is wrong with its images, by their numbers: uint8 [HASH_BYTES]."""
    made = hashlib.blake2b(problem_lines(problems), digest_size=HASH_BYTES)
    made.update(records.tobytes())
    return np.frombuffer(made.digest(), np.uint8)


def problem_lines(problems: Mapping[int, str]) -> bytes:
    """What is wrong with the bad images, a line of JSON each."""
    return "".join(json.dumps([number, text]) + "\n" for number, text in sorted(problems.items())).encode()


def parse_problems(lines: bytes) -> dict[int, str]:
    """The images' problems by their numbers, of lines that `problem_lines` wrote; what is no such line is left out."""
    found = {}
    for line in lines.split(b"\n"):
        try:
            number, text = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(number) is int and isinstance(text, str):
            found[number] = text
    return found


def pixel_hashes(records: NDArray[Any], problems: Mapping[int, str], image_bytes: int) -> NDArray[np.uint64]:
    """The hash that each image's pixels must have; a bad one is black."""
    hashes = records["pixels"].astype(np.uint64)
    hashes[list(problems)] = digest(bytes(image_bytes))
    return hashes


def has_changed(pixels: NDArray[np.uint8], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Compare images, uint8 [n, ...], with their hashes; True where the pixels are others."""
    size = pixels.nbytes // max(1, len(pixels))
    view = pixels.reshape(-1).data
    found = [digest(view[first : first + size]) for first in range(0, pixels.nbytes, size)]
    return np.not_equal(np.array(found, np.uint64), hashes)


def file_hash(path: Path) -> str:
    """BLAKE2b of a whole file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=HASH_BYTES)).hexdigest()
