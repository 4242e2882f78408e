from __future__ import annotations

import hashlib
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pil

from cnnrun.base.errors import DataError
from cnnrun.data.image_files import load_with_view
from cnnrun.data.image_settings import ImageSettings
from tests.support.images import save_picture

SIZE = (10, 12)


def load(path, channels=3, **settings):
    return load_with_view(path, SIZE, channels, ImageSettings(**settings))[0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixel data."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.jpg", b"", "empty file"),
        ("text.jpg", b"hello", "not an image"),
        ("page.jpg", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("vast.png", png_header(20_000, 20_000), "pixels"),
        ("vaster.png", png_header(2**31 - 1, 2**31 - 1), "pixels"),
        ("post.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_files_that_are_not_images_are_refused_by_name(tmp_path, name, data, words):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=words) as refused:
        load(path)
    assert str(refused.value).startswith(str(path))
    assert len(refused.value.lines) == 1


@pytest.mark.parametrize("kept", [0.5, 0.97])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_a_truncated_image_is_refused(tmp_path, suffix, kept):
    path = save_picture(tmp_path / f"p{suffix}", size=(64, 64))
    data = path.read_bytes()
    with pytest.raises(DataError, match="cannot be decoded|not an image"):
        load(write(tmp_path / f"cut{suffix}", data[: int(len(data) * kept)]))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)
    Pil.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(load(tmp_path / "ramp.png", 1)[..., 0], ramp // 257)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixel_types_without_a_fixed_range_are_refused(tmp_path, mode):
    Pil.new(mode, (12, 10), 3).save(tmp_path / "p.tif")
    with pytest.raises(DataError, match=f"pixels of kind '{mode}' have no agreed range; save it as 8 or 16 bit"):
        load(tmp_path / "p.tif")


def test_transparent_pixels_take_the_background(tmp_path):
    Pil.new("RGBA", (12, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load(tmp_path / "clear.png") == 255).all()
    assert (load(tmp_path / "clear.png", background=7) == 7).all()
    Pil.new("LA", (12, 10), (0, 0)).save(tmp_path / "la.png")
    assert (load(tmp_path / "la.png", 1) == 255).all()
    palette = Pil.new("P", (12, 10), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    assert (load(tmp_path / "p.png") == 255).all()


def test_cmyk_palette_and_one_bit_images_are_converted(tmp_path):
    colour = Pil.new("RGB", (12, 10), (200, 100, 50))
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(load(tmp_path / "cmyk.jpg").astype(int) - (200, 100, 50)).max() <= 6
    colour.quantize().save(tmp_path / "palette.png")
    assert np.abs(load(tmp_path / "palette.png").astype(int) - (200, 100, 50)).max() <= 2
    Pil.new("1", (12, 10), 1).save(tmp_path / "one.png")
    assert (load(tmp_path / "one.png") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(tmp_path, orientation):
    upright = Pil.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that stores each orientation
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Pil.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load(tmp_path / "turned.png", 1)[..., 0], np.asarray(upright))


def test_animations_are_refused(tmp_path):
    frames = [Pil.new("RGB", (12, 10), (i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="animation"):
        load(tmp_path / "a.png")


def test_the_format_is_detected_from_the_content_not_the_name(tmp_path):
    path = save_picture(tmp_path / "p.png")
    assert np.array_equal(load(path), load(path.rename(tmp_path / "p.jpg")))


def test_paths_that_are_not_regular_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for name, words in (("fifo.png", "not a regular file"), (".", "not a regular file"), ("no.png", "No such file")):
        with pytest.raises(DataError, match=words):
            load(tmp_path / name)


def test_crop_and_pad_fit_a_wide_image(tmp_path):
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 14:26] = 200
    Pil.fromarray(wide).save(tmp_path / "wide.png")
    assert (load(tmp_path / "wide.png", 1, fit="crop") == 200).all()
    padded = load(tmp_path / "wide.png", 1, fit="pad", background=9)[..., 0]
    assert (padded[[0, -1]] == 9).all()
    assert load(tmp_path / "wide.png", 1).shape == (10, 12, 1)


def test_loading_never_changes_the_users_file(tmp_path):
    path = save_picture(tmp_path / "p.jpg", size=(50, 40))
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    load(path)
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before


def test_a_multi_picture_jpeg_loads_its_first_image(tmp_path):
    first, second = (Pil.new("RGB", (12, 10), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second], quality=100)
    assert load(tmp_path / "phone.jpg")[..., 0].min() > 240


def test_sixteen_bit_pgm_is_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 120).astype(">u2").reshape(10, 12)
    (tmp_path / "ramp.pgm").write_bytes(b"P5 12 10 65535\n" + ramp.tobytes())
    assert np.array_equal(load(tmp_path / "ramp.pgm", 1)[..., 0], ramp.astype(int) // 257)
