"""Folders, arrays, MNIST's files, tar shards, faces and damaged pictures, as people have them."""

from __future__ import annotations

import io
import struct
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from three_commands import Build, Verdict, config, pixels, save

FINE = ("check",)
CLASSES = ("cat", "dog", "eel")
More = Callable[[Path], object]


def nothing(root: Path) -> None:
    """Leave the folder as it is."""


# --- folders -------------------------------------------------------------------------------------------------------


def folder(
    more: More = nothing,
    classes: tuple[str, ...] = CLASSES,
    source: str = "{folder: d}",
    task: str = "classify",
    each: int = 8,
    suffix: str = ".png",
    **data: str,
) -> Build:
    """A folder a class with 8 pictures each, and what `more` does to it."""

    def build(here: Path) -> None:
        for label, name in enumerate(classes):
            for i in range(each):
                save(here / "d" / name / f"{i}{suffix}", 100 * label + i)
        more(here / "d")
        config(here, source, task, **data)

    return build


def split_folder(more: More = nothing, **how: Any) -> Build:
    """The same in `train` and `val`."""

    def build(here: Path) -> None:
        for part, first, count in (("train", 0, 6), ("val", 50, 3)):
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    save(here / "d" / part / name / f"{i}.png", 100 * label + first + i)
        more(here / "d")
        config(here, "{folder: d}", **how)

    return build


def write(name: str, data: bytes = b"x") -> More:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return make


def copy(one: str, other: str) -> More:
    """A picture again in another place."""

    def make(root: Path) -> None:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes((root / one).read_bytes())

    return make


def clutter(root: Path) -> None:
    for name in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/._0.png",
        "cat/._0.png",
        "cat/Thumbs.db",
        ".DS_Store",
    ):
        write(name)(root)


