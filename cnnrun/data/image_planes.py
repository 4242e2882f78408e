"""Images of any number of channels, and of 16 bits: read as planes, one array for each channel.

Pillow reads grey images of 16 bits and everything of 8 bits with up to four channels, NumPy its own .npy files. What
Pillow would cut down to three channels or to 8 bits is read by the packages of the extra `bands`: TIFF files by
tifffile, PNG files of 16 bits in colour by imagecodecs.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.counts import format_count
from cnnrun.base.errors import UserError, escape
from cnnrun.base.extras import missing_package
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.image_geometry import DecodedImage, turn_upright
from cnnrun.data.image_settings import MAX_PIXELS, ImageRefusedError, ImageSettings, ReaderMissingError
from cnnrun.data.npy_headers import read_npy_header

_MAX_VALUES = 3 * MAX_PIXELS  # of all planes
_NPY_START = b"\x93NUMPY"
_MAX_PNM_HEADER = 4096  # bytes
_PNM_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM_HEADER = re.compile(rb"P([56])" + _PNM_GAP + rb"(\d{1,6})" + _PNM_GAP + rb"(\d{1,6})" + _PNM_GAP + rb"(\d{1,5})\s")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_BITS, _TIFF_SAMPLES, _TIFF_ORIENTATION = 258, 277, 274  # tags
_TIFF_GREY, _TIFF_RGB, _TIFF_SEPARATED = 1, 2, 5  # photometric interpretations whose values are levels as they are
_TIFF_OPACITY, _TIFF_PLAIN_OPACITY = (1,), (2,)  # kinds of an extra sample
_GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's "L"


@dataclass(frozen=True)
class Planes:
    """The pixels of an image file, uint8, uint16 or int16 [H, W, P].

    `has_alpha`: the last plane is opacity. `is_colour`: one or three planes are grey or RGB, and not anything else.
    """

    pixels_HWP: NDArray[Any]
    format: str
    mode: str
    orientation: int = 1
    has_alpha: bool = False
    is_colour: bool = True


@dataclass(frozen=True)
class PlanesHeader:
    """Height, width and number of planes of an image, and True if they have 16 bits."""

    size: HeightWidth
    planes: int
    is_deep: bool


def is_npy(data: bytes) -> bool:
    """Return whether these are the bytes of a NumPy array."""
    return data.startswith(_NPY_START)


def is_tiff(data: bytes) -> bool:
    """Return whether these are the bytes of a TIFF file."""
    return data.startswith(_TIFF_STARTS)


def has_deep_colour(data: bytes) -> bool:
    """Return whether these are the bytes of a PNG file with 16 bits and more than one channel."""
    return data.startswith(_PNG_START) and data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")


def is_read_whole(image: Any) -> bool:
    """Return whether Pillow reads every channel and every bit of an opened TIFF file."""
    bits, samples = image.tag_v2.get(_TIFF_BITS, (1,)), image.tag_v2.get(_TIFF_SAMPLES, 1)
    keeps_bits = max(bits, default=1) <= 8 or image.mode.startswith("I;16")
    return getattr(image, "n_frames", 1) == 1 and samples <= len(image.getbands()) and keeps_bits


def planes_of_image(image: Any, orientation: int, channels: int) -> Planes:
    """The planes of a Pillow image; a palette and other colour spaces become RGB.

    CMYK stays as it is where four `channels` are wanted. A transparent value of 16-bit grey is not applied, as with 8
    bits.
    """
    mode, file_format = image.mode, image.format
    if mode == "CMYK" and channels != 4:
        image = image.convert("RGB")
    elif not mode.startswith("I") and ("transparency" in image.info or mode in ("P", "PA", "La", "RGBa")):
        is_opaque = mode == "P" and "transparency" not in image.info
        image = image.convert("RGB" if is_opaque else "LA" if mode in ("L", "La") else "RGBA")
    elif mode not in ("L", "LA", "RGB", "RGBA", "CMYK") and not mode.startswith("I"):
        image = image.convert("L" if mode == "1" else "RGB")
    pixels = np.asarray(image)
    pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)
    pixels_HWP = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return Planes(pixels_HWP, file_format, mode, orientation, has_alpha=image.mode.endswith("A"))


def deep_pnm_header(data: bytes) -> tuple[int, int, int, int] | None:
    """Width, height, channels and offset of the pixels of a binary PGM or PPM with 16 bits; None for other files."""
    match = _PNM_HEADER.match(data[:_MAX_PNM_HEADER])
    if match is None or int(match[4]) <= 255:
        return None
    return int(match[2]), int(match[3]), 3 if match[1] == b"6" else 1, match.end()


def read_pnm_planes(data: bytes, header: tuple[int, int, int, int]) -> Planes:
    """The planes of a binary PGM or PPM with 16 bits, whose values Pillow would scale. Raises ImageRefusedError."""
    width, height, channels, offset = header
    _check_size(height, width, count := height * width * channels)
    if len(data) < offset + 2 * count:
        raise ImageRefusedError("cannot be decoded: it ends before its last pixel")
    pixels = np.frombuffer(data, ">u2", count, offset).astype(np.uint16)
    return Planes(pixels.reshape(height, width, channels), "PPM", f"{channels}x16")


def read_png_planes(data: bytes, orientation: int) -> Planes:
    """The planes of a PNG file with 16 bits and several channels."""
    if problem := missing_package("imagecodecs", "bands", "a PNG file of 16 bits in colour"):
        raise ReaderMissingError(problem)
    import imagecodecs

    pixels_HWP = imagecodecs.png_decode(data)
    count = pixels_HWP.shape[2]
    return Planes(pixels_HWP, "PNG", f"{count}x16", orientation, has_alpha=count in (2, 4))


def read_npy_planes(data: bytes, channels: int) -> Planes:
    """The planes of a .npy file: [H, W], [H, W, P], or [P, H, W] where only the first axis has `channels` values."""
    _read_npy_shape(data)
    pixels = np.load(BytesIO(data), allow_pickle=False)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.shape[2] != channels and pixels.shape[0] == channels:
        pixels = pixels.transpose(1, 2, 0)
    pixels_HWP = _to_known_kind(pixels)
    return Planes(pixels_HWP, "NPY", _mode(pixels_HWP))


def read_npy_shape(data: bytes) -> PlanesHeader:
    """Size and planes of a .npy file, by its header; the shortest of three axes are the planes."""
    shape, dtype = _read_npy_shape(data)
    if len(shape) == 2:
        return PlanesHeader((shape[0], shape[1]), 1, dtype.itemsize == 2)
    height, width, planes = (*shape[1:], shape[0]) if shape[0] < min(shape[1:]) else shape
    return PlanesHeader((height, width), planes, dtype.itemsize == 2)


def _read_npy_shape(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy file that holds an image. Raises ImageRefusedError."""
    file = BytesIO(data)
    try:
        shape, dtype = read_npy_header(file)
    except ValueError:
        raise ImageRefusedError("not a NumPy array: its header cannot be read") from None
    if dtype.hasobject:
        raise ImageRefusedError("holds Python objects (a pickle); save it as numbers")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ImageRefusedError(f"claims the shape {list(shape)}, which is not what it holds")
    if len(shape) not in (2, 3):
        raise ImageRefusedError(f"has the shape {list(shape)}; expected [height, width] or [height, width, channels]")
    _check_size(shape[0], shape[1], math.prod(shape))
    return shape, dtype


