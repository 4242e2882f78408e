"""Records of decoded images: enough to audit a data set without decoding it again."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.data.image_files import FORMAT_SUFFIXES
from cnnrun.data.image_geometry import DecodedImage

# An image's thumbnail for the search for near duplicates: its grey values at THUMB_SIDE x THUMB_SIDE. Larger thumbnails
# keep details that resizing a small image destroys (on 28 x 28 images, 16 x 16 finds a quarter of what 8 x 8 finds at
# the same number of false alarms).
THUMB_SIDE = 8

# `file_hash` is 0 without a file; `pixel_hash` is of the network's input. `height`, `width`, `format`, `mode` and
# `orientation` are the file's. `misnamed`: the format is not the one that the name says. `peak`: the largest value of a
# 16-bit image, else 0. `pixel_sum` and `pixel_square_sum` are exact sums by channel, from which mean and deviation of
# any subset of the images follow.
RECORD = np.dtype(
    [
        ("file_hash", "<u8"),
        ("pixel_hash", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("format", "S8"),
        ("mode", "S8"),
        ("orientation", "u1"),
        ("is_single_colour", "?"),
        ("misnamed", "?"),
        ("peak", "<u2"),
        ("pixel_sum", "<i8", (3,)),
        ("pixel_square_sum", "<i8", (3,)),
        ("thumbnail", "u1", (THUMB_SIDE * THUMB_SIDE,)),
    ]
)


def digest(data: bytes | memoryview) -> int:
    """64 bits of BLAKE2b. Among a million different images, the probability of a collision is 1 in 40 million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fill_record(row: Any, name: str, data: bytes, decoded: DecodedImage, fitted_CHW: NDArray[np.uint8]) -> None:
    """Fill a row of RECORD for one image, except its pixel sums. `data` is empty if the image comes from no file."""
    row["file_hash"] = digest(data) if data else 0
    row["pixel_hash"] = digest(fitted_CHW.tobytes())
    row["height"], row["width"] = decoded.size
    row["format"], row["mode"], row["orientation"] = decoded.format, decoded.mode, decoded.orientation
    row["peak"] = decoded.peak
    row["thumbnail"] = grey_thumbnail(decoded.pillow_image)
    row["misnamed"] = bool(data) and not name.lower().endswith(FORMAT_SUFFIXES[decoded.format])


def grey_thumbnail(pillow_image: Any) -> NDArray[np.uint8]:
    """The grey values of an image at THUMB_SIDE x THUMB_SIDE, flattened."""
    from PIL import Image as Pil

    small = pillow_image.resize((THUMB_SIDE, THUMB_SIDE), Pil.Resampling.BICUBIC, reducing_gap=3.0).convert("L")
    return np.frombuffer(small.tobytes(), np.uint8)


def fill_pixel_sums(records_N: NDArray[Any], pixels_NCHW: NDArray[np.uint8]) -> None:
    """Fill `pixel_sum`, `pixel_square_sum` and `is_single_colour` of RECORD rows, for many images at once."""
    pixels = torch.from_numpy(pixels_NCHW)
    channels, count = pixels.shape[1], pixels[0, 0].numel()
    values = pixels.float()
    total, squares = _exact_sums(values), _exact_sums(values.square_())
    records_N["pixel_sum"][:, :channels], records_N["pixel_square_sum"][:, :channels] = total, squares
    records_N["is_single_colour"] = (squares * count == total.square()).all(1)


def _exact_sums(values_NCHW: Tensor) -> Tensor:
    """Exact sums over the pixels, int64 [N, C], of whole numbers up to 255 squared."""
    # float32 holds the sum of 256 such numbers exactly, and is faster.
    row_dtype = torch.float32 if values_NCHW.shape[3] <= 256 else torch.float64
    rows = values_NCHW.sum(3, dtype=row_dtype)
    return rows.sum(2, dtype=torch.float64).long()


def channel_mean_std(
    total_NC: NDArray[np.int64], squares_NC: NDArray[np.int64], pixels_per_image: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over N images, exact up to the last division."""
    count = len(total_NC) * pixels_per_image
    mean = [int(total) / count for total in total_NC.sum(0)]
    squares = [int(total) / count for total in squares_NC.sum(0)]
    return tuple(mean), tuple(max(0.0, s - m * m) ** 0.5 for s, m in zip(squares, mean, strict=True))
