"""Reading of image files: decoded within size limits, converted by fixed rules, and fitted to the network's input.

JPEG, PNG, BMP, WEBP, PGM/PPM, TIFF, AVIF and GIF are accepted, and HEIC with the package pi-heif, by content and not by
name. EXIF rotation is applied, transparency is laid over `background`, 16-bit grey is scaled by 1/257, and CMYK,
palette, 1-bit and grey images are converted. Pixels without an agreed range (32-bit, float), animations and files of
several pages are refused. Images of other channels than 1 and 3, and those that keep 16 bits, are read as planes
(image_planes.py). Images are decoded to the end, so that truncated files are found.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import ConfigError, DataError, UnreadableFileError, escape
from cnnrun.base.extras import missing_package
from cnnrun.base.file_sequences import Member
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.results import View
from cnnrun.data.image_geometry import (
    SCALABLE_FORMATS,
    DecodedImage,
    compute_view,
    fit_image,
    is_orientation,
    scale_while_decoding,
    turn_upright,
    upright_size,
)
from cnnrun.data.image_planes import (
    Planes,
    PlanesHeader,
    decode_planes,
    deep_pnm_header,
    has_deep_colour,
    is_npy,
    is_read_whole,
    is_tiff,
    planes_of_image,
    read_npy_planes,
    read_npy_shape,
    read_png_planes,
    read_pnm_planes,
    read_tiff_planes,
    read_tiff_shape,
)
from cnnrun.data.image_settings import MAX_PIXELS, ImageRefusedError, ImageSettings, ReaderMissingError

FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "AVIF", "GIF"]
MAX_BYTES = 64 << 20
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}

_GREY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"}
_ORIENTATION_TAG = 0x0112  # of EXIF
_ATTEMPTS = 3
_DECODER_ERRORS = (ValueError, SyntaxError, TypeError, LookupError, ArithmeticError)  # of Pillow, for damaged files


def to_network_batch(images_HWC: Sequence[NDArray[Any]], settings: ImageSettings, device: torch.device) -> Tensor:
    """Stack fitted images to pixel values 0..255, float32 [B, C, H, W], on a device."""
    pixels = torch.from_numpy(np.stack(images_HWC)).to(device).permute(0, 3, 1, 2)
    return settings.pixel_format.to_network(pixels).float()


def load_with_view(path: Path, size: HeightWidth, channels: int, settings: ImageSettings) -> tuple[NDArray[Any], View]:
    """Read an image file as [H, W, C] of its pixel format, and its `View` in the network's input.

    Raises DataError with the file's name and the problem.
    """
    with image_errors(str(path)):
        decoded = decode_image(read_image_bytes(path), channels, settings, size)
        return fit_image(decoded, size, settings), compute_view(decoded.size, size, settings)


@contextmanager
def open_image(data: bytes, settings: ImageSettings) -> Iterator[tuple[Any, int]]:
    """The Pillow image of a file's bytes, as stored, and EXIF's orientation. Use it within `image_errors`.

    A JPEG is decoded when its pixels are used, so that it can be made smaller before.
    """
    with _pillow().open(BytesIO(data), formats=_known_formats()) as image:
        _check_header(image, settings)
        if image.format not in SCALABLE_FORMATS:
            image.load()  # the orientation of a PNG may stand behind its pixels
        yield image, _read_orientation(image)


def decode_image(data: bytes, channels: int, settings: ImageSettings, size: HeightWidth | None = None) -> DecodedImage:
    """Decode the whole image in a file's bytes. Call it within `image_errors`.

    With `size`, the network's input, a JPEG that is much larger is made smaller while it is decoded.
    """
    if settings.pixel_format.is_deep or channels not in (1, 3) or not _is_known_to_pillow(data):
        planes = read_planes(data, channels, settings)
        stored_size = planes.pixels_HWP.shape[:2]
        _check_sides(stored_size[1], stored_size[0], settings)
        original_size = stored_size[::-1] if planes.orientation > 4 else stored_size
        return decode_planes(planes, channels, settings, original_size)
    with open_image(data, settings) as (image, orientation):
        original_size = upright_size(image, orientation)
        box = scale_while_decoding(image, orientation, size, settings) if size else None
        image.load()
        is_16_bit = image.mode.startswith("I;16") or _is_16_bit_pgm(image)
        peak = int(np.asarray(image).max()) if is_16_bit else 0
        opaque = _lay_over_background(turn_upright(_to_eight_bits(image, is_16_bit), orientation), settings.background)
        converted = opaque.convert("L" if channels == 1 else "RGB")
        return DecodedImage((converted,), original_size, image.format, image.mode, orientation, peak, box)


def read_image_header(data: bytes) -> PlanesHeader:
    """Size, channels and bits of an image, of which grey images have one channel. Call it within `image_errors`."""
    if is_npy(data):
        return read_npy_shape(data)
    if not _is_known_to_pillow(data):
        return read_tiff_shape(data)
    with _pillow().open(BytesIO(data), formats=_known_formats()) as image:
        if image.format == "TIFF" and not is_read_whole(image):
            with contextlib.suppress(ImageRefusedError, ReaderMissingError):  # then as Pillow reads it
                return read_tiff_shape(data)
        is_grey = image.mode in _GREY_MODES or _is_16_bit_pgm(image)
        is_deep = image.mode.startswith("I") or has_deep_colour(data) or deep_pnm_header(data) is not None
        return PlanesHeader(upright_size(image, _read_orientation(image)), 1 if is_grey else 3, is_deep)


def image_from_pixels(pixels: NDArray[Any], channels: int, settings: ImageSettings) -> DecodedImage:
    """Make a `DecodedImage` of pixels [H, W, C], uint8 or uint16, that are in memory already."""
    size = (pixels.shape[0], pixels.shape[1])
    if settings.pixel_format.is_deep or pixels.dtype != np.uint8 or {channels, pixels.shape[2]} - {1, 3}:
        return decode_planes(Planes(pixels, "", ""), channels, settings, size)
    image = _pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return DecodedImage((image.convert("L" if channels == 1 else "RGB"),), size, "", image.mode, 1)


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
    except ReaderMissingError as missing_reader:  # no fault of the data, so that `bad_files: skip` must not hide it
        raise ConfigError(f"{escape(name)}: {missing_reader}") from None
    except UnidentifiedImageError:
        missing = missing_package("pi_heif", "heic", "HEIC") if name.lower().endswith((".heic", ".heif")) else None
        if missing:
            raise ConfigError(f"{escape(name)}: {missing}") from None
        raise data_error(f"not an image (accepted: {', '.join(FORMATS)})") from None
    except (Pil.DecompressionBombWarning, Pil.DecompressionBombError):
        raise data_error(f"more than {MAX_PIXELS:,} pixels") from None
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise data_error(f"cannot be decoded: {escape(error.strerror or str(error))}") from None
        raise UnreadableFileError(f"{escape(name)}: cannot be read: {escape(str(error.strerror))}") from None
    except RuntimeError as error:  # of a decoder; PyTorch's are not raised here
        raise data_error(f"cannot be decoded: {escape(str(error))}") from None
    except (*_DECODER_ERRORS, EOFError, struct.error) as error:
        raise data_error(f"cannot be decoded: {escape(str(error))}") from None


def read_planes(data: bytes, channels: int, settings: ImageSettings) -> Planes:
    """Read an image file with all its channels and bits. Call it within `image_errors`."""
    if is_npy(data):
        return read_npy_planes(data, channels)
    if not _is_known_to_pillow(data):
        return read_tiff_planes(data)
    if header := deep_pnm_header(data):
        return read_pnm_planes(data, header)
    with _pillow().open(BytesIO(data), formats=_known_formats()) as image:
        if image.format == "TIFF" and not is_read_whole(image):
            return read_tiff_planes(data)
        _check_header(image, settings)
        image.load()
        orientation = _read_orientation(image)
        return (
            read_png_planes(data, orientation)
            if has_deep_colour(data)
            else planes_of_image(image, orientation, channels)
        )


def _is_known_to_pillow(data: bytes) -> bool:
    """Return whether a file is no NumPy array, and no TIFF file of channels that Pillow does not know."""
    if not is_tiff(data):
        return not is_npy(data)
    try:
        with _pillow().open(BytesIO(data), formats=_known_formats()):
            return True
    except _pillow().UnidentifiedImageError:
        return False


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
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # an error of ours names the file
    warnings.filterwarnings("error", category=Pil.DecompressionBombWarning)
    return Pil


@cache
def _known_formats() -> list[str]:
    """The accepted formats that Pillow can read here: AVIF only if it was built with it, HEIF only with `pi-heif`."""
    Pil = _pillow()
    Pil.init()
    with contextlib.suppress(ImportError):
        import pi_heif

        pi_heif.register_heif_opener()
    return [name for name in [*FORMATS, "HEIF"] if name in Pil.OPEN]


def _check_sides(width: int, height: int, settings: ImageSettings) -> None:
    if min(width, height) < settings.min_side:
        least = f"at least {settings.min_side} a side (data.image.min_side)"
        raise ImageRefusedError(f"{width}x{height} pixels; {least}")


def _check_header(image: Any, settings: ImageSettings) -> None:
    """Raise ImageRefusedError if size, frames or mode of an image are not accepted."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageRefusedError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,}")
    _check_sides(image.width, image.height, settings)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a preview inside
        frames = "several pages" if image.format == "TIFF" else "an animation"
        raise ImageRefusedError(f"{frames}; give single images")
    if image.mode not in _MODES and not _is_16_bit_pgm(image):
        raise ImageRefusedError(f"pixels of kind {image.mode!r} have no agreed range; save it as 8 or 16 bit")


def _read_orientation(image: Any) -> int:
    """EXIF's orientation, 1 to 8, or 0 if EXIF cannot be read. Of a TIFF file it is 1: Pillow turns those itself."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, struct.error):
        return 0
    return value if is_orientation(value) else 0


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
