"""The gate for picture files: bounded, explicit about every kind of pixel, and never touching the user's files.

Accepted by content, not by name: JPEG, PNG, BMP, WEBP, PGM/PPM. Rules: EXIF rotation is applied; transparency is laid
over `background`; 16-bit grey is scaled by 1/257; CMYK, palette, 1-bit and grey are converted; what has no agreed
range (32-bit, float) and what moves (animations) is refused. A picture is decoded whole, so a cut file is found.
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
from cnnrun.base.file_sequences import Member, is_clutter
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
_ORIENTATION = 0x0112
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_ATTEMPTS = 3

Channels = Literal[1, 3]


class ImageSettings(Spec):
    """What the network sees of a picture."""

    size: SizePair | None = None
    """Height and width in pixels; by default the source's own, where all its pictures have one."""
    channels: Channels | None = None
    """1 for grey, 3 for colour; by default the source's own."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """How another shape becomes `size`: stretched, its middle cropped, or padded with `background`."""
    crop_pct: float = Field(1.0, gt=0, le=1)
    """The part of each side that `fit: crop` keeps: with 0.875, 224 pixels are cut from a picture made 256 small."""
    background: int = Field(255, ge=0, le=255)
    """The grey value behind transparent pixels and around padded pictures."""
    min_side: int = Field(4, ge=1)
    """A picture with a shorter side, in pixels, is refused."""
    mean: list[float] | None = None
    """What the network subtracts from each channel (pixel values 0..255); by default measured on the training split."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """What it divides each channel by; by default measured on the training split."""

    @field_validator("size")
    @classmethod
    def _bounded(cls, size: HeightWidth | None) -> HeightWidth | None:
        if size is not None and size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        return size


@dataclass(frozen=True)
class DecodedImage:
    """A decoded picture: upright, over the background, in the network's channels, at its own size.

    `orientation` is EXIF's, 0 where EXIF cannot be read; `peak` the largest value of a picture of 16 bits, else 0.
    """

    pillow_image: Any
    format: str
    mode: str
    orientation: int
    peak: int = 0


def is_image_name(name: str) -> bool:
    """Return whether a file's name says that it is a picture of ours: its suffix, in any case, and no clutter."""
    return not is_clutter(name) and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def load_image(path: Path, size: HeightWidth, channels: int, image: ImageSettings) -> NDArray[np.uint8]:
    """The picture file as uint8 [H, W, C]. Raises DataError that names the file and what is wrong with it."""
    return load_with_view(path, size, channels, image)[0]


def load_with_view(
    path: Path, size: HeightWidth, channels: int, image: ImageSettings
) -> tuple[NDArray[np.uint8], View]:
    """As `load_image`, and the picture's view."""
    with image_errors(str(path)):
        picture = decode_image(read_image_bytes(path), channels, image).pillow_image
        return fit_image(picture, size, image), compute_view((picture.height, picture.width), size, image)


def decode_image(data: bytes, channels: int, image: ImageSettings) -> DecodedImage:
    """The picture in a file's bytes, decoded whole. To be called within `image_errors`."""
    with _pillow().open(BytesIO(data), formats=FORMATS) as picture:
        _check(picture, image)
        picture.load()
        orientation = _orientation(picture)
        wide = picture.mode.startswith("I;16") or _is_wide_pgm(picture)
        peak = int(np.asarray(picture).max()) if wide else 0
        flat = _over_background(_upright(_eight_bits(picture, wide), orientation), image.background)
        return DecodedImage(
            flat.convert("L" if channels == 1 else "RGB"), picture.format, picture.mode, orientation, peak
        )


