"""The `data.image` section, and the limits of what is accepted as an image."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from cnnrun.config.spec import SizePair, Spec
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.pixels import EIGHT_BITS, MAX_SIGNED, MAX_WHITE, MIN_BLACK, PixelFormat

MAX_PIXELS = 50_000_000

MAX_CHANNELS = 256

_DEEP_SETTINGS = {"bits", "white", "black", "clip"}
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]


class ImageSettings(Spec):
    """Conversion of images to the network's input."""

    size: SizePair | None = None
    """Height and width in pixels; by default those of the source, if all its images have the same size."""
    channels: Channels | None = None
    """1 for grey, 3 for colour, others for images that have just so many, such as those of a satellite; by default \
those of the source."""
    bits: Literal[8, 16] = 8
    """`16` keeps the levels of 16-bit files; with `8` they are reduced to 256."""
    white: int | None = Field(None, le=MAX_WHITE)
    """With `bits: 16`, the largest value of a pixel, which the network takes as 255: 4095 for a camera of 12 bits. \
By default 65535."""
    black: int = Field(0, ge=MIN_BLACK, le=MAX_WHITE - 256)
    """With `bits: 16`, the smallest value of a pixel, which the network takes as 0: -1024 for a CT scanner."""
    clip: bool = False
    """With `bits: 16`, take values below black as black and those above white as white; otherwise their files are \
refused."""
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

    @property
    def pixel_format(self) -> PixelFormat:
        """Format of the decoded pixels."""
        if self.bits == 8:
            return EIGHT_BITS
        highest = MAX_WHITE if self.black >= 0 else MAX_SIGNED
        return PixelFormat(highest if self.white is None else self.white, self.black)

    def digest_text(self) -> str:
        """JSON for digests; without the settings of 16 bits for images of 8, as digests were before there were any."""
        return self.model_dump_json(exclude=None if self.pixel_format.is_deep else _DEEP_SETTINGS)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        names = [name for name in ("white", "black", "clip") if getattr(self, name) not in (None, 0, False)]
        if names and self.bits != 16:
            raise ValueError(f"{names[0]} is for images that are kept at 16 bits; add `bits: 16` or remove it")
        if self.bits == 16 and not self.pixel_format.is_deep:
            raise ValueError("white must be at least 256 above black")
        if self.black < 0 and self.pixel_format.white > MAX_SIGNED:
            raise ValueError(f"with a black below 0, white can be {MAX_SIGNED:,} at the most")
        return self

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: HeightWidth | None) -> HeightWidth | None:
        if size is not None and size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        return size


class ReaderMissingError(Exception):
    """Package that an image needs, without the image's name; `image_errors` adds that."""


class ImageRefusedError(Exception):
    """Reason that an image cannot be used, without its name; `image_errors` adds that."""
