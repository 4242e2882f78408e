"""Geometry of images in the network's input: scaled, cropped or padded, and the view of the original in the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.pixels import EIGHT_BITS, PixelFormat
from cnnrun.contracts.results import View
from cnnrun.data.image_settings import MAX_PIXELS, ImageRefusedError, ImageSettings

SCALABLE_FORMATS = ("JPEG", "MPO")  # whose decoder can make the image smaller
# EXIF's orientations, and Pillow's transposition that undoes each.
_TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_RIGHT_BECOMES_LEFT, _BOTTOM_BECOMES_TOP = {2, 3, 6, 7}, {3, 4, 7, 8}
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where at least this many times the final size is left: the resizing
# that follows then hides the difference to the full size (tests/data/test_image_geometry.py).
_SIZE_RESERVE = 2

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: upright, over the background, in the network's channels.

    `pillow_images` is one image of 8 bits, grey or RGB; for other channels, and for 16 bits, it is an image for each
    channel. `size` is the file's height and width, upright. If the decoder made the image smaller, `box` (left, upper,
    right, lower) is the part of it that the original covers. `orientation` is EXIF's value, 0 if EXIF cannot be read.
    `peak` is the largest value of a 16-bit image, else 0.
    """

    pillow_images: tuple[Any, ...]
    size: HeightWidth
    format: str
    mode: str
    orientation: int
    peak: int = 0
    box: Box | None = None
    pixel_format: PixelFormat = EIGHT_BITS

    def values(self) -> Tensor:
        """The pixel values 0..255 at the decoded size, float32 [C, H, W]."""
        pixels = np.stack([np.asarray(image) for image in self.pillow_images])
        pixels_CHW = pixels[0].transpose(2, 0, 1) if pixels.ndim == 4 else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels_CHW)).float() / self.pixel_format.levels_per_grey


def is_orientation(value: Any) -> bool:
    """Return whether a value is one of EXIF's orientations, 1 to 8."""
    return value == 1 or value in _TRANSPOSITIONS


def upright_size(image: Any, orientation: int) -> HeightWidth:
    """Height and width of a Pillow image once EXIF's orientation is undone."""
    width, height = image.size
    return (width, height) if orientation > 4 else (height, width)


def turn_upright(image: Any, orientation: int) -> Any:
    """Undo EXIF's orientation, 1 to 8."""
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def scale_while_decoding(image: Any, orientation: int, size: HeightWidth, settings: ImageSettings) -> Box | None:
    """Set the decoder of an opened JPEG to halve its sides, up to three times, as far as an input of `size` allows.

    Returns the part of the upright image that the original covers, which may end within the last row and column; None
    if nothing is scaled.
    """
    if image.format not in SCALABLE_FORMATS:
        return None
    original = image.size
    (new_height, new_width), _ = _place(upright_size(image, orientation), size, settings)
    least = (new_width * _SIZE_RESERVE, new_height * _SIZE_RESERVE)
    drafted = image.draft(None, least[::-1] if orientation > 4 else least)
    if drafted is None or image.size == original:
        return None
    _, (_, _, width, height) = drafted
    blank_right, blank_bottom = image.size[0] - width, image.size[1] - height
    if orientation > 4:
        width, height, blank_right, blank_bottom = height, width, blank_bottom, blank_right
    left = blank_right if orientation in _RIGHT_BECOMES_LEFT else 0.0
    top = blank_bottom if orientation in _BOTTOM_BECOMES_TOP else 0.0
    return left, top, left + width, top + height


def fit_image(decoded: DecodedImage, size: HeightWidth, settings: ImageSettings) -> NDArray[Any]:
    """Fit an image to the network's input: [H, W, C] of its pixel format."""
    fitted = [np.asarray(image) for image in resize_to_fit(decoded, size, settings)]
    pixels: NDArray[Any] = fitted[0] if fitted[0].ndim == 3 else np.stack(fitted, 2)
    if pixels.dtype.kind == "f":  # 16 bits, of which Pillow resizes every value only as floating-point numbers
        pixels = np.rint(pixels)
    return pixels.astype(decoded.pixel_format.dtype, copy=False)


def resize_to_fit(
    decoded: DecodedImage, size: HeightWidth, settings: ImageSettings, resampling: int | None = None
) -> list[Any]:
    """Fit an image's Pillow images to `size`, bilinear by default."""
    return [_resize(image, decoded, size, settings, resampling) for image in decoded.pillow_images]


def _resize(
    image: Any, decoded: DecodedImage, size: HeightWidth, settings: ImageSettings, resampling: int | None
) -> Any:
    from PIL import Image as Pil

    height, width = size
    (new_height, new_width), (top, left) = _place(decoded.size, size, settings)
    if image.size != (new_width, new_height):
        resampling = Pil.Resampling.BILINEAR if resampling is None else resampling
        image = image.resize((new_width, new_height), resampling, box=decoded.box)
    if settings.fit == "crop":
        return image.crop((-left, -top, width - left, height - top))
    if image.size == (width, height):
        return image
    colour: Any = {
        "L": settings.background,
        "RGB": (settings.background,) * 3,
        "F": settings.background * decoded.pixel_format.levels_per_grey,
    }[image.mode]
    padded = Pil.new(image.mode, (width, height), colour)
    padded.paste(image, (left, top))
    return padded


def compute_view(image_size: HeightWidth, size: HeightWidth, settings: ImageSettings) -> View:
    """The view of an image in the network's input. Raises ImageRefusedError if it is too elongated for `fit: crop`."""
    (height, width), ((new_height, new_width), (top, left)) = image_size, _place(image_size, size, settings)
    return View(image_size, new_width / width, new_height / height, left, top)


def _place(image_size: HeightWidth, size: HeightWidth, settings: ImageSettings) -> tuple[HeightWidth, HeightWidth]:
    """Size to which an image is resized, and (top, left) of the result in the input, negative where it is cropped."""
    (height, width), (new_height, new_width) = image_size, size
    if settings.fit == "crop" and (image_size != size or settings.crop_pct != 1):
        new_height, new_width = _size_before_crop(image_size, size, settings.crop_pct)
        # Rounded as by torchvision's Resize and CenterCrop, for which its weights' published accuracy holds.
        return (new_height, new_width), (-round((new_height - size[0]) / 2), -round((new_width - size[1]) / 2))
    if settings.fit == "pad":  # with the roundings of Pillow's ImageOps.pad
        if width * size[0] > height * size[1]:
            new_height = max(1, round(height / width * new_width))
        elif width * size[0] < height * size[1]:
            new_width = max(1, round(width / height * new_height))
    return (new_height, new_width), (round((size[0] - new_height) * 0.5), round((size[1] - new_width) * 0.5))


def _size_before_crop(image_size: HeightWidth, size: HeightWidth, fraction: float) -> HeightWidth:
    """Height and width of an image of which `size` is `fraction` in the tighter direction.

    Raises ImageRefusedError if they would be too large.
    """
    (height, width), (new_height, new_width) = image_size, (round(size[0] / fraction), round(size[1] / fraction))
    if width * new_height >= height * new_width:
        new_width = max(new_width, int(new_height * width / height))
    else:
        new_height = max(new_height, int(new_width * height / width))
    if new_width * new_height > MAX_PIXELS:
        raise ImageRefusedError(f"{width}x{height} pixels: too elongated for `fit: crop`; use `fit: pad` or `stretch`")
    return new_height, new_width
