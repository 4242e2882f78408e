"""Reading of image files: decoded within size limits, converted by fixed rules, and fitted to the network's input.

JPEG, PNG, BMP, WEBP and PGM/PPM are accepted, by content and not by name. EXIF rotation is applied, transparency is
laid over `background`, 16-bit grey is scaled by 1/257, and CMYK, palette, 1-bit and grey images are converted. Pixels
without an agreed range (32-bit, float) and animations are refused. Images are decoded to the end, so that truncated
files are found.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from cnnrun.base.errors import DataError, UnreadableFileError, escape
from cnnrun.base.file_sequences import Member, is_hidden_or_system_name
from cnnrun.config.spec import SizePair, Spec
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.results import View

FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "PPM"]
FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "PPM": (".pgm", ".ppm"),
}
SUFFIXES = {suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes}
SUFFIX_LIST = ", ".join(sorted(SUFFIXES))
MAX_BYTES = 64 << 20
MAX_PIXELS = 50_000_000
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}

_GREY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"}
# EXIF's orientation tag, and Pillow's transposition that undoes each of its values.
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_ATTEMPTS = 3

Channels = Literal[1, 3]


class ImageSettings(Spec):
    """Conversion of images to the network's input."""

    size: SizePair | None = None
    """Height and width in pixels; by default those of the source, if all its images have the same size."""
    channels: Channels | None = None
    """1 for grey, 3 for colour; by default those of the source."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """For images of another shape than `size`: stretch them, crop their middle, or pad them with `background`."""
    crop_pct: float = Field(1.0, gt=0, le=1)
    """Fraction of each side that is left by `fit: crop`: 0.875 keeps 224 of 256 pixels."""
    background: int = Field(255, ge=0, le=255)
    """The grey value (0..255) behind transparent pixels and around padded images."""
    min_side: int = Field(4, ge=1)
    """The shortest side, in pixels, that an image may have; smaller ones are refused."""
    mean: list[float] | None = None
    """The mean to subtract from each channel (pixel values 0..255); by default measured on the training split."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """The standard deviation to divide each channel by; by default measured on the training split."""

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: HeightWidth | None) -> HeightWidth | None:
        if size is not None and size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        return size


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: upright, over the background, in the network's channels, at its own size.

    `orientation` is EXIF's value, 0 if EXIF cannot be read. `peak` is the largest value of a 16-bit image, else 0.
    """

    pillow_image: Any
    format: str
    mode: str
    orientation: int
    peak: int = 0


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image, in any case, and is not a hidden or temporary file."""
    return not is_hidden_or_system_name(name) and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def load_with_view(
    path: Path, size: HeightWidth, channels: int, settings: ImageSettings
) -> tuple[NDArray[np.uint8], View]:
    """Read an image file as uint8 [H, W, C], and its `View` in the network's input.

    Raises DataError with the file's name and the problem.
    """
    with image_errors(str(path)):
        image = decode_image(read_image_bytes(path), channels, settings).pillow_image
        return fit_image(image, size, settings), compute_view((image.height, image.width), size, settings)


@contextmanager
def open_image(data: bytes, settings: ImageSettings) -> Iterator[tuple[Any, int]]:
    """The decoded Pillow image of a file's bytes, as stored, and EXIF's orientation. Use it within `image_errors`."""
    with _pillow().open(BytesIO(data), formats=FORMATS) as image:
        _check_header(image, settings)
        image.load()
        yield image, _read_orientation(image)


def decode_image(data: bytes, channels: int, settings: ImageSettings) -> DecodedImage:
    """Decode the whole image in a file's bytes. Call it within `image_errors`."""
    with open_image(data, settings) as (image, orientation):
        is_16_bit = image.mode.startswith("I;16") or _is_16_bit_pgm(image)
        peak = int(np.asarray(image).max()) if is_16_bit else 0
        opaque = _lay_over_background(turn_upright(_to_eight_bits(image, is_16_bit), orientation), settings.background)
        converted = opaque.convert("L" if channels == 1 else "RGB")
        return DecodedImage(converted, image.format, image.mode, orientation, peak)


