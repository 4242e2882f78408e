"""The handwritten digits that come with cnnrun: 1,797 images of 8 x 8 (UCI; Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# How the file was made: d = sklearn.datasets.load_digits();
# numpy.savez_compressed(FILE, images=d.images.astype("u1"), labels=d.target.astype("u1")).
_FILE = Path(__file__).with_name("digits.npz")


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [1797, 8, 8], in 17 grey levels from 0 to 255, and labels [1797]."""
    with np.load(_FILE, allow_pickle=False) as arrays:
        images = np.rint(arrays["images"] * (255 / 16)).astype(np.uint8)
        return images, arrays["labels"].astype(np.int64)
