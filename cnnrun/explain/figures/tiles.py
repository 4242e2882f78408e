"""Tensors as small images: feature maps, kernels, signed values, heat maps over an image; and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.pixels import drawn_channels

_GAP, _LINE_HEIGHT = 2, 16  # pixels
_CLIPPED_SHARE = 0.002  # this share of a tile's values, the farthest from 0, is clipped
_DARK, _MIDDLE, _BRIGHT = "#000004", "#bb3754", "#fcffa4"  # three colours of matplotlib's inferno


def scale_to_side(pillow_image: Any, side: int) -> Any:
    """Enlarge a Pillow image by a whole factor to about `side` pixels; shrink it if it is larger than 1.5 x `side`."""
    from PIL import Image as Pil

    if max(pillow_image.size) > (max_side := 3 * side // 2):
        smaller = pillow_image.copy()
        smaller.thumbnail((max_side, max_side))
        return smaller
    factor = max(1, round(side / max(pillow_image.size)))
    return pillow_image.resize((pillow_image.width * factor, pillow_image.height * factor), Pil.Resampling.NEAREST)


def signed_tile(values_CHW: Tensor, side: int = 84) -> Any:
    """Draw signed values: 0 is grey, the farthest from 0 are black or white (or a colour for three channels).

    Of other channels, those that `to_pillow` draws of an image are shown.

    The scale ignores the farthest two in a thousand, so that a single pixel does not leave all others grey.
    """
    from PIL import Image as Pil

    values = values_CHW[drawn_channels(len(values_CHW))].detach().float().cpu().numpy()
    max_value = np.quantile(np.abs(values), 1 - _CLIPPED_SHARE, method="higher") or np.abs(values).max() or 1.0
    pixels = np.rint(127.5 + 127.5 * (values / max_value).clip(-1, 1)).astype(np.uint8)
    if len(pixels) == 3:
        return scale_to_side(Pil.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), side)
    return scale_to_side(Pil.fromarray(pixels[0]), side).convert("RGB")


def grey_tile(values_HW: Tensor, min_value: float, max_value: float, side: int = 84) -> Any:
    """Draw values as shades from black (`min_value`) to white (`max_value`)."""
    return scale_to_side(_to_grey(values_HW, min_value, max_value), side).convert("RGB")


def heat_map(values_HW: Tensor, min_value: float, max_value: float) -> Any:
    """Draw values as colours from black (`min_value`) over red to yellow (`max_value`), one pixel each."""
    from PIL import ImageOps

    return ImageOps.colorize(_to_grey(values_HW, min_value, max_value), black=_DARK, white=_BRIGHT, mid=_MIDDLE)


def overlay_heat_map(pillow_image: Any, values_HW: Tensor, min_value: float = 0.0) -> Any:
    """Draw a map as heat over a Pillow image of the same area, from `min_value` to the map's maximum."""
    from PIL import Image as Pil

    size = (pillow_image.height, pillow_image.width)
    values = F.interpolate(values_HW.detach().float().cpu()[None, None], size, mode="bilinear", align_corners=False)[
        0, 0
    ]
    max_value = max(float(values.max()), min_value + 1e-12)
    mask = _to_grey(values, min_value, max_value).point(lambda shade: 40 + shade * 3 // 5)
    return Pil.composite(heat_map(values, min_value, max_value), pillow_image.convert("RGB"), mask)


def _to_grey(values_HW: Tensor, min_value: float, max_value: float) -> Any:
    """Convert values to a grey Pillow image, one pixel each."""
    from PIL import Image as Pil

    pixels = (values_HW.detach().float() - min_value) / ((max_value - min_value) or 1.0) * 255
    return Pil.fromarray(pixels.clamp(0, 255).round().byte().cpu().numpy())


def mosaic(tiles: Sequence[Any], columns: int) -> Any:
    """Join Pillow images of one size into one, in rows."""
    from PIL import Image as Pil

    tile_width, tile_height = tiles[0].width + _GAP, tiles[0].height + _GAP
    columns = min(columns, len(tiles))
    grid = Pil.new("RGB", (columns * tile_width - _GAP, -(-len(tiles) // columns) * tile_height - _GAP), "#8896a8")
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % columns * tile_width, index // columns * tile_height))
    return grid


def add_caption(pixels: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """Add a text below an image [H, W, 3], wrapped to its width."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    width = max(480, pixels.shape[1])
    lines = _wrap_text(escape(caption), font, width - 16)
    captioned = Pil.new("RGB", (width, pixels.shape[0] + _LINE_HEIGHT * len(lines) + 8), "white")
    captioned.paste(Pil.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(captioned)
    for index, line in enumerate(lines):
        draw.text((8, pixels.shape[0] + _LINE_HEIGHT * index), line, "#333333", font)
    return np.asarray(captioned)


def _wrap_text(text: str, font: Any, width: int) -> list[str]:
    """Wrap a text into lines of at most `width` pixels; a word longer than a line is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        while font.getlength(word) > width:
            word = word[:-1]
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]