def read_image_header(data: bytes) -> tuple[HeightWidth, bool]:
    """Height and width of the upright image, and True if it is grey. Call it within `image_errors`."""
    with _pillow().open(BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        has_swapped_sides = _read_orientation(image) > 4
        is_grey = image.mode in _GREY_MODES or _is_16_bit_pgm(image)
        return ((width, height) if has_swapped_sides else (height, width)), is_grey


def image_from_pixels(pixels: NDArray[np.uint8], channels: int) -> DecodedImage:
    """Make a `DecodedImage` of pixels [H, W, C] that are in memory already."""
    image = _pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return DecodedImage(image.convert("L" if channels == 1 else "RGB"), "", image.mode, 1)


def fit_image(image: Any, size: HeightWidth, settings: ImageSettings) -> NDArray[np.uint8]:
    """Fit a Pillow image to the network's input: uint8 [H, W, C]."""
    pixels: NDArray[np.uint8] = np.asarray(resize_to_fit(image, size, settings), dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_image_bytes(item: Path | str | Member, expected: tuple[int, int] | None = None) -> bytes:
    """The bytes of an image file or a shard's member, of at most MAX_BYTES.

    `expected` is the file's (size, time in ns) when it was listed: a file that changed since is refused. Reading is
    tried three times if a disk fails or a network handle is stale. Call it within `image_errors`.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _read_once(item, expected)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.05 * 4**attempt)
    raise AssertionError("unreachable")


def _read_once(item: Path | str | Member, expected: tuple[int, int] | None) -> bytes:
    path, offset = (item.shard, item.offset) if isinstance(item, Member) else (item, 0)
    # O_NONBLOCK does not wait for a pipe's writer; `fstat` checks the file that was opened, whatever the path is now.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageRefusedError("not a regular file")
        if expected is not None and expected != (status.st_size, status.st_mtime_ns):
            raise ImageRefusedError("changed since it was listed; start again")
        size = item.size if isinstance(item, Member) else status.st_size
        if size == 0:
            raise ImageRefusedError("empty file")
        if size > MAX_BYTES:
            raise ImageRefusedError(f"{size:,} bytes; at most {MAX_BYTES:,}")
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise ImageRefusedError(f"ends after {len(data):,} of {size:,} bytes")
    if content := _recognize_content(data):
        raise ImageRefusedError(f"not an image ({content})")
    return data


class ImageRefusedError(Exception):
    """Reason that an image cannot be used, without its name; `image_errors` adds that."""


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn errors with an image into a DataError with its name, or UnreadableFileError if the disk fails."""
    from PIL import UnidentifiedImageError

    Pil = _pillow()

    def data_error(problem: str) -> DataError:
        return DataError(f"{escape(name)}: {problem}")

    try:
        yield
    except ImageRefusedError as refused:
        raise data_error(str(refused)) from None
    except UnidentifiedImageError:
        raise data_error(f"not an image (accepted: {', '.join(FORMATS)})") from None
    except (Pil.DecompressionBombWarning, Pil.DecompressionBombError):
        raise data_error(f"more than {MAX_PIXELS:,} pixels") from None
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise data_error(f"cannot be decoded: {escape(error.strerror or str(error))}") from None
        raise UnreadableFileError(f"{escape(name)}: cannot be read: {escape(str(error.strerror))}") from None
    except (ValueError, SyntaxError, EOFError, struct.error) as error:
        raise data_error(f"cannot be decoded: {escape(str(error))}") from None


def _recognize_content(data: bytes) -> str | None:
    """The kind of a file that has only the name of an image, or None if it is not a known one."""
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    return "a web page" if data[:64].lstrip().lower().startswith((b"<!doctype", b"<html")) else None


@cache
def _pillow() -> Any:
    """Import Pillow, with too many pixels as an error instead of a warning, and no warnings of broken EXIF."""
    from PIL import Image as Pil

    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("error", category=Pil.DecompressionBombWarning)
    return Pil


def _check_header(image: Any, settings: ImageSettings) -> None:
    """Raise ImageRefusedError if size, frames or mode of an image are not accepted."""
    size = f"{image.width}x{image.height}"
    if image.width * image.height > MAX_PIXELS:
        raise ImageRefusedError(f"{size} pixels; at most {MAX_PIXELS:,}")
    if min(image.size) < settings.min_side:
        raise ImageRefusedError(f"{size} pixels; at least {settings.min_side} a side (data.image.min_side)")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a preview inside
        raise ImageRefusedError("an animation; give single images")
    if image.mode not in _MODES and not _is_16_bit_pgm(image):
        raise ImageRefusedError(f"pixels of kind {image.mode!r} have no agreed range; save it as 8 or 16 bit")


def _read_orientation(image: Any) -> int:
    """EXIF's orientation, 1 to 8, or 0 if EXIF cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, struct.error):
        return 0
    return value if value in _TRANSPOSITIONS or value == 1 else 0


def turn_upright(image: Any, orientation: int) -> Any:
    """Undo EXIF's orientation, 1 to 8."""
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def _is_16_bit_pgm(image: Any) -> bool:
    """Return whether this is a 16-bit PGM, which Pillow opens as 32-bit integers 0..65535."""
    return bool(image.format == "PPM" and image.mode == "I")


def _to_eight_bits(image: Any, is_16_bit: bool) -> Any:
    """Scale 16-bit grey to 8 bits. Pillow's own conversion would clip every value above 255."""
    if not is_16_bit:
        return image
    return _pillow().fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))


