"""Images of any number of channels and of 16 bits: every value is kept, and each channel is treated as a grey image."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Pil

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.progress import progress_bar
from cnnrun.contracts.pixels import MAX_WHITE, PixelFormat
from cnnrun.data import cache
from cnnrun.data.augment.colour import change_colours
from cnnrun.data.augment.random_slots import Draws
from cnnrun.data.augment.settings import Augment
from cnnrun.data.image_files import load_with_view, read_image_bytes, read_image_header, to_network_batch
from cnnrun.data.image_names import choose_images
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra `bands`)")
SIZE = (10, 14)
DEEP = ImageSettings(bits=16)


def noise(channels: int, dtype: type = np.uint16, size: tuple[int, int] = SIZE, seed: int = 0) -> NDArray:
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (*size, channels), endpoint=True)
    return values.astype(dtype)


def load(path: Path, channels: int, settings: ImageSettings = DEEP, size: tuple[int, int] = SIZE) -> NDArray:
    return load_with_view(path, size, channels, settings)[0]


def save_npy(path: Path, pixels: NDArray) -> Path:
    np.save(path, pixels)
    return path


def save_tiff(path: Path, pixels: NDArray, **settings) -> Path:
    tifffile.imwrite(path, pixels, **settings)
    return path


def png_bytes(pixels: NDArray) -> bytes:
    """A PNG file of 16 bits, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def save_png(path: Path, pixels: NDArray) -> Path:
    path.write_bytes(png_bytes(pixels))
    return path


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_files_of_16_bits_keep_every_value(channels, tmp_path):
    pixels = noise(channels)
    path = save_png(tmp_path / "a.png", pixels)
    assert np.array_equal(load(path, channels), pixels)
    header = read_image_header(read_image_bytes(path))
    assert (header.size, header.is_deep) == (SIZE, True)


WAYS_TO_STORE = {
    "pixel by pixel": {"planarconfig": "contig", "photometric": "minisblack"},
    "plane by plane": {"planarconfig": "separate", "photometric": "minisblack"},
    "page by page": {"photometric": "minisblack"},
    "ImageJ's pages": {"imagej": True},
    "tiles, compressed": {
        "planarconfig": "contig",
        "photometric": "minisblack",
        "tile": (16, 16),
        "compression": "lzw",
    },
    "big-endian": {"planarconfig": "contig", "photometric": "minisblack", "byteorder": ">"},
    "BigTIFF": {"planarconfig": "contig", "photometric": "minisblack", "bigtiff": True},
    "deflated": {"planarconfig": "separate", "photometric": "minisblack", "compression": "zlib", "predictor": True},
}


@pytest.mark.parametrize("channels", [2, 5, 12])
@pytest.mark.parametrize("way", WAYS_TO_STORE)
def test_tiff_files_keep_every_channel_and_value(way, channels, tmp_path):
    pixels, settings = noise(channels), WAYS_TO_STORE[way]
    stored = pixels if settings.get("planarconfig") == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    path = save_tiff(tmp_path / "a.tif", stored, **settings)
    assert np.array_equal(load(path, channels), pixels)
    header = read_image_header(read_image_bytes(path))
    assert (header.size, header.planes, header.is_deep) == (SIZE, channels, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_files_of_the_usual_channels_keep_16_bits(channels, tmp_path):
    pixels = noise(channels)
    stored = pixels if channels == 3 else pixels[:, :, 0]
    path = save_tiff(tmp_path / "a.tif", stored, photometric="rgb" if channels == 3 else "minisblack")
    assert np.array_equal(load(path, channels), pixels)
    assert read_image_header(read_image_bytes(path)).is_deep


def test_more_samples_than_colours_are_not_dropped(tmp_path):
    pixels = noise(5, np.uint8)  # Pillow reads the first three and says nothing of the rest
    path = save_tiff(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"] * 2)
    assert np.array_equal(load(path, 5, ImageSettings()), pixels)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.int16])
