"""Image folders, damaged and copied images, faces with a pairs file, and configs that do not fit their data."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.verdicts.three_commands import Build, Verdict, change_config, pixels, save_square, write_config

FINE = ("check",)
CLASSES = ("cat", "dog", "eel")
More = Callable[[Path], object]


def nothing(root: Path) -> None:
    """Leave the folder as it is."""


# --- folders ----------------------------------------------------------------------------------------------------------


def folder(
    more: More = nothing,
    classes: tuple[str, ...] = CLASSES,
    source: str = "{folder: d}",
    task: str = "classify",
    each: int = 8,
    suffix: str = ".png",
    **data: str,
) -> Build:
    """One folder per class with 8 images each, changed by `more`."""

    def build(here: Path) -> None:
        for label, name in enumerate(classes):
            for i in range(each):
                save_square(here / "d" / name / f"{i}{suffix}", 100 * label + i)
        more(here / "d")
        write_config(here, source, task, **data)

    return build


def split_folder(more: More = nothing, **how: Any) -> Build:
    """Class folders in `train` and `val`, changed by `more`."""

    def build(here: Path) -> None:
        for part, first, count in (("train", 0, 6), ("val", 50, 3)):
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    save_square(here / "d" / part / name / f"{i}.png", 100 * label + first + i)
        more(here / "d")
        write_config(here, "{folder: d}", **how)

    return build


def write(name: str, data: bytes = b"x") -> More:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return make


def copy(one: str, other: str) -> More:
    """Copy an image to another path."""

    def make(root: Path) -> None:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes((root / one).read_bytes())

    return make


def add_clutter(root: Path) -> None:
    for name in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/._0.png",
        "cat/._0.png",
        "cat/Thumbs.db",
        ".DS_Store",
    ):
        write(name)(root)


def cut_image(root: Path) -> None:
    data = (root / "cat" / "3.png").read_bytes()
    (root / "cat" / "3.png").write_bytes(data[: len(data) // 2])


def make_all_flat(root: Path) -> None:
    for path in root.rglob("*.png"):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(path)


def make_one_flat(root: Path) -> None:
    Image.new("RGB", (16, 16), (9, 9, 9)).save(root / "cat" / "3.png")


def twelve_bits(root: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        values = np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16)
        Image.fromarray(values).save(path)


def add_animation(root: Path) -> None:
    frames = [Image.fromarray(pixels(i)) for i in (1, 2)]
    frames[0].save(root / "cat" / "3.png", save_all=True, append_images=frames[1:])


def add_renamed_gif(root: Path) -> None:
    Image.fromarray(pixels(1)).save(root / "cat" / "3.gif")
    (root / "cat" / "3.gif").rename(root / "cat" / "3.png")


def add_renamed_icon(root: Path) -> None:
    Image.fromarray(pixels(1)).save(root / "cat" / "3.ico")
    (root / "cat" / "3.ico").rename(root / "cat" / "3.png")


def jpeg_named_png(root: Path) -> None:
    made = io.BytesIO()
    Image.fromarray(pixels(1)).save(made, "JPEG")
    (root / "cat" / "3.png").write_bytes(made.getvalue())


FOLDERS = {
    "folder: plain": Verdict(folder(), 0, "3 classes", FINE),
    "folder: clutter of Jupyter, macOS and Windows": Verdict(folder(add_clutter), 0, "3 classes", FINE),
    "folder: .JPG and .PNG": Verdict(folder(suffix=".JPG"), 0, "train 18 val 6", FINE),
    "folder: .tif among them": Verdict(
        folder(write("cat/9.tif")), 0, "left out 1 file of other kinds, such as '9.tif'"
    ),
    "folder: labels.csv beside the classes": Verdict(folder(write("labels.csv", b"a,b")), 0, "labels.csv"),
    "folder: a picture beside the classes": Verdict(
        folder(lambda root: save_square(root / "9.png", 9)), 0, "left out 1 image outside the class folders"
    ),
    "folder: an empty class": Verdict(folder(lambda root: (root / "fox").mkdir()), 8, "no images"),
    "folder: a class in val alone": Verdict(
        split_folder(lambda root: save_square(root / "val" / "fox" / "0.png", 999)),
        8,
        "'fox' is not a class of the training split",
    ),
    "folder: a class in train alone": Verdict(
        split_folder(lambda root: [path.unlink() for path in (root / "val" / "eel").iterdir()]),
        0,
        "no image of eel in val",
        finding="without an image in val",
    ),
    "folder: a third split called holdout": Verdict(
        split_folder(lambda root: save_square(root / "holdout" / "cat" / "0.png", 999)), 0, "holdout"
    ),
    "folder: images/train and images/val": Verdict(
        folder(classes=("train", "val")),
        8,
        "two or more classes",
    ),
    "folder: Cat and cat": Verdict(
        folder(classes=("Cat", "cat", "dog")), 0, "differ only in spelling", finding="'Cat' = 'cat'"
    ),
    "folder: accents in two forms": Verdict(
        folder(classes=(unicodedata.normalize("NFD", "bär"), "bär", "dog")), 0, "differ only in spelling", finding="xe4"
    ),
    "folder: a class nan": Verdict(folder(classes=("cat", "nan")), 8, "stands for a missing value"),
    "folder: one class": Verdict(folder(classes=("cat",)), 8, "two or more classes; has 1"),
    "folder: nested": Verdict(
        folder(lambda root: save_square(root / "cat" / "siamese" / "0.png", 999)), 0, "train 19 val 6", FINE
    ),
    "folder: all in one more folder": Verdict(
        folder(source="{folder: .}", more=lambda root: None, classes=CLASSES), 8, "two or more classes; has 1"
    ),
    "pictures: damaged": Verdict(folder(cut_image), 8, "cat/3.png"),
    "pictures: damaged, skipped": Verdict(folder(cut_image, bad_files="skip"), 0, "cannot be used"),
    "pictures: of no bytes": Verdict(folder(write("cat/3.png", b"")), 8, "empty file"),
    "pictures: a web page": Verdict(folder(write("cat/3.png", b"<!DOCTYPE html>")), 8, "a web page"),
    "pictures: a Git LFS pointer": Verdict(
        folder(write("cat/3.png", b"version https://git-lfs.github.com/spec/v1\n")), 8, "git lfs pull"
    ),
    "pictures: animated": Verdict(folder(add_animation), 8, "an animation"),
    "pictures: a GIF called .png": Verdict(
        folder(add_renamed_gif), 0, "of another format than named", finding="files that are not what their name says"
    ),
    "pictures: an icon called .png": Verdict(folder(add_renamed_icon), 8, "not an image"),
    "pictures: a JPEG called .png": Verdict(
        folder(jpeg_named_png), 0, "of another format than named", finding="files that are not what their name says"
    ),
    "pictures: all of one colour": Verdict(folder(make_all_flat), 8, "in more than one split"),
    "pictures: one of one colour": Verdict(folder(make_one_flat), 0, "of one single colour"),
    "pictures: all of one colour, kept": Verdict(folder(make_all_flat, leakage="keep"), 8, "one and the same colour"),
    "pictures: 16 bits of which 12 are used": Verdict(folder(twelve_bits), 0, "leaves 16 of 256 grey levels"),
    "pictures: of 2 pixels": Verdict(
        folder(lambda root: save_square(root / "cat" / "3.png", 3, (2, 2))), 8, "image.min_side"
    ),
    "copies: twice in one class": Verdict(
        folder(copy("cat/0.png", "cat/9.png")), 0, "the same image again", ("data check",)
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
        "left out because of this",
        finding="the same image in several splits",
    ),
}


# --- faces ------------------------------------------------------------------------------------------------------------


def faces(pairs: str | None = None, each: int = 4, people: int = 8, more: More = nothing) -> Build:
    """One folder per person, and a pairs file in the format of LFW."""
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
    "verify: pairs of strangers": Verdict(
        faces(PAIRS + "Someone\t1\t2\n"), 8, "no person in the test images is called 'Someone'"
    ),
    "verify: pairs of pictures that are not there": Verdict(faces(PAIRS + "person_0\t0\t99\n"), 8, "has no image '99'"),
    "verify: pairs with commas": Verdict(faces(PAIRS.replace("\t", ",")), 8, "a pair is written"),
    "verify: pairs under a header of names": Verdict(
        faces("name\timagenum1\timagenum2\n" + PAIRS), 8, "no person in the test images is called 'name'"
    ),
    "verify: one person under two names": Verdict(
        faces(more=copy("person_0/0.png", "person_5/9.png")), 8, "under more than one label"
    ),
    "verify: two people": Verdict(faces(people=2), 8, "two or more people to learn from"),
}

WITH_WEIGHTS = "model: {weights: w.safetensors, layers: [flatten]}"
CONFIGS = {
    "config: weights missing": Verdict(
        change_config(folder(), "model: [flatten]", WITH_WEIGHTS), 3, "w.safetensors: cannot be read"
    ),
    "config: weights and a class's pictures missing": Verdict(
        change_config(folder(lambda root: (root / "fox").mkdir()), "model: [flatten]", WITH_WEIGHTS),
        3,
        "w.safetensors: cannot be read",
    ),
    "config: a batch of more than there are": Verdict(
        change_config(folder(), "batch: 4", "batch: 400"), 2, "400 is more than the 18 training pictures"
    ),
    "config: no val": Verdict(folder(split="{val: 0}"), 8, "the data has no val split"),
    "config: two class weights for three classes": Verdict(
        change_config(split_folder(), "task: classify", "task: {classify: {class_weights: [1, 2]}}"),
        2,
        "class_weights has 2 numbers; the data has 3 classes",
    ),
}

INPUTS = CONFIGS | FOLDERS | FACES
