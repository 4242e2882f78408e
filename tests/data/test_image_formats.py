"""Image files of every accepted format: the same pixels as a PNG where the format is lossless, near them elsewhere."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.data import image_files
from cnnrun.data.image_files import load_with_view, read_image_header
from cnnrun.data.image_names import FORMAT_SUFFIXES, is_image_name
from cnnrun.data.image_settings import ImageSettings

SIZE = (48, 64)


def load(path: Path, channels: int = 3) -> np.ndarray:
    return load_with_view(path, SIZE, channels, ImageSettings())[0]


@pytest.fixture
def picture(tmp_path) -> Pil.Image:
    """A smooth picture, which lossy formats keep nearly."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    pixels = np.stack([4 * x, 5 * y, 2 * (x + y)], 2).clip(0, 255).astype(np.uint8)
    return Pil.fromarray(pixels)


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".bmp", ".webp", ".ppm"])
def test_lossless_formats_give_the_pixels_of_a_png(suffix, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    settings = {"lossless": True} if suffix == ".webp" else {}
    picture.save(tmp_path / f"a{suffix}", **settings)
    assert is_image_name(f"a{suffix}")
    assert np.array_equal(load(tmp_path / f"a{suffix}"), load(tmp_path / "a.png"))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "raw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16", "CMYK"])
def test_tiffs_of_every_mode_equal_pngs(mode, compression, picture, tmp_path):
    if mode == "I;16":
        image = Pil.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        image = picture.convert(mode)
    image.save(tmp_path / "a.tif", compression=compression)
    reference = image.convert("RGB") if mode == "CMYK" else image
    reference.save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path / "a.tif"), load(tmp_path / "a.png"))


@pytest.mark.parametrize(("suffix", "bound"), [(".avif", 8), (".jpg", 8)])
def test_lossy_formats_are_near(suffix, bound, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / f"a{suffix}", quality=95)
    difference = np.abs(load(tmp_path / f"a{suffix}").astype(int) - load(tmp_path / "a.png"))
    assert difference.mean() < bound / 4
    assert difference.max() < 4 * bound


def test_a_gif_of_one_frame_is_its_palette_and_one_of_several_is_refused(picture, tmp_path):
    palette = picture.quantize(64)
    palette.save(tmp_path / "a.gif")
    palette.save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path / "a.gif"), load(tmp_path / "a.png"))
    palette.save(tmp_path / "b.gif", save_all=True, append_images=[picture.rotate(90).quantize(64)])
    with pytest.raises(DataError, match=r"b\.gif: an animation; give single images"):
        load(tmp_path / "b.gif")


def test_pages_and_floats_of_a_tiff_are_refused(picture, tmp_path):
    picture.save(tmp_path / "pages.tif", save_all=True, append_images=[picture.rotate(180)])
    with pytest.raises(DataError, match=r"pages\.tif: several pages; give single images"):
        load(tmp_path / "pages.tif")
    Pil.fromarray(np.random.default_rng(0).random(SIZE, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: pixels of kind 'F' have no agreed range"):
        load(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied_once(orientation, picture, tmp_path):
    exif = Pil.Exif()
    exif[0x0112] = orientation
    for suffix in (".tif", ".png"):
        picture.save(tmp_path / f"a{suffix}", exif=exif)
    header = read_image_header((tmp_path / "a.tif").read_bytes()).size
    assert header == (SIZE if orientation < 5 else SIZE[::-1])
    assert np.array_equal(load(tmp_path / "a.tif"), load(tmp_path / "a.png"))


def test_heic_is_read_with_its_package_and_named_without(tmp_path, monkeypatch):
    pytest.importorskip("pi_heif", reason="pi-heif is not installed")
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 60
    (tmp_path / "p.heic").write_bytes(data)
    with pytest.raises(DataError, match=r"p\.heic"):
        load(tmp_path / "p.heic")
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr("cnnrun.base.extras.find_spec", lambda name: None)
    image_files._known_formats.cache_clear()
    monkeypatch.setattr(image_files, "_known_formats", lambda: image_files.FORMATS)
    with pytest.raises(ConfigError, match=r"HEIC needs pi_heif: pip install 'cnnrun\[heic\]'"):
        load(tmp_path / "p.heic")


def test_every_accepted_suffix_is_an_image_name():
    for suffixes in FORMAT_SUFFIXES.values():
        assert all(is_image_name(f"a{suffix.upper()}") for suffix in suffixes)
    assert not is_image_name("a.psd")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as outside of tests
@pytest.mark.parametrize("suffix", [".avif", ".gif", ".tif", ".webp", ".png", ".jpg"])
def test_damaged_files_of_any_format_are_named_or_decoded(suffix, picture, tmp_path):
    """Bytes are changed at random: a file is refused with its name, or decoded to some picture."""
    picture.save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 4):
            damaged[position] = int(rng.integers(256))
        (tmp_path / f"b{suffix}").write_bytes(damaged)
        with contextlib.suppress(DataError):
            load(tmp_path / f"b{suffix}")