def damaged(root: Path) -> None:
    data = (root / "cat" / "3.png").read_bytes()
    (root / "cat" / "3.png").write_bytes(data[: len(data) // 2])


def one_colour(root: Path) -> None:
    for path in root.rglob("*.png"):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(path)


def one_flat(root: Path) -> None:
    Image.new("RGB", (16, 16), (9, 9, 9)).save(root / "cat" / "3.png")


def twelve_bits(root: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        values = np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16)
        Image.fromarray(values).save(path)


def animated(root: Path) -> None:
    frames = [Image.fromarray(pixels(i)) for i in (1, 2)]
    frames[0].save(root / "cat" / "3.png", save_all=True, append_images=frames[1:])


def renamed_gif(root: Path) -> None:
    Image.fromarray(pixels(1)).save(root / "cat" / "3.gif")
    (root / "cat" / "3.gif").rename(root / "cat" / "3.png")


def jpeg_named_png(root: Path) -> None:
    made = io.BytesIO()
    Image.fromarray(pixels(1)).save(made, "JPEG")
    (root / "cat" / "3.png").write_bytes(made.getvalue())


FOLDERS = {
    "folder: plain": Verdict(folder(), 0, "3 classes", FINE),
    "folder: clutter of Jupyter, macOS and Windows": Verdict(folder(clutter), 0, "3 classes", FINE),
    "folder: .JPG and .PNG": Verdict(folder(suffix=".JPG"), 0, "train 18 val 6", FINE),
    "folder: .tif among them": Verdict(
        folder(write("cat/9.tif")), 0, "1 file(s) of other kinds left out, such as '9.tif'"
    ),
    "folder: labels.csv beside the classes": Verdict(folder(write("labels.csv", b"a,b")), 0, "labels.csv"),
    "folder: a picture beside the classes": Verdict(
        folder(lambda root: save(root / "9.png", 9)), 0, "of no class left out"
    ),
    "folder: an empty class": Verdict(folder(lambda root: (root / "fox").mkdir()), 8, "no pictures"),
    "folder: a class in val alone": Verdict(
        split_folder(lambda root: save(root / "val" / "fox" / "0.png", 999)),
        8,
        "'fox' is not a class of the training split",
    ),
    "folder: a class in train alone": Verdict(
        split_folder(lambda root: [path.unlink() for path in (root / "val" / "eel").iterdir()]),
        0,
        "no picture of eel in val",
        finding="classes without a picture in val",
    ),
    "folder: a third split called holdout": Verdict(
        split_folder(lambda root: save(root / "holdout" / "cat" / "0.png", 999)), 0, "holdout"
    ),
    "folder: images/train and images/val": Verdict(
        folder(classes=("train", "val")),
        8,
        "two or more classes",
    ),
    "folder: Cat and cat": Verdict(
        folder(classes=("Cat", "cat", "dog")), 0, "differ in writing alone", finding="'Cat' = 'cat'"
    ),
    "folder: accents in two forms": Verdict(
        folder(classes=(unicodedata.normalize("NFD", "bär"), "bär", "dog")), 0, "differ in writing alone", finding="xe4"
    ),
    "folder: a class nan": Verdict(folder(classes=("cat", "nan")), 8, "stands for a missing value"),
    "folder: one class": Verdict(folder(classes=("cat",)), 8, "two or more classes; has 1"),
    "folder: nested": Verdict(
        folder(lambda root: save(root / "cat" / "siamese" / "0.png", 999)), 0, "train 19 val 6", FINE
    ),
    "folder: all in one more folder": Verdict(
        folder(source="{folder: .}", more=lambda root: None, classes=CLASSES), 8, "two or more classes; has 1"
    ),
    "pictures: damaged": Verdict(folder(damaged), 8, "cat/3.png"),
    "pictures: damaged, skipped": Verdict(folder(damaged, bad_files="skip"), 0, "cannot be decoded"),
    "pictures: of no bytes": Verdict(folder(write("cat/3.png", b"")), 8, "empty file"),
    "pictures: a web page": Verdict(folder(write("cat/3.png", b"<!DOCTYPE html>")), 8, "a web page"),
    "pictures: a Git LFS pointer": Verdict(
        folder(write("cat/3.png", b"version https://git-lfs.github.com/spec/v1\n")), 8, "git lfs pull"
    ),
    "pictures: animated": Verdict(folder(animated), 8, "an animation"),
    "pictures: a GIF called .png": Verdict(folder(renamed_gif), 8, "not a picture"),
    "pictures: a JPEG called .png": Verdict(
        folder(jpeg_named_png), 0, "of another format than named", finding="files that are not what their name says"
    ),
    "pictures: all of one colour": Verdict(folder(one_colour), 8, "in more than one split"),
    "pictures: one of one colour": Verdict(folder(one_flat), 0, "of one single colour"),
    "pictures: all of one colour, kept": Verdict(folder(one_colour, leakage="keep"), 8, "one and the same colour"),
    "pictures: 16 bits of which 12 are used": Verdict(folder(twelve_bits), 0, "leaves 16 of 256 grey levels"),
    "pictures: of 2 pixels": Verdict(folder(lambda root: save(root / "cat" / "3.png", 3, (2, 2))), 8, "image.min_side"),
    "copies: twice in one class": Verdict(
        folder(copy("cat/0.png", "cat/9.png")), 0, "the same picture again", ("data check",)
    ),
    "copies: under two labels": Verdict(folder(copy("cat/0.png", "dog/9.png")), 8, "under more than one label"),
    "copies: under two labels, kept": Verdict(
        folder(copy("cat/0.png", "dog/9.png"), leakage="keep"),
        0,
        "under more than one label",
        finding="under several labels",
    ),
    "copies: on both sides": Verdict(
        split_folder(copy("train/cat/0.png", "val/cat/9.png")), 8, "in more than one split"
    ),
    "copies: on both sides, skipped": Verdict(
        split_folder(copy("train/cat/0.png", "val/cat/9.png"), leakage="skip"),
        0,
        "left out of training",
        finding="the same picture in several splits",
    ),
}


# --- arrays, MNIST's files, shards ---------------------------------------------------------------------------------


def arrays(labels: Any, source: str = "{arrays: a.npz}", task: str = "classify", **members: Any) -> Build:
    """A .npz of 24 pictures under Keras's names, with these labels; other members replace or add."""

    def build(here: Path) -> None:
        x = np.stack([pixels(i, (8, 8)) for i in range(24)])
        found = {"x_train": x, "y_train": np.asarray(labels)} | members
        np.savez(here / "a.npz", **{name: value for name, value in found.items() if value is not None})
        config(here, source, task)

    return build


THREES = np.arange(24) % 3


def replaced(value: int, at: int = 5) -> Any:
    labels = THREES.copy()
    labels[at] = value
    return labels


ARRAYS = {
    "arrays: plain": Verdict(arrays(THREES), 0, "3 classes", FINE),
    "arrays: labels from 1": Verdict(
        arrays(THREES + 1), 0, "no picture of 0 in train", finding="classes without a picture in train"
    ),
    "arrays: -1 for no label": Verdict(arrays(replaced(-1)), 8, "labels are 0, 1"),
    "arrays: 255 for ignore": Verdict(arrays(replaced(255).astype(np.uint8)), 8, "is 255"),
    "arrays: labels as floats": Verdict(arrays(THREES.astype(float)), 8, "expected whole numbers"),
    "arrays: labels as text": Verdict(arrays(np.array(CLASSES)[THREES]), 8, "expected whole numbers"),
    "arrays: labels one-hot": Verdict(arrays(np.eye(3, dtype=int)[THREES]), 8, "expected whole numbers [24]"),
    "arrays: labels as bools": Verdict(arrays(THREES > 0), 8, "expected whole numbers"),
    "arrays: labels [N, 1]": Verdict(arrays(THREES[:, None]), 0, "3 classes", FINE),
    "arrays: one label too few": Verdict(arrays(THREES[:-1]), 8, "expected whole numbers [24]"),
    "arrays: other keys": Verdict(
        arrays(THREES, x_train=None, y_train=None, data=np.zeros(3), target=THREES), 8, "no training arrays"
    ),
    "arrays: X and y": Verdict(
        arrays(THREES, x_train=None, y_train=None, X=np.zeros((24, 8, 8), np.uint8), y=THREES), 8, "no training arrays"
    ),
    "arrays: pictures as floats": Verdict(
        arrays(THREES, x_train=np.random.default_rng(0).random((24, 8, 8))), 8, "expected uint8"
    ),
    "arrays: channels first": Verdict(
        arrays(THREES, x_train=np.zeros((24, 3, 8, 8), np.uint8)), 8, "expected uint8 [N, H, W]"
    ),
    "arrays: objects": Verdict(arrays(np.array([*CLASSES, None] * 6, object)), 8, "holds Python objects"),
    "arrays: test pictures without labels": Verdict(
        arrays(THREES, x_test=np.zeros((4, 8, 8, 3), np.uint8)), 0, "x_test"
    ),
    "arrays: val of one array alone": Verdict(arrays(THREES, y_val=THREES[:4]), 0, "y_val"),
    "arrays: a class in test alone": Verdict(
        arrays(THREES, x_test=np.stack([pixels(90 + i, (8, 8)) for i in range(4)]), y_test=np.array([0, 1, 2, 3])),
        0,
        "no picture of 3 in train",
        finding="classes without a picture in train",
    ),
    "arrays: numbers, one of them nan": Verdict(
        arrays(np.where(THREES == 0, np.nan, 1.5), "{arrays: {path: a.npz, numbers: [age]}}", "regress"),
        8,
        "expected a finite number",
    ),
    "arrays: numbers too fine for float32": Verdict(
        arrays(1e9 + np.arange(24), "{arrays: {path: a.npz, numbers: [when]}}", "regress"), 8, "too finely for float32"
    ),
    "arrays: label sets with 2": Verdict(
        arrays(np.eye(3, dtype=int)[THREES] * 2, "{arrays: {path: a.npz, labels: [a, b, c]}}", "multilabel"),
        8,
        "expected 0 or 1",
    ),
    "arrays: label sets, a class that nobody has": Verdict(
        arrays(np.eye(4, dtype=int)[THREES], "{arrays: {path: a.npz, labels: [a, b, c, d]}}", "multilabel"),
        0,
        "no picture of d in train",
        finding="classes without a picture in train",
    ),
}


def idx(labels: Any, magic: int = 0x801, count: int | None = None, test: Any = None) -> Build:
    """MNIST's files, of 24 pictures."""

    def build(here: Path) -> None:
        (here / "d").mkdir()
        for part, of_part in (("train", labels), ("t10k", test)):
            if of_part is not None:
                x = np.stack([pixels(i + 30 * len(part), (8, 8))[:, :, 0] for i in range(24)])
                (here / "d" / f"{part}-images-idx3-ubyte").write_bytes(
                    struct.pack(">4I", 0x803, *x.shape) + x.tobytes()
                )
                y = np.asarray(of_part, np.uint8)
                head = struct.pack(">2I", magic, len(y) if count is None else count)
                (here / "d" / f"{part}-labels-idx1-ubyte").write_bytes(head + y.tobytes())
        config(here, "{idx: d}", image="{size: 8, channels: 1}")

    return build


IDX = {
    "idx: plain": Verdict(idx(THREES), 0, "3 classes", FINE),
    "idx: fewer labels than said": Verdict(idx(THREES, count=30), 8, "holds 24 bytes"),
    "idx: fewer labels than pictures": Verdict(idx(THREES[:20]), 8, "24 pictures but 20 labels"),
    "idx: another magic number": Verdict(idx(THREES, magic=0x901), 8, "not an IDX file of labels"),
    "idx: 255 among the labels": Verdict(idx(replaced(255)), 8, "is 255"),
    "idx: labels from 1, as EMNIST's letters": Verdict(
        idx(THREES + 1), 0, "no picture of 0 in train", finding="classes without a picture in train"
    ),
    "idx: labels of test alone": Verdict(
        idx(THREES, test=replaced(3)), 0, "no picture of 3 in train", finding="classes without a picture in train"
    ),
}


def shards(members: Callable[[int], dict[str, bytes]], source: str = "{shards: t.tar}") -> Build:
    """A shard of 24 samples; `members` says what of a sample is beside its picture, or in its place."""

    def build(here: Path) -> None:
        with tarfile.open(here / "t.tar", "w") as archive:
            for i in range(24):
                picture = io.BytesIO()
                Image.fromarray(pixels(i)).save(picture, "PNG")
                for name, data in ({f"{i:02}.png": picture.getvalue()} | members(i)).items():
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
        config(here, source)

    return build


def cls(i: int) -> bytes:
    return str(i % 3).encode()


SHARDS = {
    "shards: plain": Verdict(shards(lambda i: {f"{i:02}.cls": cls(i)}), 0, "3 classes", FINE),
    "shards: clutter of macOS": Verdict(
        shards(lambda i: {f"{i:02}.cls": cls(i), f"._{i:02}.png": b"x", "__MACOSX/a.png": b"x"}), 0, "3 classes", FINE
    ),
    "shards: label with a line's end": Verdict(
        shards(lambda i: {f"{i:02}.cls": CLASSES[i % 3].encode() + b"\n"}), 0, "3 classes", FINE
    ),
    "shards: a label missing": Verdict(
        shards(lambda i: {f"{i:02}.cls": cls(i)} if i != 5 else {}), 8, "has no .cls member"
    ),
    "shards: labels as .txt": Verdict(shards(lambda i: {f"{i:02}.txt": cls(i)}), 8, "has no .cls member"),
    "shards: labels as .json": Verdict(shards(lambda i: {f"{i:02}.json": b'{"label": 1}'}), 8, "has no .cls member"),
    "shards: an empty label": Verdict(shards(lambda i: {f"{i:02}.cls": b"" if i == 5 else cls(i)}), 8, "label"),
    "shards: label nan": Verdict(
        shards(lambda i: {f"{i:02}.cls": b"nan" if i == 5 else CLASSES[i % 3].encode()}),
        8,
        "stands for a missing value",
    ),
    "shards: label -1": Verdict(shards(lambda i: {f"{i:02}.cls": b"-1" if i == 5 else cls(i)}), 0, "-1"),
    "shards: labels 1 and 1.0": Verdict(
        shards(lambda i: {f"{i:02}.cls": b"1.0" if i == 4 else cls(i)}), 0, "differ in writing alone"
    ),
    "shards: labels as bytes of a number": Verdict(
        shards(lambda i: {f"{i:02}.cls": struct.pack("<q", i % 3)}), 8, "label"
    ),
    "shards: a picture twice": Verdict(
        shards(lambda i: {f"{i:02}.cls": cls(i), f"{i:02}.jpg": b"x"}), 8, "has 2 pictures"
    ),
    "shards: .tar.gz": Verdict(
        lambda here: (
            shards(lambda i: {f"{i:02}.cls": cls(i)})(here),
            (here / "t.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600)),
        )[0],
        8,
        "must be unpacked",
    ),
}


# --- faces ---------------------------------------------------------------------------------------------------------


def faces(pairs: str | None = None, each: int = 4, people: int = 8, more: More = nothing) -> Build:
    """People in folders, and LFW's file of pairs."""
    source = "{folder: d}" if pairs is None else "{folder: {root: d, pairs: pairs.txt}}"
    names = tuple(f"person_{i}" for i in range(people))

    def build(here: Path) -> None:
        if pairs is not None:
            (here / "pairs.txt").write_text(pairs)
        split = "{by: label, val: 0.25}"
        folder(more, names, source, "verify", each, split=split)(here)

    return build


PAIRS = "person_0\t0\t1\nperson_1\t0\t1\nperson_0\t0\tperson_1\t0\nperson_0\t1\tperson_1\t1\n"
FACES = {
    "verify: plain": Verdict(faces(), 0, "8 classes", FINE),
    "verify: a picture each": Verdict(faces(each=1), 8, "the val split: "),
    "verify: pairs of a file": Verdict(faces(PAIRS), 0, "8 classes", FINE),
    "verify: pairs of strangers": Verdict(faces(PAIRS + "Someone\t1\t2\n"), 8, "nobody is called 'Someone'"),
    "verify: pairs of pictures that are not there": Verdict(
        faces(PAIRS + "person_0\t0\t99\n"), 8, "has no picture '99'"
    ),
    "verify: pairs with commas": Verdict(faces(PAIRS.replace("\t", ",")), 8, "a pair is written"),
    "verify: pairs under a header of names": Verdict(
        faces("name\timagenum1\timagenum2\n" + PAIRS), 8, "nobody is called 'name'"
    ),
    "verify: one person under two names": Verdict(
        faces(more=copy("person_0/0.png", "person_5/9.png")), 8, "under more than one label"
    ),
    "verify: two people": Verdict(faces(people=2), 8, "split"),
}

INPUTS = FOLDERS | ARRAYS | IDX | SHARDS | FACES
