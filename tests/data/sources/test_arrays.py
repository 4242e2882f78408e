from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from cnnrun.base.errors import DataError
from cnnrun.data.sources.arrays import Arrays


def pictures(count=6, *shape) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *(shape or (8, 9, 3))), dtype=np.uint8)


def save_arrays(path, **arrays) -> Arrays:
    np.savez(path, **arrays)
    return Arrays(path=str(path))


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y")])
def test_common_array_names_are_recognised(tmp_path, names):
    x, y = pictures(), np.array([0, 1, 2, 0, 1, 2])
    indexed = save_arrays(tmp_path / "a.npz", **dict(zip(names, (x, y), strict=True))).read()
    assert indexed.classes == ("0", "1", "2")
    assert np.array_equal(indexed.splits["train"].images, x)
    assert indexed.splits["train"].targets["labels"].tolist() == y.tolist()


def test_splits_grey_images_and_medmnists_label_columns_are_read(tmp_path):
    x, y = pictures(6, 8, 8), np.array([[0], [1], [0], [1], [0], [1]], np.uint8)
    given = {
        f"{split}_{what}": value for split in ("train", "val", "test") for what, value in (("images", x), ("labels", y))
    }
    indexed = save_arrays(tmp_path / "a.npz", **given).read()
    assert set(indexed.splits) == {"train", "val", "test"}
    assert indexed.splits["val"].images.shape == (6, 8, 8, 1)
    assert indexed.splits["val"].sample_name(3) == "val_images[3]"


def test_array_names_can_be_given(tmp_path):
    np.savez(tmp_path / "a.npz", p=pictures(), q=np.arange(6) % 2)
    assert len(Arrays(path=str(tmp_path / "a.npz"), train=["p", "q"]).read().splits["train"]) == 6
    with pytest.raises(DataError, match=r"has no array 'r' \(arrays: p, q\)"):
        Arrays(path=str(tmp_path / "a.npz"), train=["p", "r"]).read()
    with pytest.raises(DataError, match="no training arrays"):
        Arrays(path=str(tmp_path / "a.npz")).read()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (pictures().astype(np.float32), np.arange(6), "x is float32"),
        (pictures(6, 8, 8, 257), np.arange(6), "expected uint8"),
        (pictures(6, 3, 32, 32), np.arange(6), r"looks like \[N, C, H, W\]; give x.transpose\(0, 2, 3, 1\)"),
        (pictures(), np.arange(5), r"y is int64 \[5\]; expected whole numbers \[6\]"),
        (pictures(), np.arange(6) / 2, "expected whole numbers"),
        (pictures(), np.array([0, 1, -1, 0, 1, 0]), r"y\[2\] is -1"),
        (pictures(), np.array([0, 1, 2**40, 0, 1, 0]), r"y\[2\] is 1099511627776"),
        (pictures(), np.array([{}, 1, 2, 3, 4, 5], dtype=object), "holds Python objects"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, x, y, words):
    with pytest.raises(DataError, match=words):
        save_arrays(tmp_path / "a.npz", x=x, y=y).read()


def test_labels_beyond_the_class_names_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=pictures(), y=np.array([0, 1, 255, 0, 1, 0]))
    with pytest.raises(DataError, match="labels up to 255, but 10 names"):
        Arrays(path=str(tmp_path / "a.npz"), classes=list("abcdefghij")).read()


def test_damaged_files_and_decompression_bombs_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"not a \.npz file"):
        Arrays(path=str(tmp_path / "a.npz")).read()
    with pytest.raises(DataError, match="no such file"):
        Arrays(path=str(tmp_path / "b.npz")).read()
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.npy", b"")
        archive.infolist()[0].file_size = 1 << 50  # a header may claim what it likes
    with pytest.raises(DataError, match="would unpack|not a .npz"):
        Arrays(path=str(tmp_path / "c.npz")).read()


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_damaged_compressed_file_is_named(tmp_path, at):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=pictures(40), y=np.arange(40) % 3)
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place : place + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npz"):
        Arrays(path=str(path)).read()