def read_image_header(data: bytes) -> tuple[HeightWidth, bool]:
    """Height and width of the upright picture, and whether it is grey, without decoding it. Within `image_errors`."""
    with _pillow().open(BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
        turned = _orientation(picture) > 4  # the transpositions that swap the sides
        grey = picture.mode in _GREY_MODES or _is_wide_pgm(picture)
        return ((width, height) if turned else (height, width)), grey


def image_from_pixels(pixels: NDArray[np.uint8], channels: int) -> DecodedImage:
    """As `decode_image`, for pixels [H, W, C] that were decoded already."""
    picture = _pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return DecodedImage(picture.convert("L" if channels == 1 else "RGB"), "", picture.mode, 1)


def fit_image(picture: Any, size: HeightWidth, image: ImageSettings) -> NDArray[np.uint8]:
    """An opened picture as the network sees it: uint8 [H, W, C]."""
    pixels: NDArray[np.uint8] = np.asarray(_fitted(picture, size, image), dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_image_bytes(item: Path | str | Member, expected: tuple[int, int] | None = None) -> bytes:
    """The bytes of a picture file or a shard's member, within bounds.

    `expected` is the file's (size, time in ns) when it was listed; another now is refused. A disk that fails or a
    stale network handle is tried three times. To be called within `image_errors`.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _read(item, expected)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.05 * 4**attempt)
    raise AssertionError("unreachable")


def _read(item: Path | str | Member, expected: tuple[int, int] | None) -> bytes:
    path, offset = (item.shard, item.offset) if isinstance(item, Member) else (item, 0)
    # Not to wait for what is no file (a pipe); what was opened is what is looked at.
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
    if what := _mistaken(data):
        raise ImageRefusedError(f"not a picture ({what})")
    return data


class ImageRefusedError(Exception):
    """Why a picture cannot be used; `image_errors` says which."""


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong with a picture inside, as a DataError of one line that begins with its name."""
    from PIL import UnidentifiedImageError

    Pil = _pillow()

    def line(text: str) -> DataError:
        return DataError(f"{escape(name)}: {text}")

    try:
        yield
    except ImageRefusedError as refused:
        raise line(str(refused)) from None
    except UnidentifiedImageError:
        raise line(f"not a picture (accepted: {', '.join(FORMATS)})") from None
    except (Pil.DecompressionBombWarning, Pil.DecompressionBombError):
        raise line(f"more than {MAX_PIXELS:,} pixels") from None
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise line(f"cannot be decoded: {escape(error.strerror or str(error))}") from None
        raise UnreadableFileError(f"{escape(name)}: cannot be read: {escape(str(error.strerror))}") from None
    except (ValueError, SyntaxError, EOFError, struct.error) as error:
        raise line(f"cannot be decoded: {escape(str(error))}") from None


def _mistaken(data: bytes) -> str | None:
    """What a file is that only has a picture's name, where that can be told."""
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    return "a web page" if data[:64].lstrip().lower().startswith((b"<!doctype", b"<html")) else None


@cache
def _pillow() -> Any:
    """Pillow, told once that a picture of too many pixels is an error and no warning, and broken EXIF neither."""
    from PIL import Image as Pil

    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("error", category=Pil.DecompressionBombWarning)
    return Pil


def _check(picture: Any, image: ImageSettings) -> None:
    """What the header alone says against a picture."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageRefusedError(f"{picture.width}x{picture.height} pixels; at most {MAX_PIXELS:,}")
    if min(picture.size) < image.min_side:
        raise ImageRefusedError(
            f"{picture.width}x{picture.height} pixels; at least {image.min_side} a side (image.min_side)"
        )
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's JPEG with a preview inside
        raise ImageRefusedError("an animation; give single pictures")
    if picture.mode not in _MODES and not _is_wide_pgm(picture):
        raise ImageRefusedError(f"pixels of kind {picture.mode!r} have no agreed range; save it as 8 or 16 bit")


def _orientation(picture: Any) -> int:
    """EXIF's orientation, 1 to 8; 0 where EXIF is there and cannot be read."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, struct.error):
        return 0
    return value if value in _UPRIGHT or value == 1 else 0


def _upright(picture: Any, orientation: int) -> Any:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _is_wide_pgm(picture: Any) -> bool:
    """Whether this is a 16-bit PGM, which Pillow opens as 32-bit integers 0..65535."""
    return bool(picture.format == "PPM" and picture.mode == "I")


def _eight_bits(picture: Any, wide: bool) -> Any:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would cut every value above 255."""
    if not wide:
        return picture
    return _pillow().fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))


def _over_background(picture: Any, background: int) -> Any:
    """Transparent pixels shown over the background; their hidden colours must not reach the network."""
    from PIL import Image as Pil

    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    seen = picture.convert("RGBA")
    return Pil.alpha_composite(Pil.new("RGBA", seen.size, (background, background, background, 255)), seen)


def _fitted(picture: Any, size: HeightWidth, image: ImageSettings) -> Any:
    from PIL import Image as Pil
    from PIL import ImageOps

    width_height = (size[1], size[0])
    if picture.size == width_height and (image.fit != "crop" or image.crop_pct == 1):
        return picture
    if image.fit == "crop":
        return _middle(picture, size, image.crop_pct)
    if image.fit == "pad":
        colour = image.background if picture.mode == "L" else (image.background,) * 3
        return ImageOps.pad(picture, width_height, Pil.Resampling.BILINEAR, color=colour)
    return picture.resize(width_height, Pil.Resampling.BILINEAR)


def compute_view(own: HeightWidth, size: HeightWidth, image: ImageSettings) -> View:
    """Where in the network's picture of `size` the pixels of a picture of its `own` size lie. Raises Refused."""
    (height, width), (tall, wide) = own, size
    if image.fit == "crop" and (own != size or image.crop_pct != 1):
        tall, wide = _cut_from(own, size, image.crop_pct)
        top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
        return View(own, wide / width, tall / height, -left, -top)
    if image.fit == "pad":  # with the roundings of Pillow's ImageOps.pad
        if width * size[0] > height * size[1]:
            tall = round(height / width * wide)
        elif width * size[0] < height * size[1]:
            wide = round(width / height * tall)
        left, top = round((size[1] - wide) * 0.5), round((size[0] - tall) * 0.5)
        return View(own, wide / width, tall / height, left, top)
    return View(own, wide / width, tall / height)


def _middle(picture: Any, size: HeightWidth, part: float) -> Any:
    """The picture so small that `size` is `part` of it in the tighter direction, and `size` cut from its middle.

    With the roundings of torchvision's Resize and CenterCrop, so that its weights see what they were measured on.
    """
    from PIL import Image as Pil

    (height, width), (tall, wide) = size, _cut_from((picture.height, picture.width), size, part)
    small = picture.resize((wide, tall), Pil.Resampling.BILINEAR)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return small.crop((left, top, left + width, top + height))


def _cut_from(own: HeightWidth, size: HeightWidth, part: float) -> HeightWidth:
    """Height and width of the picture from whose middle `size` is cut."""
    (height, width), (tall, wide) = own, (round(size[0] / part), round(size[1] / part))
    if width * tall >= height * wide:
        wide = max(wide, int(tall * width / height))
    else:
        tall = max(tall, int(wide * height / width))
    if wide * tall > MAX_PIXELS:
        raise ImageRefusedError(f"{width}x{height} pixels: far from the shape that `fit: crop` cuts from it")
    return tall, wide
