from __future__ import annotations

import gzip

import numpy as np
import pytest

from cnnrun.base.errors import DataError
from cnnrun.data.sources.idx import Idx


def write_idx(path, array: np.ndarray) -> None:
    magic = {3: 0x803, 1: 0x801}[array.ndim]
    data = magic.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count, suffix in (("train", 30, ".gz"), ("t10k", 10, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 3).astype(np.uint8))
    return tmp_path


def test_idx_reads_plain_and_compressed_files(idx_folder):
    indexed = Idx(root=str(idx_folder)).read()
    assert indexed.classes == ("0", "1", "2")
    assert indexed.splits["train"].images.shape == (30, 28, 28, 1)
    assert indexed.splits["test"].targets["labels"].tolist() == [i % 3 for i in range(10)]
    assert indexed.splits["test"].sample_name(4) == "t10k-images-idx3-ubyte[4]"


def test_idx_equals_torchvisions_reader(idx_folder):
    from torchvision.datasets.mnist import read_image_file

    ours = Idx(root=str(idx_folder)).read().splits["test"].images[..., 0]
    assert np.array_equal(ours, read_image_file(str(idx_folder / "t10k-images-idx3-ubyte")).numpy())


def test_missing_idx_files_give_three_ways_to_get_them(tmp_path):
    with pytest.raises(DataError) as refused:
        Idx(root=str(tmp_path / "fashion-mnist-x")).read()
    text = str(refused.value)
    assert all(word in text for word in ("put the files", "apt-get install", "download=True"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(b"\x00\x00"), "not an IDX file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "but holds"),
        (lambda p: p.write_bytes(b"\x00\x00\x08\x01" + p.read_bytes()[4:]), "not an IDX file"),
        (lambda p: p.unlink(), "not train-images"),
    ],
)
def test_damaged_idx_files_are_named(idx_folder, damage, words):
    write_idx(idx_folder / "train-labels-idx1-ubyte", np.zeros(30, np.uint8))
    (idx_folder / "train-images-idx3-ubyte.gz").unlink()
    write_idx(idx_folder / "train-images-idx3-ubyte", np.zeros((30, 28, 28), np.uint8))
    damage(idx_folder / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match=words):
        Idx(root=str(idx_folder)).read()


def test_a_corrupt_gzip_file_is_named(idx_folder):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz"):
        Idx(root=str(idx_folder)).read()