def test_an_array_header_larger_than_the_file_takes_no_memory(tmp_path):
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"0" * 100)
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(DataError, match="more than it holds"):
        Arrays(path=str(path)).read()


def write_arrays(path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_numbers_and_label_sets_have_a_column_each(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (6, 5, 4), dtype=np.uint8)
    values = np.random.default_rng(0).normal(size=(6, 2))
    path = write_arrays(tmp_path / "a.npz", x_train=pictures, y_train=values)
    indexed = Arrays(path=path, numbers=["height", "weight"]).read()
    assert indexed.number_names == ("height", "weight")
    assert indexed.splits["train"].targets["numbers"].numpy() == pytest.approx(values, rel=1e-6)
    path = write_arrays(tmp_path / "b.npz", x_train=pictures, y_train=values[:, 0])
    assert Arrays(path=path, numbers=["height"]).read().splits["train"].targets["numbers"].shape == (6, 1)
    path = write_arrays(tmp_path / "c.npz", x_train=pictures, y_train=(values > 0).astype(np.int8))
    indexed = Arrays(path=path, labels=["a", "b"]).read()
    assert indexed.classes == ("a", "b")
    assert indexed.splits["train"].targets["present"].tolist() == (values > 0).tolist()


@pytest.mark.parametrize(
    ("values", "words", "said"),
    [
        (np.zeros((6, 3)), {"numbers": ["a"]}, r"float64 \[6, 3\]; expected numbers \[6, 1\]"),
        (np.zeros(5), {"numbers": ["a"]}, r"expected numbers \[6, 1\]"),
        (np.array(["1"] * 6), {"numbers": ["a"]}, "expected numbers"),
        (np.array([1, 2, np.nan, 4, 5, 6]), {"numbers": ["a"]}, r"y_train\[2, 0\] is nan; expected a finite number"),
        (np.full(6, 1e300), {"numbers": ["a"]}, r"y_train\[0, 0\] is 1e\+300; expected a finite"),
        (np.array([0, 1, 2, 0, 1, 0]), {"labels": ["a"]}, r"y_train\[2, 0\] is 2; expected 0 or 1"),
    ],
)
def test_invalid_columns_are_named(tmp_path, values, words, said):
    pictures = np.zeros((6, 5, 4), np.uint8)
    path = write_arrays(tmp_path / "a.npz", x_train=pictures, y_train=values)
    with pytest.raises(DataError, match=said):
        Arrays(path=path, **words).read()


def test_an_array_is_the_npy_member_of_its_name(tmp_path):
    """numpy would open a member called `x` for `x`, even if there is an `x.npy`."""
    images, labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.arange(4)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in (("x.npy", images), ("y.npy", labels)):
            with archive.open(name, "w") as file:
                np.lib.format.write_array(file, array)
        archive.writestr("x", b"garbage")
    read = Arrays(path=str(tmp_path / "a.npz")).read().splits["train"]
    assert np.array_equal(read.images[..., 0], images)


def test_a_member_without_the_suffix_of_arrays_is_named(tmp_path):
    x, y = pictures(), np.arange(6) % 2
    save_arrays(tmp_path / "a.npz", x_train=x, y_train=y)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("images", b"no array")
    assert len(Arrays(path=str(tmp_path / "a.npz")).read().splits["train"]) == 6
    with pytest.raises(DataError, match=r"images is not an array: its name in the archive does not end in \.npy"):
        Arrays(path=str(tmp_path / "a.npz"), train=["images", "y_train"]).read()


def test_a_stray_label_is_refused_unless_all_classes_are_named(tmp_path):
    x, y = pictures(), np.array([0, 1, 2, 0, 1, 255])
    with pytest.raises(DataError, match="is 255, which occurs 1 time"):
        save_arrays(tmp_path / "a.npz", x_train=x, y_train=y).read()
    names = [f"c{number}" for number in range(256)]
    assert Arrays(path=str(tmp_path / "a.npz"), classes=names).read().classes == tuple(names)
