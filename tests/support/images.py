"""Files of small images: random images, and those for each task of `configs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """Save an image of random pixels; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_class_folders(
    root: Path, classes: Sequence[str] = ("cat", "dog"), count: int = 24, size: tuple[int, int] = (8, 8)
) -> Path:
    """Save `count` random images for each class, in one folder per class."""
    for label, name in enumerate(classes):
        for number in range(count):
            save_picture(root / name / f"{number}.png", seed=100 * label + number, size=size)
    return root


def write_pictures(root: Path) -> Path:
    """Write two class folders of 30 small images, and beside them the files of the other tasks."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(30):
            pixels = noise.integers(0, 200, (8, 8), dtype=np.uint8) + np.uint8(40 * label)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    write_scenes(root.parent / "scenes")
    write_masks(root.parent / "masks")
    rows = [f"{path.relative_to(root.parent)},{noise.random():.4f},{360 * noise.random():.2f},{'ab'[noise.integers(2)]}"
            for path in sorted(root.rglob("*.png"))]  # fmt: skip
    (root.parent / "numbers.csv").write_text("\n".join(["path,level,turn,marks", *rows]) + "\n")
    for number in range(60):
        (root.parent / "people" / f"s{number % 10}").mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(15 * (number % 10))
        Image.fromarray(pixels).save(root.parent / "people" / f"s{number % 10}" / f"{number}.png")
    return root


def write_masks(root: Path) -> None:
    """Write 40 images with one bright square each, and masks of it with a border that is to ignore."""
    noise = np.random.default_rng(2)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(40):
        pixels, mask = noise.integers(0, 60, (16, 16), dtype=np.uint8), np.zeros((16, 16), np.uint8)
        x, y = noise.integers(1, 8, 2).tolist()
        pixels[y : y + 6, x : x + 6] = 200
        mask[y - 1 : y + 7, x - 1 : x + 7] = 255
        mask[y : y + 6, x : x + 6] = 1
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")


def write_scenes(root: Path) -> None:
    """Write 40 images with one bright box each, in the layout of VOC."""
    noise = np.random.default_rng(1)
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for number in range(40):
        pixels = noise.integers(0, 60, (16, 16), dtype=np.uint8)
        x, y = noise.integers(0, 9, 2).tolist()
        pixels[y : y + 6, x : x + 6] = 200
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{number}.png")
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 6}</xmax><ymax>{y + 6}</ymax>"
        written = f"<object><name>box</name><bndbox>{box}</bndbox></object>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{written}</annotation>")
