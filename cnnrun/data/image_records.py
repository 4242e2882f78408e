"""What is remembered of each picture when it is decoded: enough to audit a data set without decoding it again."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.data.image_files import FORMAT_SUFFIXES, DecodedImage

# A picture's fingerprint for near duplicates: its grey values at THUMB x THUMB. Finer ones keep what resizing a small
# picture destroys (tried on 28 x 28: 16 x 16 finds a quarter of what 8 x 8 finds at the same number of false alarms).
THUMB_SIDE = 8

# `file`: hash of the file's bytes; `pixels`: of what the network sees. `total`, `squares`: exact sums over each
# channel's pixels, from which mean and deviation of any subset follow; `flat`: of one single colour; `misnamed`: of
# another format than the name says; `height`, `width`, `format`, `mode`, `orientation`: of the file; `peak`: the
# largest value of a picture of 16 bits, 0 of others.
RECORD = np.dtype(
    [
        ("file", "<u8"),
        ("pixels", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("format", "S8"),
        ("mode", "S8"),
        ("orientation", "u1"),
        ("flat", "?"),
        ("misnamed", "?"),
        ("peak", "<u2"),
        ("total", "<i8", (3,)),
        ("squares", "<i8", (3,)),
        ("thumb", "u1", (THUMB_SIDE * THUMB_SIDE,)),
    ]
)


def digest(data: bytes | memoryview) -> int:
    """64 bits of BLAKE2b; two of a million different pictures agree by chance once in forty million such data sets."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fill_record(row: Any, name: str, data: bytes, seen: DecodedImage, fitted_CHW: NDArray[np.uint8]) -> None:
    """Fill a row of RECORD with what is known of one picture; without bytes, for pixels that come from no file."""
    row["file"] = digest(data) if data else 0
    row["pixels"] = digest(fitted_CHW.tobytes())
    row["width"], row["height"] = seen.pillow_image.size
    row["format"], row["mode"], row["orientation"] = seen.format, seen.mode, seen.orientation
    row["peak"] = seen.peak
    row["thumb"] = grey_thumbnail(seen.pillow_image)
    row["misnamed"] = bool(data) and not name.lower().endswith(FORMAT_SUFFIXES[seen.format])


def grey_thumbnail(picture: Any) -> NDArray[np.uint8]:
    """The grey values of a picture at THUMB x THUMB, flat."""
    from PIL import Image as Pil

    small = picture.resize((THUMB_SIDE, THUMB_SIDE), Pil.Resampling.BICUBIC, reducing_gap=3.0).convert("L")
    return np.frombuffer(small.tobytes(), np.uint8)


def fill_pixel_sums(records_N: NDArray[Any], pixels_NCHW: NDArray[np.uint8]) -> None:
    """Fill rows of RECORD with what is computed of many pictures at once."""
    pixels = torch.from_numpy(pixels_NCHW)
    channels, count = pixels.shape[1], pixels[0, 0].numel()
    values = pixels.float()
    total, squares = _exact_sums(values), _exact_sums(values.square_())
    records_N["total"][:, :channels], records_N["squares"][:, :channels] = total, squares
    records_N["flat"] = (squares * count == total.square()).all(1)


def _exact_sums(values_NCHW: Tensor) -> Tensor:
    """int64 [N, C] of whole numbers up to 255 squared: float32 holds a row of 256 of them exactly, which is fast."""
    wide = values_NCHW.shape[3] > 256
    rows = values_NCHW.sum(3, dtype=torch.float64 if wide else torch.float32)
    return rows.sum(2, dtype=torch.float64).long()


def channel_mean_std(
    total_NC: NDArray[np.int64], squares_NC: NDArray[np.int64], pixels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over N pictures of so many pixels each, exact up to the last division."""
    count = len(total_NC) * pixels
    mean = [int(total) / count for total in total_NC.sum(0)]
    squares = [int(total) / count for total in squares_NC.sum(0)]
    return tuple(mean), tuple(max(0.0, s - m * m) ** 0.5 for s, m in zip(squares, mean, strict=True))