def read_tiff_planes(data: bytes) -> Planes:
    """The planes of a TIFF file, also one page for each. Raises ImageRefusedError for other dimensions."""
    with _open_tiff(data) as (series, page):
        dimensions = _tiff_dimensions(series)
        orientation = page.tags.valueof(_TIFF_ORIENTATION, default=1)
        pixels = series.asarray().reshape([length for _, length in dimensions])
    axes = "".join(name for name, _ in dimensions)
    plane_axes = axes.replace("Y", "").replace("X", "")
    if plane_axes:
        pixels = np.moveaxis(pixels, axes.index(plane_axes), -1)
    pixels_HWP = _to_known_kind(pixels if plane_axes else pixels[:, :, None])
    is_colour = page.photometric in (_TIFF_GREY, _TIFF_RGB) and plane_axes in ("", "S")
    has_alpha = is_colour and page.extrasamples[-1:] in (_TIFF_OPACITY, _TIFF_PLAIN_OPACITY)
    return Planes(pixels_HWP, "TIFF", _mode(pixels_HWP), orientation, has_alpha, is_colour)


def read_tiff_shape(data: bytes) -> PlanesHeader:
    """Size and planes of a TIFF file, by its header. Raises ImageRefusedError."""
    with _open_tiff(data) as (series, page):
        lengths = dict(_tiff_dimensions(series))
        size = (lengths.pop("Y"), lengths.pop("X"))
        is_turned = page.tags.valueof(_TIFF_ORIENTATION, default=1) > 4
        return PlanesHeader(size[::-1] if is_turned else size, math.prod(lengths.values()), series.dtype.itemsize == 2)


