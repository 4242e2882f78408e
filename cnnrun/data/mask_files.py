"""Reading of mask files: a value or a colour per pixel, fitted to the network's input as images are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.drawn_masks import DrawnMask
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.source import Masks
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN
from cnnrun.data.image_files import open_image
from cnnrun.data.image_geometry import DecodedImage, resize_to_fit, turn_upright, upright_size
from cnnrun.data.image_settings import ImageRefusedError, ImageSettings
from cnnrun.data.mask_drawing import draw_mask

_PNG_START = b"\x89PNG\r\n\x1a\n"
_SCALE_OF_BIT_DEPTH = {2: 85, 4: 17}  # Pillow scales the grey values of such PNG files to 0..255


def read_mask_values(image: Any, orientation: int, data: bytes) -> NDArray[np.uint8]:
    """The grey values or palette indices of an opened mask, uint8 [H, W]. Call it within `image_errors`."""
    if image.mode not in ("1", "L", "P"):
        colours = "; give source.masks.colours" if image.mode in ("RGB", "RGBA") else ""
        raise ImageRefusedError(f"a mask needs grey values of 8 bits, or a palette; it has {image.mode}{colours}")
    values = np.asarray(turn_upright(image, orientation)).astype(np.uint8)
    if image.mode == "L" and data.startswith(_PNG_START):
        values //= _SCALE_OF_BIT_DEPTH.get(data[24], 1)
    return values


def read_mask_colours(image: Any, orientation: int) -> NDArray[np.int64]:
    """The colours 0xRRGGBB of an opened mask, [H, W]. Call it within `image_errors`."""
    if image.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise ImageRefusedError(f"a mask of colours needs RGB of 8 bits; it has {image.mode}")
    channels = np.asarray(turn_upright(image.convert("RGB"), orientation)).astype(np.int64)
    return channels[:, :, 0] << 16 | channels[:, :, 1] << 8 | channels[:, :, 2]


def format_colour(colour: int) -> str:
    """A colour 0xRRGGBB as in HTML."""
    return f"#{colour:06x}"


def _classes_of_colours(colours_HW: NDArray[np.int64], class_of_colour: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """The class of each pixel. Raises ImageRefusedError for a colour that is no class."""
    known, classes = np.array(sorted(class_of_colour)).T
    position = np.searchsorted(known, colours_HW).clip(max=len(known) - 1)
    if len(unknown := colours_HW[known[position] != colours_HW]):
        colour = format_colour(int(unknown.min()))
        raise ImageRefusedError(
            f"the mask has the colour {colour}, which is neither in source.masks.colours nor in ignore"
        )
    classes_HW: NDArray[np.uint8] = classes.astype(np.uint8)[position]
    return classes_HW


def _classes_of_values(values_HW: NDArray[np.uint8], class_of_value: Sequence[int]) -> NDArray[np.uint8]:
    """The class of each pixel. Raises ImageRefusedError for a value that is no class."""
    classes_HW = np.asarray(class_of_value, np.uint8)[values_HW]
    if UNKNOWN in classes_HW:
        value = int(values_HW[classes_HW == UNKNOWN].min())
        raise ImageRefusedError(
            f"the mask has the value {value}, which is neither in source.masks.values nor in ignore"
        )
    return classes_HW


def decode_drawn_mask(mask: DrawnMask) -> DecodedImage:
    """Draw a mask as if it were decoded from a file."""
    from PIL import Image as Pil

    classes = draw_mask(mask)
    return DecodedImage((Pil.fromarray(classes),), (classes.shape[0], classes.shape[1]), "", "L", 1)


def decode_mask(data: bytes, masks: Masks, settings: ImageSettings) -> DecodedImage:
    """Decode a mask of grey values, palette indices or colours to class indices. Call it within `image_errors`."""
    from PIL import Image as Pil

    with open_image(data, settings) as (image, orientation):
        if masks.class_of_colour:
            classes = _classes_of_colours(read_mask_colours(image, orientation), masks.class_of_colour)
        else:
            classes = _classes_of_values(read_mask_values(image, orientation, data), masks.class_of_value)
        size = upright_size(image, orientation)
        return DecodedImage((Pil.fromarray(classes),), size, image.format, image.mode, orientation)


def fit_mask(decoded: DecodedImage, size: HeightWidth, settings: ImageSettings) -> NDArray[np.uint8]:
    """Fit a mask as `fit_image` fits its image, by nearest pixels: uint8 [H, W, 1]; padding is ignored."""
    from PIL import Image as Pil

    ignoring = settings.model_copy(update={"background": IGNORED})
    (mask,) = resize_to_fit(decoded, size, ignoring, Pil.Resampling.NEAREST)
    return np.asarray(mask, dtype=np.uint8)[:, :, None]