def test_arrays_keep_every_value(dtype, channels, tmp_path):
    pixels = (noise(channels) // 2 if np.dtype(dtype).itemsize == 2 else noise(channels, np.uint8)).astype(dtype)
    path = save_npy(tmp_path / "a.npy", pixels)
    settings = ImageSettings(bits=16) if pixels.dtype.itemsize == 2 else ImageSettings()
    assert np.array_equal(load(path, channels, settings), pixels)
    first = save_npy(tmp_path / "first.npy", pixels.transpose(2, 0, 1))  # PyTorch's order
    assert np.array_equal(load(first, channels, settings), pixels)
    fortran = save_npy(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    assert np.array_equal(load(fortran, channels, settings), pixels)


def test_eight_bits_fill_the_range_of_sixteen(tmp_path):
    pixels = noise(3, np.uint8)
    Pil.fromarray(pixels).save(tmp_path / "a.png")
    deep = load(tmp_path / "a.png", 3)
    assert deep.dtype == np.uint16
    assert np.array_equal(to_network_batch([deep], DEEP, torch.device("cpu"))[0].numpy(), pixels.transpose(2, 0, 1))


def test_sixteen_bits_are_reduced_for_a_network_of_eight(tmp_path):
    pixels = noise(5)
    path = save_npy(tmp_path / "a.npy", pixels)
    assert np.array_equal(load(path, 5, ImageSettings()), pixels // 257)


def test_grey_and_colour_are_converted_and_nothing_else(tmp_path):
    grey, colour = noise(1), noise(3)
    assert np.array_equal(load(save_png(tmp_path / "grey.png", grey), 3), grey.repeat(3, 2))
    weighted = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load(save_png(tmp_path / "colour.png", colour), 1)[:, :, 0] - weighted).max() <= 0.5 + 1e-6
    for channels, wanted in ((5, 3), (5, 1), (2, 5), (3, 5), (1, 2), (12, 3)):
        path = save_npy(tmp_path / "a.npy", noise(channels))
        with pytest.raises(DataError, match=rf"a.npy: has {channels} channels?; data.image.channels is {wanted}"):
            load(path, wanted)


def test_opacity_is_a_channel_where_it_is_asked_for_and_else_laid_over_the_background(tmp_path):
    pixels = noise(4)
    path = save_png(tmp_path / "a.png", pixels)
    opacity = pixels[:, :, 3:] / MAX_WHITE
    expected = pixels[:, :, :3] * opacity + 30 * 257 * (1 - opacity)
    settings = ImageSettings(bits=16, background=30)
    assert np.abs(load(path, 3, settings) - expected).max() <= 0.5 + 1e-6
    eight_bits = noise(4, np.uint8)
    Pil.fromarray(eight_bits, "RGBA").save(tmp_path / "b.png")
    assert np.array_equal(load(tmp_path / "b.png", 4, ImageSettings()), eight_bits)


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_tiffs_are_turned_upright(orientation, turned, tmp_path):
    stored = noise(5)
    path = save_tiff(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig="contig",
                     extratags=[(274, 3, 1, orientation, True)])  # fmt: skip
    quarter_turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    expected = np.rot90(stored, quarter_turns)
    assert np.array_equal(load(path, 5, size=expected.shape[:2]), expected)
    assert read_image_header(read_image_bytes(path)).size == (SIZE[::-1] if turned else SIZE)


@pytest.mark.parametrize("maxval", [300, 4095, 65_535])
@pytest.mark.parametrize(("kind", "channels"), [(5, 1), (6, 3)])
def test_pgm_and_ppm_keep_the_values_of_the_file(kind, channels, maxval, tmp_path):
    """Pillow scales grey values to 65,535, and reduces colours to 8 bits."""
    pixels = noise(channels).clip(max=maxval)
    header = f"P{kind}\n# a comment\n{SIZE[1]} {SIZE[0]}\n{maxval}\n".encode()
    (tmp_path / "a.ppm").write_bytes(header + pixels.astype(">u2").tobytes())
    assert np.array_equal(load(tmp_path / "a.ppm", channels), pixels)
    assert read_image_header(read_image_bytes(tmp_path / "a.ppm")).is_deep
    (tmp_path / "a.ppm").write_bytes(header + pixels.astype(">u2").tobytes()[:-1])
    with pytest.raises(DataError, match="a.ppm: cannot be decoded"):
        load(tmp_path / "a.ppm", channels)


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "CMYK", "YCbCr"])
def test_files_of_eight_bits_in_any_mode_serve_among_sixteen(mode, tmp_path):
    picture = Pil.fromarray(noise(3, np.uint8)).convert(mode)
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    picture.save(tmp_path / f"a.{suffix}")
    deep = load(tmp_path / f"a.{suffix}", 3)
    shallow = load(tmp_path / f"a.{suffix}", 3, ImageSettings())
    assert np.abs(deep / 257 - shallow).max() <= 1  # rounding of opacity


