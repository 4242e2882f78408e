"""The `data.image` section, and the limits of what is accepted as an image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cnnrun.config.spec import SizePair, Spec
from cnnrun.contracts.layer import HeightWidth

MAX_PIXELS = 50_000_000

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


class ImageRefusedError(Exception):
    """Reason that an image cannot be used, without its name; `image_errors` adds that."""
