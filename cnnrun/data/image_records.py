"""Records of decoded images: enough to audit a data set without decoding it again."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.data.image_geometry import DecodedImage
from cnnrun.data.image_names import FORMAT_SUFFIXES

# An image's thumbnail for the search for near duplicates: its grey values at THUMB_SIDE x THUMB_SIDE. Larger thumbnails
# keep details that resizing a small image destroys (on 28 x 28 images, 16 x 16 finds a quarter of what 8 x 8 finds at
# the same number of false alarms).
THUMB_SIDE = 8


def record_dtype(channels: int) -> np.dtype[Any]:
    """The fields of an image's record.

    `file_hash` is 0 without a file; `pixel_hash` is of the network's input. `height`, `width`, `format`, `mode` and
    `orientation` are the file's. `misnamed`: the format is not the one that the name says. `peak`: the largest value of
    a 16-bit image, else 0. `pixel_sum` and `pixel_square_sum` are exact sums by channel (of at least three, so that
    grey and RGB have one type), from which mean and deviation of any subset of the images follow.
    """
    return np.dtype(
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
            ("pixel_sum", "<i8", (max(channels, 3),)),
            ("pixel_square_sum", "<i8", (max(channels, 3),)),
            ("thumbnail", "u1", (THUMB_SIDE * THUMB_SIDE,)),
        ]
    )


def digest(data: bytes | memoryview) -> int:
    """64 bits of BLAKE2b. Among a million different images, the probability of a collision is 1 in 40 million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fill_record(row: Any, name: str, data: bytes, decoded: DecodedImage, fitted_CHW: NDArray[Any]) -> None:
    """Fill the record of one image, except its pixel sums. `data` is empty if the image comes from no file."""
    row["file_hash"] = digest(data) if data else 0
    row["pixel_hash"] = digest(fitted_CHW.tobytes())
    row["height"], row["width"] = decoded.size
    row["format"], row["mode"], row["orientation"] = decoded.format, decoded.mode, decoded.orientation
    row["peak"] = decoded.peak
    row["thumbnail"] = grey_thumbnail(decoded)
    row["misnamed"] = bool(data) and not name.lower().endswith(FORMAT_SUFFIXES[decoded.format])


def grey_thumbnail(decoded: DecodedImage) -> NDArray[np.uint8]:
    """The grey values of an image at THUMB_SIDE x THUMB_SIDE, flattened: of all channels, their mean."""
    from PIL import Image as Pil

    side = (THUMB_SIDE, THUMB_SIDE)
    small = [image.resize(side, Pil.Resampling.BICUBIC, reducing_gap=3.0) for image in decoded.pillow_images]
    if len(small) == 1 and not decoded.pixel_format.is_deep:
        return np.frombuffer(small[0].convert("L").tobytes(), np.uint8)
    mean = np.mean([np.asarray(image, np.float32) for image in small], 0) / decoded.pixel_format.levels_per_grey
    grey: NDArray[np.uint8] = np.rint(mean).clip(0, 255).astype(np.uint8).ravel()
    return grey


def fill_pixel_sums(records_N: NDArray[Any], pixels_NCHW: NDArray[Any]) -> None:
    """Fill `pixel_sum`, `pixel_square_sum` and `is_single_colour` of records, for many images at once."""
    channels, count = pixels_NCHW.shape[1], pixels_NCHW[0, 0].size
    if pixels_NCHW.dtype == np.uint8:
        values = torch.from_numpy(pixels_NCHW).float()
        total, squares = _exact_sums(values).numpy(), _exact_sums(values.square_()).numpy()
        is_single_colour = squares * count == total**2
    else:
        images = [image.astype(np.int64) for image in pixels_NCHW]
        total = np.stack([image.sum((1, 2)) for image in images])
        squares = np.stack([np.square(image).sum((1, 2)) for image in images])
        is_single_colour = (pixels_NCHW == pixels_NCHW[:, :, :1, :1]).all((2, 3))
    records_N["pixel_sum"][:, :channels], records_N["pixel_square_sum"][:, :channels] = total, squares
    records_N["is_single_colour"] = is_single_colour.all(1)


def _exact_sums(values_NCHW: Tensor) -> Tensor:
    """Exact sums over the pixels, int64 [N, C], of whole numbers up to 255 squared."""
    # float32 holds the sum of 256 such numbers exactly, and is faster.
    row_dtype = torch.float32 if values_NCHW.shape[3] <= 256 else torch.float64
    rows = values_NCHW.sum(3, dtype=row_dtype)
    return rows.sum(2, dtype=torch.float64).long()


def channel_mean_std(
    total_NC: NDArray[np.int64], squares_NC: NDArray[np.int64], pixels_per_image: int, levels_per_grey: float = 1.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over N images, in the network's 0..255; exact up to the divisions."""
    count = len(total_NC) * pixels_per_image
    mean = [_exact_total(column) / count for column in total_NC.T]
    squares = [_exact_total(column) / count for column in squares_NC.T]
    std = [max(0.0, s - m * m) ** 0.5 for s, m in zip(squares, mean, strict=True)]
    return tuple(m / levels_per_grey for m in mean), tuple(s / levels_per_grey for s in std)


def _exact_total(values_N: NDArray[np.int64]) -> int:
    """The sum of numbers of which int64 may not hold the sum: squares of 16 bits over many images."""
    return (int((values_N >> 32).sum()) << 32) + int((values_N & 0xFFFFFFFF).sum())