def test_a_transparent_value_of_16_bit_grey_is_left_as_it_is(tmp_path):
    pixels = noise(1) % 4096
    data = png_bytes(pixels)
    chunk = (
        struct.pack(">I", 2)
        + b"tRNS"
        + struct.pack(">H", 7)
        + struct.pack(">I", zlib.crc32(b"tRNS" + struct.pack(">H", 7)))
    )
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    assert np.array_equal(load(tmp_path / "a.png", 1), pixels)


def test_opacity_of_a_tiff_is_laid_over_the_background_as_that_of_a_png(tmp_path):
    pixels = noise(4)
    save_tiff(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    save_png(tmp_path / "a.png", pixels)
    assert np.array_equal(load(tmp_path / "a.tif", 3), load(tmp_path / "a.png", 3))


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(7, 9), (10, 14), (20, 11)])
def test_each_channel_of_eight_bits_is_fitted_as_a_grey_image(size, fit, tmp_path):
    pixels, settings = noise(5, np.uint8), ImageSettings(fit=fit, background=40)
    together = load(save_npy(tmp_path / "a.npy", pixels), 5, settings, size)
    for channel in range(5):
        Pil.fromarray(pixels[:, :, channel]).save(tmp_path / "grey.png")
        assert np.array_equal(together[:, :, channel], load(tmp_path / "grey.png", 1, settings, size)[:, :, 0])


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(7, 9), (10, 14), (20, 11)])
def test_sixteen_bits_are_fitted_as_eight_are_but_finer(size, fit, tmp_path):
    pixels = noise(3)
    path = save_png(tmp_path / "a.png", pixels)
    fine = load(path, 3, ImageSettings(bits=16, fit=fit, background=40), size) / 257
    Pil.fromarray((pixels // 257).astype(np.uint8)).save(tmp_path / "b.png")
    coarse = load(tmp_path / "b.png", 3, ImageSettings(fit=fit, background=40), size)
    assert np.abs(fine - coarse).max() < 2


# --- levels -----------------------------------------------------------------------------------------------------------


@given(st.integers(256, MAX_WHITE), st.integers(0, MAX_WHITE))
def test_every_stored_level_survives_the_way_to_the_network_and_back(white, level):
    pixel_format = PixelFormat(white)
    stored = torch.tensor([min(level, white), 0, white], dtype=torch.int32).to(torch.uint16)
    values = pixel_format.to_network(stored)
    assert values[1:].tolist() == [0.0, 255.0]
    assert torch.equal(pixel_format.to_file(values).int(), stored.int())
    assert torch.equal(pixel_format.from_file(stored), values)


def test_eight_bits_stay_as_they_are():
    stored = torch.arange(256).byte()
    assert PixelFormat().to_network(stored) is stored
    assert torch.equal(PixelFormat().to_file(stored.float()), stored)
    assert torch.equal(PixelFormat().from_file(stored), stored.float())


def test_white_is_the_largest_value(tmp_path):
    pixels = noise(1) % 4096
    pixels[0, 0] = 4095
    path, settings = save_png(tmp_path / "a.png", pixels), ImageSettings(bits=16, white=4095)
    values = to_network_batch([load(path, 1, settings)], settings, torch.device("cpu"))
    assert torch.allclose(values[0, 0].double(), torch.from_numpy(pixels[:, :, 0] / 4095 * 255), atol=1e-4)
    with pytest.raises(DataError, match=r"a.png: has the value 4,095, above data.image.white \(4,094\)"):
        load(path, 1, ImageSettings(bits=16, white=4094))


def test_black_is_the_smallest_value_also_below_0(tmp_path):
    pixels = np.random.default_rng(0).integers(-1000, 3001, (*SIZE, 1)).astype(np.int16)
    pixels[0, :2, 0] = -1000, 3000
    path, settings = save_npy(tmp_path / "a.npy", pixels), ImageSettings(bits=16, black=-1000, white=3000)
    values = to_network_batch([load(path, 1, settings)], settings, torch.device("cpu"))
    assert torch.allclose(values[0, 0].double(), torch.from_numpy((pixels[:, :, 0] + 1000.0) / 4000 * 255), atol=1e-4)
    stored = torch.from_numpy(pixels)
    from_file = settings.pixel_format.from_file(stored)
    assert torch.equal(from_file.permute(2, 0, 1), values[0])
    assert torch.equal(settings.pixel_format.to_file(from_file), stored)
    with pytest.raises(DataError, match=r"a.npy: has the value -1,000, below data.image.black \(-999\)"):
        load(path, 1, ImageSettings(bits=16, black=-999, white=3000))


def test_values_outside_are_clipped_where_that_is_asked_for(tmp_path):
    pixels = np.array([[-9999, -1, 0, 7], [100, 4095, 4096, 30_000]] * 4, np.int16)[:, :, None]
    path = save_npy(tmp_path / "a.npy", pixels)
    clipped = load(path, 1, ImageSettings(bits=16, white=4095, clip=True), size=(8, 4))
    assert np.array_equal(clipped, pixels.clip(0, 4095))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"white": 4095}, "white is for images that are kept at 16 bits"),
        ({"black": -1024}, "black is for images that are kept at 16 bits"),
        ({"clip": True}, "clip is for images that are kept at 16 bits"),
        ({"bits": 16, "white": 255}, "white must be at least 256 above black"),
        ({"bits": 16, "white": 900, "black": 700}, "white must be at least 256 above black"),
        ({"bits": 16, "white": 40_000, "black": -1}, "with a black below 0, white can be 32,767 at the most"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        ImageSettings(**settings)


# --- refused files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.zeros((9, 9, 5), np.float32), "pixels of kind float32 have no agreed range"),
        (np.zeros((9, 9, 5), np.uint32), "pixels of kind uint32 have no agreed range"),
        (np.full((9, 9, 5), -3, np.int16), r"has the value -3, below data.image.black \(0\)"),
        (np.zeros((9,), np.uint8), r"has the shape \[9\]; expected \[height, width\]"),
        (np.zeros((2, 9, 9, 5), np.uint8), r"has the shape \[2, 9, 9, 5\]"),
        (np.zeros((0, 9, 5), np.uint8), "has no pixels"),
        (np.array([["a"]], object), "holds Python objects"),
    ],
)
def test_arrays_that_are_no_images_are_refused(pixels, problem, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, pixels, allow_pickle=True)
    with pytest.raises(DataError, match=rf"a.npy: {problem}"):
        load(path, 5)


