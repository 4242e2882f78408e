"""The gate for picture files: bounded, explicit about every kind of pixel, and never touching the user's files.

Accepted by content, not by name: JPEG, PNG, BMP, WEBP, PGM/PPM. Rules: EXIF rotation is applied; transparency is laid
over `background`; 16-bit grey is scaled by 1/257; CMYK, palette, 1-bit and grey are converted; what has no agreed
range (32-bit, float) and what moves (animations) is refused. A picture is decoded whole, so a cut file is found.
"""

from __future__ import annotations

import stat
import struct
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from cnnrun.contracts import Pair
from cnnrun.errors import DataError, printable
from cnnrun.spec import SizePair, Spec

FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "PPM"]
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".pgm", ".ppm"}
MAX_BYTES = 64 << 20
MAX_PIXELS = 50_000_000
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L"}

Channels = Literal[1, 3]


class Image(Spec):
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
    mean: list[float] | None = None
    """What the network subtracts from each channel (pixel values 0..255); by default measured on the training split."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """What it divides each channel by; by default measured on the training split."""

    @field_validator("size")
    @classmethod
    def _bounded(cls, size: Pair | None) -> Pair | None:
        if size is not None and size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        return size


def load(path: Path, size: Pair, channels: int, image: Image) -> NDArray[np.uint8]:
    """The picture file as uint8 [H, W, C]. Raises DataError that names the file and what is wrong with it."""
    from PIL import Image as Pil
    from PIL import UnidentifiedImageError

    try:
        _check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pil.DecompressionBombWarning)
            with Pil.open(path, formats=FORMATS) as opened:
                return _pixels(opened, size, channels, image)
    except _Refused as refused:
        raise DataError(f"{printable(str(path))}: {refused}") from None
    except UnidentifiedImageError:
        raise DataError(f"{printable(str(path))}: not a picture ({_looks_like(path)})") from None
    except (Pil.DecompressionBombWarning, Pil.DecompressionBombError):
        raise DataError(f"{printable(str(path))}: more than {MAX_PIXELS:,} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{printable(str(path))}: cannot be decoded: {printable(reason)}") from None


def resize(pixels: NDArray[np.uint8], size: Pair, channels: int, image: Image) -> NDArray[np.uint8]:
    """A decoded uint8 [H, W, C] as `load` would give it: the same conversion and the same resampling."""
    from PIL import Image as Pil

    shaped = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return _pixels(Pil.fromarray(shaped), size, channels, image)


class _Refused(Exception):
    pass


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _Refused("not a regular file")
    if status.st_size == 0:
        raise _Refused("empty file")
    if status.st_size > MAX_BYTES:
        raise _Refused(f"{status.st_size:,} bytes; at most {MAX_BYTES:,}")


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    return f"accepted: {', '.join(FORMATS)}"


def _pixels(opened: Any, size: Pair, channels: int, image: Image) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if opened.width * opened.height > MAX_PIXELS:
        raise _Refused(f"{opened.width}x{opened.height} pixels; at most {MAX_PIXELS:,}")
    if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":  # a phone's JPEG with a preview inside
        raise _Refused("an animation; give single pictures")
    if opened.mode not in _MODES and not _is_wide_pgm(opened):
        raise _Refused(f"pixels of kind {opened.mode!r} have no agreed range; save it as 8 or 16 bit")
    opened.load()
    eight = _eight_bits(opened, opened.mode.startswith("I;16") or _is_wide_pgm(opened))
    flat = _over_background(ImageOps.exif_transpose(eight), image.background)
    grey = flat.convert("L" if channels == 1 else "RGB")
    fitted = _fitted(grey, size, image)
    pixels = np.asarray(fitted, dtype=np.uint8)
    return pixels[:, :, None] if channels == 1 else pixels


def _is_wide_pgm(picture: Any) -> bool:
    """Whether this is a 16-bit PGM, which Pillow opens as 32-bit integers 0..65535."""
    return bool(picture.format == "PPM" and picture.mode == "I")


def _eight_bits(picture: Any, wide: bool) -> Any:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would cut every value above 255."""
    from PIL import Image as Pil

    if not wide:
        return picture
    narrow = Pil.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8))
    narrow.info = picture.info  # EXIF's rotation among it
    return narrow


def _over_background(picture: Any, background: int) -> Any:
    """Transparent pixels shown over the background; their hidden colours must not reach the network."""
    from PIL import Image as Pil

    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in picture.info:
        return picture
    seen = picture.convert("RGBA")
    return Pil.alpha_composite(Pil.new("RGBA", seen.size, (background, background, background, 255)), seen)


def _fitted(picture: Any, size: Pair, image: Image) -> Any:
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


def _middle(picture: Any, size: Pair, part: float) -> Any:
    """The picture so small that `size` is `part` of it in the tighter direction, and `size` cut from its middle.

    With the roundings of torchvision's Resize and CenterCrop, so that its weights see what they were measured on.
    """
    from PIL import Image as Pil

    (height, width), (tall, wide) = size, (round(size[0] / part), round(size[1] / part))
    if picture.width * tall >= picture.height * wide:
        wide = max(wide, int(tall * picture.width / picture.height))
    else:
        tall = max(tall, int(wide * picture.height / picture.width))
    small = picture.resize((wide, tall), Pil.Resampling.BILINEAR)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return small.crop((left, top, left + width, top + height))
