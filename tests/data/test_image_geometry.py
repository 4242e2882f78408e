"""Fitting of images to the network's input, and JPEGs that the decoder makes smaller: close to the full decoding."""

from __future__ import annotations

from functools import cache
from io import BytesIO

import numpy as np
import pytest
from PIL import Image as Pil
from PIL import ImageOps

from cnnrun.data.image_files import decode_image, image_from_pixels
from cnnrun.data.image_geometry import compute_view, fit_image
from cnnrun.data.image_settings import ImageSettings


@cache
def photo_like(height: int, width: int) -> Pil.Image:
    """Details of all sizes, the finer the fainter, as photos have them; flat shapes with hard edges, and noise."""
    rng, pixels = np.random.default_rng(0), np.full((height, width, 3), 128.0)
    for octave in range(1, 9):
        coarse = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        layers = [Pil.fromarray(coarse[..., c]).resize((width, height), Pil.Resampling.BICUBIC) for c in range(3)]
        pixels += 60 * 0.6**octave * np.stack([np.asarray(layer) for layer in layers], 2)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 6, left : left + width // 6] = rng.integers(0, 256, 3)
    return Pil.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def jpeg(image: Pil.Image, orientation: int = 1) -> bytes:
    exif, data = Pil.Exif(), BytesIO()
    exif[0x0112] = orientation
    image.save(data, "JPEG", quality=90, exif=exif)
    return data.getvalue()


def both_ways(data: bytes, size: tuple[int, int], settings: ImageSettings) -> tuple[np.ndarray, np.ndarray, bool]:
    """The fitted pixels by way of the scaled and of the full decoding, and whether the decoder scaled at all."""
    scaled, full = decode_image(data, 3, settings, size), decode_image(data, 3, settings)
    assert scaled.size == full.size
    fitted, expected = (fit_image(image, size, settings).astype(int) for image in (scaled, full))
    return fitted, expected, scaled.pillow_images[0].size != full.pillow_images[0].size


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 224), (160, 120)])
@pytest.mark.parametrize(("height", "width"), [(1200, 1600), (1201, 801), (603, 1999)])
def test_scaled_decoding_is_within_a_grey_level_of_the_full_one(fit, size, height, width):
    data = jpeg(photo_like(height, width))
    fitted, expected, is_scaled = both_ways(data, size, ImageSettings(fit=fit))
    difference = abs(fitted - expected)
    assert difference.mean() <= 1
    assert (difference > 4).mean() <= 0.025
    # At least twice the final size is left, so that the resizing that follows still averages.
    new = compute_view((height, width), size, ImageSettings(fit=fit))
    assert is_scaled == (min(1 / new.scale_x, 1 / new.scale_y) >= 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(803, 1205), (1007, 806)])
def test_turned_photos_stay_in_their_place(orientation, height, width):
    """The last row and column of a scaled image are only partly the photo's; EXIF may turn them to any side."""
    fitted, expected, is_scaled = both_ways(jpeg(photo_like(height, width), orientation), (96, 64), ImageSettings())
    assert is_scaled
    assert abs(fitted - expected).mean() <= 1
    # A shift by half of a pixel of the result would be seen: at the edges of shapes it is many grey levels.
    assert abs(fitted - expected).max() <= 24


@pytest.mark.parametrize("size", [(600, 800), (599, 500), (301, 401), (1300, 1700), (1200, 1600)])
def test_a_photo_that_is_not_four_times_as_large_is_decoded_in_full(size):
    fitted, expected, is_scaled = both_ways(jpeg(photo_like(1200, 1600)), size, ImageSettings())
    assert not is_scaled
    assert np.array_equal(fitted, expected)


def test_other_formats_and_masks_are_decoded_in_full():
    image, data = photo_like(800, 800), BytesIO()
    image.save(data, "PNG")
    fitted, expected, is_scaled = both_ways(data.getvalue(), (50, 50), ImageSettings())
    assert not is_scaled
    assert np.array_equal(fitted, expected)


def test_a_cut_jpeg_is_refused_at_every_scale():
    data = jpeg(photo_like(1200, 1600))
    for part in (0.3, 0.7, 0.95):
        with pytest.raises(OSError, match="truncated"):
            decode_image(data[: int(len(data) * part)], 3, ImageSettings(), (64, 64))


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (64, 64), (7, 90), (33, 47)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(47, 33), (64, 64), (20, 81)])
def test_padding_is_pillows(size, channels, height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = image_from_pixels(pixels, channels, ImageSettings())
    colour = 99 if channels == 1 else (99, 99, 99)
    expected = ImageOps.pad(image.pillow_images[0], size[::-1], Pil.Resampling.BILINEAR, color=colour)
    fitted = fit_image(image, size, ImageSettings(fit="pad", background=99))
    assert np.array_equal(fitted, np.asarray(expected).reshape(*size, channels))


@pytest.mark.parametrize(("height", "width"), [(100, 75), (75, 100), (64, 64), (20, 81)])
@pytest.mark.parametrize("fraction", [1.0, 0.875])
def test_cropping_is_torchvisions(height, width, fraction):
    from torchvision.transforms import functional

    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    fitted = fit_image(
        image_from_pixels(pixels, 3, ImageSettings()), (32, 32), ImageSettings(fit="crop", crop_pct=fraction)
    )
    resized = functional.resize(Pil.fromarray(pixels), round(32 / fraction))
    assert np.array_equal(fitted, np.asarray(functional.center_crop(resized, [32, 32])))


@pytest.mark.parametrize(("height", "width"), [(4, 1000), (17, 4000), (4000, 17), (1000, 9), (5, 3001)])
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (8, 64)])
def test_very_elongated_photos_are_padded(height, width, size):
    """Their short side may become a single pixel, and the decoder rounds the size of a scaled image up."""
    fitted, expected, _ = both_ways(jpeg(photo_like(height, width)), size, ImageSettings(fit="pad", background=0))
    assert abs(fitted - expected).mean() <= 1
    assert (fitted.max(2) > 0).any()
