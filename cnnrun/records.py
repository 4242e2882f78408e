"""What is remembered of each picture when it is decoded: enough to audit a data set without decoding it again."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.pictures import FORMAT_SUFFIXES, Opened

# A picture's fingerprint for near duplicates: its grey values at THUMB x THUMB. Finer ones keep what resizing a small
# picture destroys (tried on 28 x 28: 16 x 16 finds a quarter of what 8 x 8 finds at the same number of false alarms).
THUMB = 8

# `file`: hash of the file's bytes; `pixels`: of the picture at its own size; `total`, `squares`: exact sums over the
# fitted pixels of each channel, from which mean and deviation of any subset follow; `flat`: of one single colour;
# `misnamed`: of another format than the name says.
RECORD = np.dtype(
    [
        ("file", "<u8"),
        ("pixels", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("format", "S8"),
        ("mode", "S8"),
        ("orientation", "u1"),
        ("total", "<i8", (3,)),
        ("squares", "<i8", (3,)),
        ("flat", "?"),
        ("misnamed", "?"),
        ("thumb", "u1", (THUMB * THUMB,)),
    ]
)


def digest(*parts: bytes) -> int:
    """64 bits of BLAKE2b; two of a million different pictures agree by chance once in forty million such data sets."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(part)
    return int.from_bytes(made.digest(), "little")


def record(name: str, data: bytes, seen: Opened, fitted_HWC: NDArray[np.uint8]) -> Any:
    """The row of RECORD for a picture file's name and bytes, the picture in it, and what the network sees of it.

    Without bytes, for pixels that come from no file.
    """
    picture = seen.picture
    row = np.zeros((), RECORD)
    row["file"] = digest(data) if data else 0
    row["pixels"] = digest(repr((picture.mode, picture.size)).encode(), picture.tobytes())
    row["height"], row["width"] = picture.height, picture.width
    row["format"], row["mode"], row["orientation"] = seen.format, seen.mode, seen.orientation
    values = fitted_HWC.reshape(-1, fitted_HWC.shape[2]).astype(np.int32)
    row["total"][: values.shape[1]] = values.sum(0)
    row["squares"][: values.shape[1]] = np.square(values).sum(0)
    row["flat"] = all(low == high for low, high in _extremes(picture))
    row["misnamed"] = bool(data) and not name.lower().endswith(FORMAT_SUFFIXES[seen.format])
    row["thumb"] = thumb(picture)
    return row


def _extremes(picture: Any) -> list[tuple[int, int]]:
    found = picture.getextrema()
    return [found] if picture.mode == "L" else list(found)


def thumb(picture: Any) -> NDArray[np.uint8]:
    """The grey values of a picture at THUMB x THUMB, flat."""
    from PIL import Image as Pil

    small = picture.convert("L").resize((THUMB, THUMB), Pil.Resampling.BICUBIC)
    return np.frombuffer(small.tobytes(), np.uint8)


def statistics(
    total_NC: NDArray[np.int64], squares_NC: NDArray[np.int64], pixels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over N pictures of so many pixels each, exact up to the last division."""
    count = len(total_NC) * pixels
    mean = [int(total) / count for total in total_NC.sum(0)]
    squares = [int(total) / count for total in squares_NC.sum(0)]
    return tuple(mean), tuple(max(0.0, s - m * m) ** 0.5 for s, m in zip(squares, mean, strict=True))