@contextmanager
def _open_tiff(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The only image of a TIFF file and its first page. Raises ImageRefusedError for what tifffile cannot read."""
    if problem := missing_package("tifffile", "bands", "a TIFF file with these channels or pages"):
        raise ReaderMissingError(problem)
    tifffile = _import_tifffile()
    try:
        with tifffile.TiffFile(BytesIO(data)) as file:
            if not file.series:
                raise ImageRefusedError("cannot be decoded: it has no image")
            if len(file.series) > 1:
                raise ImageRefusedError("several images of different sizes; give single images")
            series, page = file.series[0], file.pages[0]
            if page.photometric not in (_TIFF_GREY, _TIFF_RGB, _TIFF_SEPARATED):
                raise ImageRefusedError("a palette or a colour space other than grey and RGB; save it as levels")
            _check_size(page.imagelength, page.imagewidth, max(math.prod(series.shape), math.prod(page.chunks)))
            yield series, page
    except (ImageRefusedError, ReaderMissingError, UserError):  # a UserError is a signal
        raise
    except Exception as error:  # of any kind, for damaged files
        if "imagecodecs" in str(error) and (problem := missing_package("imagecodecs", "bands", "its compression")):
            raise ReaderMissingError(problem) from None
        raise ImageRefusedError(f"cannot be decoded: {escape(str(error))}") from None


def _tiff_dimensions(series: Any) -> list[tuple[str, int]]:
    """The axes of a TIFF image with their lengths: Y, X and at most one more, which are the planes."""
    axes = zip(series.axes, series.shape, strict=True)
    dimensions = [(name, length) for name, length in axes if length > 1 or name in "YX"]
    if sorted(name for name, _ in dimensions if name in "YX") != ["X", "Y"] or len(dimensions) > 3:
        raise ImageRefusedError(f"has the shape {list(series.shape)}; expected height, width and channels")
    return dimensions


@cache
def _import_tifffile() -> Any:
    """Import tifffile, without its log: an error of ours names the file."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    return tifffile


def decode_planes(planes: Planes, channels: int, settings: ImageSettings, size: HeightWidth) -> DecodedImage:
    """Make an image of `channels` channels from the planes of a file; `size` is that of the upright file.

    Raises ImageRefusedError if it has other channels, or values outside of black and white that are not clipped.
    """
    from PIL import Image as Pil

    pixel_format = settings.pixel_format
    peak = 0 if planes.pixels_HWP.dtype == np.uint8 else max(0, int(planes.pixels_HWP.max()))
    pixels = _match_levels(_match_channels(planes, channels, settings), settings)
    dtype = np.float32 if pixel_format.is_deep else np.uint8
    images = [Pil.fromarray(np.ascontiguousarray(pixels[:, :, index], dtype)) for index in range(channels)]
    upright = tuple(turn_upright(image, planes.orientation) for image in images)
    return DecodedImage(upright, size, planes.format, planes.mode, planes.orientation, peak, pixel_format=pixel_format)


def _match_levels(pixels_HWP: NDArray[Any], settings: ImageSettings) -> NDArray[Any]:
    """Convert the levels of a file to stored ones. Raises ImageRefusedError for values outside of black and white."""
    pixel_format = settings.pixel_format
    if pixels_HWP.dtype == np.uint8 and not pixel_format.is_deep:
        return pixels_HWP
    if pixels_HWP.dtype == np.uint8:
        levels: NDArray[Any] = np.rint(pixels_HWP * pixel_format.levels_per_grey).astype(pixel_format.dtype)
        return levels
    low, high = int(pixels_HWP.min()), int(pixels_HWP.max())
    if not pixel_format.is_deep:
        if low < 0:
            raise ImageRefusedError(f"has the value {low:,}; give data.image.bits: 16, and black")
        return (pixels_HWP // 257).astype(np.uint8)
    if low < pixel_format.black and not settings.clip:
        raise ImageRefusedError(f"has the value {low:,}, below data.image.black ({pixel_format.black:,})")
    if high > pixel_format.white and not settings.clip:
        raise ImageRefusedError(f"has the value {high:,}, above data.image.white ({pixel_format.white:,})")
    shifted = pixels_HWP.astype(np.int32).clip(pixel_format.black, pixel_format.white) - pixel_format.black
    return shifted.astype(np.uint16)


def _match_channels(planes: Planes, channels: int, settings: ImageSettings) -> NDArray[Any]:
    """Convert grey to RGB or back, over the background where there is opacity. Raises ImageRefusedError otherwise."""
    pixels_HWP = planes.pixels_HWP
    if pixels_HWP.shape[2] == channels:
        return pixels_HWP
    if channels in (1, 3) and planes.has_alpha:
        pixels_HWP = _lay_over_background(pixels_HWP, settings)
    count = pixels_HWP.shape[2]
    if count == channels:
        return pixels_HWP
    if (count, channels) == (1, 3) and planes.is_colour:
        return pixels_HWP.repeat(3, 2)
    if (count, channels) == (3, 1) and planes.is_colour:
        grey: NDArray[Any] = np.rint(pixels_HWP @ np.array(_GREY_WEIGHTS)).astype(pixels_HWP.dtype)
        return grey[:, :, None]
    raise ImageRefusedError(f"has {format_count(count, 'channel')}; data.image.channels is {channels}")


def _lay_over_background(pixels_HWP: NDArray[Any], settings: ImageSettings) -> NDArray[Any]:
    """Lay the planes over the background by the last one, their opacity."""
    pixel_format, full = settings.pixel_format, np.iinfo(pixels_HWP.dtype).max
    paper = settings.background * full / 255
    if pixel_format.is_deep and pixels_HWP.dtype != np.uint8:
        paper = pixel_format.black + settings.background * pixel_format.levels_per_grey
    opacity = pixels_HWP[:, :, -1:] / full
    opaque: NDArray[Any] = np.rint(pixels_HWP[:, :, :-1] * opacity + paper * (1 - opacity)).astype(pixels_HWP.dtype)
    return opaque


def _to_known_kind(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels as uint8, uint16 or int16 in this machine's byte order. Raises ImageRefusedError for other kinds."""
    dtype = pixels.dtype.newbyteorder("=")
    if dtype not in (np.uint8, np.uint16, np.int16):
        raise ImageRefusedError(f"pixels of kind {pixels.dtype} have no agreed range; save it as 8 or 16 bit")
    known: NDArray[Any] = pixels.astype(dtype, copy=False)
    return known


def _mode(pixels_HWP: NDArray[Any]) -> str:
    """Short description of planes for lists: their number and bits."""
    return f"{pixels_HWP.shape[2]}x{8 * pixels_HWP.dtype.itemsize}"


def _check_size(height: int, width: int, value_count: int) -> None:
    """Raise ImageRefusedError for images without pixels, or too large for the memory."""
    if min(height, width, value_count) < 1:
        raise ImageRefusedError("has no pixels")
    if height * width > MAX_PIXELS:
        raise ImageRefusedError(f"{width}x{height} pixels; at most {MAX_PIXELS:,}")
    if value_count > _MAX_VALUES:
        raise ImageRefusedError(f"{value_count:,} values; at most {_MAX_VALUES:,}")
