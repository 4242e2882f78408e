"""Hostile and broken data, case by case: part B of the catalogue, as far as it is not tested elsewhere.

docs/data.md lists every case and its test.
"""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil
from PIL.PngImagePlugin import PngInfo

from cnnrun.base.errors import CheckpointError, DataError, InterruptionError
from cnnrun.base.progress import progress_bar
from cnnrun.data import image_files
from cnnrun.data.image_files import load_with_view
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.learner import Learner
from tests.support.images import save_picture

SIZE = (10, 12)


def load(path: Path, channels: int = 3, **settings) -> np.ndarray:
    return load_with_view(path, SIZE, channels, ImageSettings(**settings))[0]


def png(width: int, height: int, body: bytes, bits: int = 8, kind: int = 2) -> bytes:
    """A PNG with this header whose pixel data is `body`, compressed."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "bits", "kind"),
    [(9000, 9000, 8, 2), (13000, 13000, 1, 0), (19000, 19000, 8, 0), (2**31 - 1, 2**31 - 1, 8, 2)],
)
def test_b5_images_of_too_many_pixels_are_refused_without_memory(tmp_path, width, height, bits, kind):
    """Runs in its own process, whose memory must grow by less than 50 MiB."""
    (tmp_path / "vast.png").write_bytes(png(width, height, b"\0" * 1000, bits, kind))
    code = """
import resource, sys
from pathlib import Path
import PIL.PngImagePlugin
from PIL import Image as Pil
from cnnrun.base.errors import DataError
from cnnrun.data.image_files import load_with_view
from cnnrun.data.image_settings import ImageSettings
Pil.new("RGB", (9, 9))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_with_view(Path(sys.argv[1]), (8, 8), 3, ImageSettings())
except DataError as error:
    print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "vast.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pixels" in done.stdout


def test_b6_decompression_bombs_in_text_and_profile_chunks_are_refused(tmp_path):
    text = PngInfo()
    text.add_text("comment", "x" * (70 << 20), zip=True)
    Pil.new("RGB", (12, 10)).save(tmp_path / "text.png", pnginfo=text)
    assert (tmp_path / "text.png").stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"text\.png: cannot be decoded"):
        load(tmp_path / "text.png")
    Pil.new("RGB", (12, 10)).save(tmp_path / "icc.png", icc_profile=b"\0" * (70 << 20))
    with pytest.raises(DataError, match=r"icc\.png: "):
        load(tmp_path / "icc.png")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("p.svg", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("p.psd", b"8BPS\0\1" + b"\0" * 60),
        ("p.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60),
        ("p.dcm", b"\0" * 128 + b"DICM" + b"\0" * 60),
        ("p.ico", b"\0\0\1\0\1\0" + b"\0" * 60),
    ],
)
def test_b7_other_formats_are_refused_by_content(tmp_path, name, data):
    (tmp_path / f"{name}.png").write_bytes(data)
    with pytest.raises(DataError, match="not an image"):
        load(tmp_path / f"{name}.png")


