"""NumPy arrays, MNIST's IDX files and tar shards."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.verdicts.three_commands import Build, Verdict, change_config, pixels, write_config

FINE = ("check",)
CLASSES = ("cat", "dog", "eel")
# --- arrays, MNIST's files, shards ------------------------------------------------------------------------------------


def arrays(labels: Any, source: str = "{arrays: a.npz}", task: str = "classify", **members: Any) -> Build:
    """A .npz of 24 images under Keras's names with these labels. Other members replace or extend it."""

    def build(here: Path) -> None:
        x = np.stack([pixels(i, (8, 8)) for i in range(24)])
        found = {"x_train": x, "y_train": np.asarray(labels)} | members
        np.savez(here / "a.npz", **{name: value for name, value in found.items() if value is not None})
        write_config(here, source, task)

    return build


THREES = np.arange(24) % 3


def replace_label(value: int, at: int = 5) -> Any:
    labels = THREES.copy()
    labels[at] = value
    return labels


ARRAYS = {
    "arrays: plain": Verdict(arrays(THREES), 0, "3 classes", FINE),
    "arrays: labels from 1": Verdict(
        arrays(THREES + 1), 0, "no image of 0 in train", finding="without an image in train"
    ),
    "arrays: labels from 1, sampler balanced": Verdict(
        change_config(arrays(THREES + 1), "train: {", "train: {sampler: balanced, "),
        0,
        "sampler: balanced, an epoch shows 0 0 times",
        ("check", "train"),
    ),
    "arrays: labels from 1, class_weights balanced": Verdict(
        arrays(THREES + 1, task="{classify: {class_weights: balanced}}"), 8, "class_weights: balanced needs"
    ),
    "arrays: -1 for no label": Verdict(arrays(replace_label(-1)), 8, "labels are 0, 1"),
    "arrays: 255 for ignore": Verdict(arrays(replace_label(255).astype(np.uint8)), 8, "is 255"),
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
        "no image of 3 in train",
        finding="without an image in train",
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
        "no image of d in train",
        finding="without an image in train",
    ),
}


def idx(labels: Any, magic: int = 0x801, count: int | None = None, test: Any = None) -> Build:
    """MNIST's IDX files with 24 images."""

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
        write_config(here, "{idx: d}", image="{size: 8, channels: 1}")

    return build


IDX = {
    "idx: plain": Verdict(idx(THREES), 0, "3 classes", FINE),
    "idx: fewer labels than said": Verdict(idx(THREES, count=30), 8, "holds 24 bytes"),
    "idx: fewer labels than pictures": Verdict(idx(THREES[:20]), 8, "24 images but 20 labels"),
    "idx: another magic number": Verdict(idx(THREES, magic=0x901), 8, "not an IDX file of labels"),
    "idx: 255 among the labels": Verdict(idx(replace_label(255)), 8, "is 255"),
    "idx: labels from 1, as EMNIST's letters": Verdict(
        idx(THREES + 1), 0, "no image of 0 in train", finding="without an image in train"
    ),
    "idx: labels of test alone": Verdict(
        idx(THREES, test=replace_label(3)), 0, "no image of 3 in train", finding="without an image in train"
    ),
}


def shards(members: Callable[[int], dict[str, bytes]], source: str = "{shards: t.tar}") -> Build:
    """A shard of 24 samples. `members` gives the files of a sample beside its image or instead of it."""

    def build(here: Path) -> None:
        with tarfile.open(here / "t.tar", "w") as archive:
            for i in range(24):
                picture = io.BytesIO()
                Image.fromarray(pixels(i)).save(picture, "PNG")
                for name, data in ({f"{i:02}.png": picture.getvalue()} | members(i)).items():
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
        write_config(here, source)

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
        shards(lambda i: {f"{i:02}.cls": b"1.0" if i == 4 else cls(i)}), 0, "differ only in spelling"
    ),
    "shards: labels as bytes of a number": Verdict(
        shards(lambda i: {f"{i:02}.cls": struct.pack("<q", i % 3)}), 8, "label"
    ),
    "shards: a picture twice": Verdict(
        shards(lambda i: {f"{i:02}.cls": cls(i), f"{i:02}.jpg": b"x"}), 8, "has 2 images"
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


INPUTS = ARRAYS | IDX | SHARDS