def test_an_array_that_claims_more_than_it_holds_allocates_nothing(tmp_path):
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<u2", "fortran_order": False, "shape": (40_000, 40_000, 9)})
    (tmp_path / "a.npy").write_bytes(data.getvalue() + bytes(100))
    with pytest.raises(DataError, match="which is not what it holds"):
        load(tmp_path / "a.npy", 9)


def test_a_tiff_with_time_and_channels_is_refused(tmp_path):
    path = save_tiff(tmp_path / "a.tif", np.zeros((3, 4, *SIZE), np.uint16), imagej=True)
    with pytest.raises(DataError, match="expected height, width and channels"):
        load(path, 12)


def test_five_channels_for_a_network_of_three_are_named(tmp_path):
    path = save_tiff(tmp_path / "a.tif", noise(5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"a.tif: has 5 channels; data.image.channels is 3"):
        load(path, 3, ImageSettings())


def test_a_missing_tifffile_says_what_brings_it(tmp_path, monkeypatch):
    path = save_tiff(tmp_path / "a.tif", noise(5), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr("cnnrun.base.extras.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"a.tif: .* needs tifffile: pip install 'cnnrun\[bands\]'"):
        load(path, 5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, which a program ignores
@pytest.mark.parametrize("kind", ["a.npy", "contig.tif", "pages.tif", "lzw.tif", "a.png"])
def test_damaged_files_are_refused_in_one_line(kind, tmp_path):
    pixels = noise(4)
    if kind == "a.npy":
        save_npy(tmp_path / kind, pixels)
    elif kind == "a.png":
        save_png(tmp_path / kind, pixels)
    else:
        stored = pixels.transpose(2, 0, 1) if kind == "pages.tif" else pixels
        more = {"planarconfig": "contig"} if kind != "pages.tif" else {}
        compression = "lzw" if kind == "lzw.tif" else None
        save_tiff(tmp_path / kind, stored, photometric="minisblack", compression=compression, **more)
    whole, chance, refused = (tmp_path / kind).read_bytes(), random.Random(0), 0
    for number in range(300):
        data = bytearray(whole[: chance.randrange(1, len(whole))] if number % 3 == 0 else whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        (tmp_path / kind).write_bytes(data)
        try:
            load(tmp_path / kind, 4)
        except DataError as error:
            refused += 1
            assert str(error).count("\n") == 0
    assert refused > 100


# --- data sets --------------------------------------------------------------------------------------------------------


def write_folder(root: Path, channels: int = 5, count: int = 12) -> Path:
    for number in range(count):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        save_npy(folder / f"{number}.npy", noise(channels, seed=number))
    return root


def folder_data(root: Path, folder: Path, **more) -> Data:
    image = {"size": list(SIZE), "channels": 5, "bits": 16}
    split = {"val": 0.34}
    return Data.model_validate(
        {"source": {"folder": str(root)}, "image": image, "split": split, "cache_dir": str(folder)} | more
    )


def contents(data: Data) -> list:
    dataset = build_dataset(data, index_source(data), progress_bar)
    return [examples.load_images(torch.arange(len(examples))) for examples in dataset.splits.values()]


@pytest.mark.parametrize(
    "storage", [{"cache": "disk"}, {"cache": "disk", "memory_gib": 1e-9}, {"cache": "memory"}, {"cache": "none"}]
)
def test_every_storage_gives_the_same_values(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_IMAGES", 4)
    root = write_folder(tmp_path / "images")
    data = folder_data(root, tmp_path / "cache", **storage)
    for _ in range(2):  # decoded, then from the cache
        dataset = build_dataset(data, index_source(data), progress_bar)
        for examples in dataset.splits.values():
            images = examples.load_images(torch.arange(len(examples)))
            assert images.dtype == torch.float32
            files = [Path(examples.sample_name(index)) for index in range(len(examples))]
            expected = np.stack([np.load(file) for file in files]).transpose(0, 3, 1, 2) / np.float32(257)
            assert np.array_equal(images.numpy(), expected)


def test_mean_and_deviation_are_those_of_the_values(tmp_path):
    data = folder_data(write_folder(tmp_path / "images"), tmp_path / "cache")
    dataset = build_dataset(data, index_source(data), progress_bar)
    images = dataset.splits["train"].load_images(torch.arange(len(dataset.splits["train"]))).double()
    assert dataset.facts.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert dataset.facts.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), rel=1e-6)


def test_arrays_in_memory_equal_files(tmp_path):
    root = write_folder(tmp_path / "images")
    files = sorted(root.glob("*/*.npy"))
    labels = [int(file.parent.name[-1]) for file in files]
    np.savez(tmp_path / "a.npz", x_train=np.stack([np.load(file) for file in files]), y_train=labels)
    by_file = folder_data(root, tmp_path / "cache")
    by_array = folder_data(root, tmp_path / "cache", source={"arrays": str(tmp_path / "a.npz")})
    for first, second in zip(contents(by_file), contents(by_array), strict=True):
        assert torch.equal(first, second)
    facts = [build_dataset(data, index_source(data), progress_bar).facts for data in (by_file, by_array)]
    assert facts[0].mean == facts[1].mean
    assert facts[0].std == facts[1].std


def test_bits_and_white_are_part_of_the_key_of_the_cache(tmp_path):
    root, image = write_folder(tmp_path / "images"), {"size": list(SIZE), "channels": 5}
    for settings in ({}, {"bits": 16}, {"bits": 16, "white": 65_535}):
        contents(folder_data(root, tmp_path / "cache", cache="disk", image=image | settings))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the last two are the same


def test_arrays_are_images_only_where_there_are_no_others():
    assert choose_images(["a.npy", "b.txt", ".c.npy"]) == ["a.npy"]
    assert choose_images(["dir.npy/a.npy", "a.JPG", "b.txt"]) == ["a.JPG"]


def test_signed_and_unsigned_pixels_are_different_data(tmp_path):
    pixels = noise(5, size=(12, *SIZE))
    for name, images in (("u", pixels), ("s", pixels.view(np.int16))):
        np.savez(tmp_path / f"{name}.npz", x_train=images, y_train=np.arange(12) % 2)
    image = {"size": list(SIZE), "channels": 5, "bits": 16, "white": 30_000, "clip": True}
    found = [
        contents(
            folder_data(tmp_path, tmp_path / "cache", image=image, source={"arrays": str(tmp_path / f"{name}.npz")})
        )
        for name in "us"
    ]
    assert not torch.equal(found[0][0], found[1][0])


def test_leaks_are_found_where_one_split_needs_conversion(tmp_path):
    train, val = noise(5, size=(12, *SIZE)) % 4096, noise(5, size=(6, *SIZE), seed=1) % 4096
    val[:3] = train[:3]
    val[5, 0, 0, 0] = 5000  # is clipped, so this split is converted and train is not
    np.savez(tmp_path / "a.npz", x_train=train, y_train=np.arange(12) % 2, x_val=val, y_val=np.arange(6) % 2)
    image = {"size": list(SIZE), "channels": 5, "bits": 16, "white": 4095, "clip": True}
    data = folder_data(tmp_path, tmp_path / "cache", image=image, source={"arrays": str(tmp_path / "a.npz")})
    with pytest.raises(DataError, match="3 images in more than one split"):
        contents(data)


def test_a_package_that_is_missing_is_not_remembered_as_damage(tmp_path, monkeypatch):
    for number in range(12):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        save_tiff(folder / f"{number}.tif", noise(5, seed=number), photometric="minisblack", planarconfig="contig")
    data = folder_data(tmp_path / "images", tmp_path / "cache", bad_files="skip", cache="disk")
    with monkeypatch.context() as patched:
        patched.setattr("cnnrun.base.extras.find_spec", lambda package: None)
        with pytest.raises(ConfigError, match="needs tifffile"):
            contents(data)
    assert sum(map(len, contents(data))) == 12


def test_one_other_image_anywhere_leaves_the_arrays_of_all_classes_out(tmp_path, capfd):
    root = write_folder(tmp_path / "images")
    Pil.fromarray(noise(3, np.uint8)).save(root / "class0" / "preview.png")
    with pytest.raises(DataError, match="class1: no images"):
        contents(folder_data(root, tmp_path / "cache"))
    assert "left out 12 .npy files beside other images" in capfd.readouterr().err


# --- augmentation -----------------------------------------------------------------------------------------------------


SETTINGS = [
    {},
    {"shift": 0.3},
    {"flip": "both", "shift": 0.1},
    {"flip": "vertical"},
    {"crop": {"scale": [0.4, 1.0]}, "rotate": 20},
    {"brightness": 0.3, "contrast": 0.3},
    {"noise": 9, "blur": 1.0, "erase": 0.5},
    {"mixup": 0.4},
    {"mosaic": 0.7},
    {"policy": "trivial_augment", "flip": "horizontal"},
]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_float_images_are_augmented_as_the_same_values_of_eight_bits_are(settings, channels):
    """Images of 16 bits come as float32: whole numbers among them must give what uint8 gives."""
    augment = Augment.model_validate(settings)
    stored = torch.from_numpy(noise(channels, np.uint8, (6, *SIZE)).transpose(0, 3, 1, 2).copy())
    draws = Draws(1, 2, torch.arange(6), augment.slots())
    partners = torch.stack([(torch.arange(6) + step) % 6 for step in (1, 2, 3)], 1)

    def changed(images: torch.Tensor) -> torch.Tensor:
        images = augment.apply(images, draws)
        if augment.mosaic:
            images, _ = augment.make_mosaics(
                images, partners, {"masks": torch.zeros(6, *SIZE, dtype=torch.uint8)}, draws
            )
        return augment.mix(images, partners[:, 0], draws)[0] if augment.has_mixing else images

    assert torch.equal(changed(stored).float(), changed(stored.float()).float())


def test_contrast_and_brightness_treat_each_channel_as_a_grey_image():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(3, 5, 6, 7, generator=generator)
    factors = [torch.tensor([0.7, 1.0, 1.3]), torch.tensor([1.2, 0.8, 1.0]), torch.ones(3), torch.zeros(3)]
    together = change_colours(images, *factors)
    alone = [change_colours(images[:, channel : channel + 1], *factors) for channel in range(5)]
    assert torch.equal(together, torch.cat(alone, 1))