DAMAGED = {
    "p.heic": b"\0\0\0\x18ftypheic" + b"\0" * 60,
    "p.avif": b"\0\0\0\x18ftypavif" + b"\0" * 60,
    "p.tif": b"II*\0" + b"\x08\0\0\0" + b"\0" * 60,
    "p.gif": b"GIF89a" + b"\1\0\1\0" + b"\0" * 60,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_b7_damaged_files_of_accepted_formats_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(DataError, match=name) as refused:
        load(tmp_path / name)
    assert len(refused.value.lines) == 1


def test_b8_sixteen_bit_images_are_scaled_in_either_byte_order(tmp_path):
    ramp = np.linspace(0, 65535, 120).astype(np.uint16).reshape(SIZE)
    Pil.fromarray(ramp).save(tmp_path / "a.png")
    (tmp_path / "b.pgm").write_bytes(b"P5 12 10 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.png", "b.pgm"):
        assert np.array_equal(load(tmp_path / name, 1)[..., 0], ramp // 257)
        assert np.array_equal(load(tmp_path / name, 3)[..., 2], ramp // 257)


def test_b10_adobes_inverted_cmyk_is_converted(tmp_path):
    """Adobe's JPEGs hold inverted CMYK, marked as such; Pillow writes and reads them the same way. Golden pixels."""
    colours = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (0, 128, 255, 0)]
    expected = [(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255), (255, 127, 0)]
    for number, (ink, rgb) in enumerate(zip(colours, expected, strict=True)):
        path = tmp_path / f"{number}.jpg"
        Pil.new("CMYK", (12, 10), ink).save(path, quality=100)
        assert b"Adobe" in path.read_bytes()
        assert np.abs(load(path).astype(int) - rgb).max() <= 3


def test_b12_every_pixel_mode_gives_the_same_colours(tmp_path):
    grey = Pil.new("L", (12, 10), 77)
    for mode in ("L", "RGB", "P", "RGBA", "LA"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
        assert np.abs(load(tmp_path / f"{mode}.png").astype(int) - 77).max() <= 1
        assert np.abs(load(tmp_path / f"{mode}.png", 1).astype(int) - 77).max() <= 1
    grey.point(lambda v: 255).convert("1").save(tmp_path / "1.png")
    assert (load(tmp_path / "1.png") == 255).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as cnnrun itself sets it
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"\0" * 40]
)
def test_b13_broken_exif_leaves_the_image_unchanged(tmp_path, exif):
    path = save_picture(tmp_path / "p.jpg", size=(12, 10))
    data = path.read_bytes()
    expected = load(path)
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert np.array_equal(load(path), expected)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_b14_animations_are_refused(tmp_path, suffix):
    frames = [Pil.new("RGB", (12, 10), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="animation|not an image"):
        load(tmp_path / f"a.{suffix}")


def test_b15_images_too_small_are_refused(tmp_path):
    for name, size, least in (("one.png", (1, 1), 4), ("thin.png", (1, 5000), 4), ("less.png", (40, 20), 32)):
        Pil.new("RGB", size).save(tmp_path / name)
        with pytest.raises(DataError, match=rf"{size[0]}x{size[1]} pixels; at least {least} a side"):
            load(tmp_path / name, min_side=least)
    assert load(tmp_path / "less.png", fit="crop").shape == (10, 12, 3)


def folder_of(root: Path, **more) -> Data:
    return Data.model_validate({"source": {"folder": str(root)}, "image": {"size": 8, "channels": 3}, **more})


def config_of(root: Path, path: Path) -> Path:
    path.write_text(
        f"task: classify\ndata: {{source: {{folder: {root}}}, image: {{size: 8, channels: 3}}, split: {{val: 0.3}}}}\n"
        "model: [flatten]\n"
    )
    return path


def test_b18_broken_links_are_reported(picture_folder):
    os.symlink(picture_folder / "cat" / "gone.png", picture_folder / "cat" / "link.png")
    with pytest.raises(DataError, match=r"link\.png: .*No such file"):
        build_dataset(data := folder_of(picture_folder), index_source(data), progress_bar)


def test_b19_unusual_file_names_are_read_and_escaped_in_messages(tmp_path, run_cli):
    root = tmp_path / "pets"
    names = [b"\xff\xfe.png", b"line\nbreak.png", b"x" * 251 + b".png", "\U0001f408.png".encode(), b"\x1b[31mred.png"]
    names += [unicodedata.normalize(form, "caf\u00e9.png").encode() for form in ("NFC", "NFD")]
    for label, kind in enumerate(("cat", "dog")):
        for number, name in enumerate(names):
            picture = save_picture(root / kind / "p.png", seed=100 * label + number)
            picture.rename(root / kind / os.fsdecode(name))
    data = folder_of(root)
    split = index_source(data).contents.splits["train"]
    assert [os.fsencode(split.images[i].name) for i in range(len(names))] == sorted(names)
    assert sum(build_dataset(data, index_source(data), progress_bar).facts.counts.values()) == 14
    config = config_of(root, tmp_path / "c.yaml")
    out = run_cli("data", "check", config)[1]
    assert "differ only in case or Unicode form" in out
    assert out.isprintable() or all(line.isprintable() for line in out.splitlines())
    code, _, err = run_cli("train", config, "train.batch=4", "train.epochs=1", "--runs", tmp_path / "runs")
    assert code == 0, err
    (root / "cat" / "\x1b[31mred.png").unlink()
    (root / "cat" / "\x1b[31mbad\n.png").write_bytes(b"")
    code, _, err = run_cli("train", config, "train.batch=4", "--runs", tmp_path / "runs")
    assert code == 8
    assert "\x1b" not in err
    assert r"\x1b[31mbad\n.png: empty file" in err


def test_b35_a_read_error_is_retried_three_times_then_reported(tmp_path, monkeypatch):
    path = save_picture(tmp_path / "p.png", size=(12, 10))
    expected, failures = load(path), [5, 5]
    real = image_files._read_once

    def flaky(item, listed):
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return real(item, listed)

    monkeypatch.setattr(image_files, "_read_once", flaky)
    assert np.array_equal(load(path), expected)
    failures[:] = [116, 116, 116, 116]
    with pytest.raises(DataError, match=r"p\.png: cannot be read: Input/output error"):
        load(path)
    assert len(failures) == 1
    failures[:] = [13, 13]
    with pytest.raises(DataError, match=r"p\.png"):
        load(path)
    assert len(failures) == 1  # a permission error is not retried


def test_b36_a_pipe_among_the_files_never_blocks(picture_folder):
    os.mkfifo(picture_folder / "cat" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: not a regular file"):
        build_dataset(data := folder_of(picture_folder), index_source(data), progress_bar)


def test_b37_many_file_names_take_little_memory():
    from cnnrun.base.file_sequences import Files

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = Files(f"some/folder/of/pictures/{number:08}.jpg" for number in range(200_000))
    assert files[199_999] == Path("some/folder/of/pictures/00199999.jpg")
    assert len(files) == 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_b38_data_that_changed_before_a_resume_is_named(picture_folder, tmp_path, monkeypatch):
    import signal

    import torch

    text = f"""
task: classify
data: {{source: {{folder: {picture_folder}}}, image: {{size: 8, channels: 3}}}}
model: [flatten]
train: {{epochs: 2, batch: 8}}
"""
    tried = config_file.parse_config(text, "c.yaml", ["name=c"])
    update = Learner.update_weights
    monkeypatch.setattr(Learner, "update_weights", lambda *given: (update(*given), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(InterruptionError):
        train_run(tried, tmp_path, torch.device("cpu"), resume=False)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def resume_refusal() -> str:
        with pytest.raises(CheckpointError) as refused:
            train_run(tried, tmp_path, torch.device("cpu"), resume=True)
        assert refused.value.exit_code == 3
        return str(refused.value)

    (picture_folder / "cat" / "3.png").rename(tmp_path / "kept.png")
    assert f"{picture_folder}/cat/3.png is gone" in resume_refusal()
    (tmp_path / "kept.png").rename(picture_folder / "cat" / "3.png")
    new = save_picture(picture_folder / "dog" / "new.png", seed=777)
    assert f"{new} is new" in resume_refusal()
    new.unlink()
    save_picture(picture_folder / "dog" / "5.png", seed=778)
    assert f"{picture_folder}/dog/5.png changed" in resume_refusal()


def test_b39_an_image_of_one_colour_is_reported(picture_folder, tmp_path, run_cli):
    Pil.new("RGB", (30, 30)).save(picture_folder / "cat" / "black.png")
    config = config_of(picture_folder, tmp_path / "c.yaml")
    assert "warning: 1 image of one single colour" in run_cli("data", "check", config)[1]


def test_b15_a_webp_of_one_frame_is_an_image(tmp_path):
    buffer = io.BytesIO()
    Pil.new("RGB", (12, 10), (1, 2, 3)).save(buffer, "WEBP", lossless=True)
    (tmp_path / "p.webp").write_bytes(buffer.getvalue())
    assert (load(tmp_path / "p.webp") == (1, 2, 3)).all()
