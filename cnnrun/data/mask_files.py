"""Reading of mask files: one value per pixel, grey or by a palette, fitted to the network's input as images are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN
from cnnrun.data.image_files import open_image
from cnnrun.data.image_geometry import DecodedImage, resize_to_fit, turn_upright, upright_size
from cnnrun.data.image_settings import ImageRefusedError, ImageSettings

_PNG_START = b"\x89PNG\r\n\x1a\n"
_SCALE_OF_BIT_DEPTH = {2: 85, 4: 17}  # Pillow scales the grey values of such PNG files to 0..255


def read_mask_values(image: Any, orientation: int, data: bytes) -> NDArray[np.uint8]:
    """The grey values or palette indices of an opened mask, uint8 [H, W]. Call it within `image_errors`."""
    if image.mode not in ("1", "L", "P"):
        raise ImageRefusedError(f"a mask needs grey values of 8 bits, or a palette; it has {image.mode}")
    values = np.asarray(turn_upright(image, orientation)).astype(np.uint8)
    if image.mode == "L" and data.startswith(_PNG_START):
        values //= _SCALE_OF_BIT_DEPTH.get(data[24], 1)
    return values


def decode_mask(data: bytes, class_of_value: Sequence[int], settings: ImageSettings) -> DecodedImage:
    """Decode a mask of grey values or palette indices to class indices. Call it within `image_errors`."""
    from PIL import Image as Pil

    with open_image(data, settings) as (image, orientation):
        values = read_mask_values(image, orientation, data)
        classes = np.asarray(class_of_value, np.uint8)[values]
        if UNKNOWN in classes:
            value = int(values[classes == UNKNOWN].min())
            raise ImageRefusedError(
                f"the mask has the value {value}, which is neither in source.masks.values nor in ignore"
            )
        size = upright_size(image, orientation)
        return DecodedImage((Pil.fromarray(classes),), size, image.format, image.mode, orientation)


def fit_mask(decoded: DecodedImage, size: HeightWidth, settings: ImageSettings) -> NDArray[np.uint8]:
    """Fit a mask as `fit_image` fits its image, by nearest pixels: uint8 [H, W, 1]; padding is ignored."""
    from PIL import Image as Pil

    ignoring = settings.model_copy(update={"background": IGNORED})
    (mask,) = resize_to_fit(decoded, size, ignoring, Pil.Resampling.NEAREST)
    return np.asarray(mask, dtype=np.uint8)[:, :, None]