def _lay_over_background(image: Any, background: int) -> Any:
    """Lay transparent pixels over the background: the network must not see their hidden colours."""
    from PIL import Image as Pil

    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    return Pil.alpha_composite(Pil.new("RGBA", rgba.size, (background, background, background, 255)), rgba)


def resize_to_fit(image: Any, size: HeightWidth, settings: ImageSettings, resampling: int | None = None) -> Any:
    """Fit a Pillow image to `size`, bilinear by default."""
    from PIL import Image as Pil
    from PIL import ImageOps

    resampling = Pil.Resampling.BILINEAR if resampling is None else resampling
    width_height = (size[1], size[0])
    if image.size == width_height and (settings.fit != "crop" or settings.crop_pct == 1):
        return image
    if settings.fit == "crop":
        return _crop_middle(image, size, settings.crop_pct, resampling)
    if settings.fit == "pad":
        colour = settings.background if image.mode == "L" else (settings.background,) * 3
        return ImageOps.pad(image, width_height, resampling, color=colour)
    return image.resize(width_height, resampling)


def compute_view(image_size: HeightWidth, size: HeightWidth, settings: ImageSettings) -> View:
    """The view of an image in the network's input. Raises ImageRefusedError if it is too elongated for `fit: crop`."""
    (height, width), (new_height, new_width) = image_size, size
    if settings.fit == "crop" and (image_size != size or settings.crop_pct != 1):
        new_height, new_width = _size_before_crop(image_size, size, settings.crop_pct)
        top, left = round((new_height - size[0]) / 2), round((new_width - size[1]) / 2)
        return View(image_size, new_width / width, new_height / height, -left, -top)
    if settings.fit == "pad":  # with the roundings of Pillow's ImageOps.pad
        if width * size[0] > height * size[1]:
            new_height = round(height / width * new_width)
        elif width * size[0] < height * size[1]:
            new_width = round(width / height * new_height)
        left, top = round((size[1] - new_width) * 0.5), round((size[0] - new_height) * 0.5)
        return View(image_size, new_width / width, new_height / height, left, top)
    return View(image_size, new_width / width, new_height / height)


def _crop_middle(image: Any, size: HeightWidth, fraction: float, resampling: int) -> Any:
    """Resize an image so that `size` is `fraction` of it in the tighter direction, and crop `size` from its middle.

    Rounds as torchvision's Resize and CenterCrop do, so that torchvision's weights reach their published accuracy.
    """
    height, width = size
    new_height, new_width = _size_before_crop((image.height, image.width), size, fraction)
    resized = image.resize((new_width, new_height), resampling)
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    return resized.crop((left, top, left + width, top + height))


def _size_before_crop(image_size: HeightWidth, size: HeightWidth, fraction: float) -> HeightWidth:
    """Height and width to resize an image of `image_size` to, before `size` is cropped from its middle."""
    (height, width), (new_height, new_width) = image_size, (round(size[0] / fraction), round(size[1] / fraction))
    if width * new_height >= height * new_width:
        new_width = max(new_width, int(new_height * width / height))
    else:
        new_height = max(new_height, int(new_width * height / width))
    if new_width * new_height > MAX_PIXELS:
        raise ImageRefusedError(f"{width}x{height} pixels: too elongated for `fit: crop`; use `fit: pad` or `stretch`")
    return new_height, new_width
