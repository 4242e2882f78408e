"""Names of image files: the suffixes of each format, and which files of a folder are images."""

from __future__ import annotations

import os
from collections.abc import Iterable

from cnnrun.base.file_sequences import is_hidden_or_system_name

FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "PPM": (".pgm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif"),
    "NPY": (".npy",),
}
SUFFIXES = {suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes}
_ARRAY_SUFFIX = ".npy"
FACES_TABLE = "faces.csv"  # which `cnnrun faces` writes beside the faces
SUFFIX_LIST = ", ".join(sorted(SUFFIXES))


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image, in any case, and is not a hidden or temporary file."""
    return not is_hidden_or_system_name(name) and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def choose_images(names: Iterable[str]) -> list[str]:
    """The image files among names or paths. NumPy arrays, which may hold anything, are images only beside no others."""
    images = [name for name in names if is_image_name(os.path.basename(name))]  # noqa: PTH119
    return [name for name in images if not name.lower().endswith(_ARRAY_SUFFIX)] or images
