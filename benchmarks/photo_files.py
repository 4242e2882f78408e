"""Photos for measurements: JPEG files with details of all sizes and noise, no two equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

HeightWidth = tuple[int, int]


def write_photos(folder: Path, count: int, size: HeightWidth, scene_size: HeightWidth) -> None:
    """Write `count` JPEGs of `size` in two classes: parts of a scene, to which noise is added elsewhere each time."""
    rng = np.random.default_rng(0)
    (height, width), (scene_height, scene_width) = size, scene_size
    scene = np.full((scene_height, scene_width, 3), 128, np.float32)
    for octave in range(1, 10):
        coarse = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        for c in range(3):
            layer = Image.fromarray(coarse[..., c]).resize((scene_width, scene_height), Image.Resampling.BICUBIC)
            scene[..., c] += 60 * 0.6**octave * np.asarray(layer)
    noise = rng.normal(0, 5, (scene_height, scene_width, 1)).astype(np.float32)
    for number in range(count):
        top, noise_top = rng.integers(0, scene_height - height, 2)
        left, noise_left = rng.integers(0, scene_width - width, 2)
        photo = scene[top : top + height, left : left + width]
        photo = photo + noise[noise_top : noise_top + height, noise_left : noise_left + width]
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8)).save(path, quality=90)
