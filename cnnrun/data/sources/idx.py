"""IDX files, the format of MNIST, Fashion-MNIST and others: plain or .gz."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.bounded_files import check_expansion, open_file, open_gzip
from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.class_names import numbered_classes

# Where Debian's packages put the files: `apt-get install dataset-fashion-mnist`.
DEBIAN_FOLDER = Path("/usr/share/datasets")
_FILE_PREFIXES = {"train": "train", "test": "t10k"}
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_DIMENSIONS = {"images": 3, "labels": 1}
_MAGIC = {"images": 0x00000803, "labels": 0x00000801}


class Idx(SourceSpec):
    """Files such as train-images-idx3-ubyte(.gz) in `root`, torchvision's `*/raw` below it, or Debian's folder."""

    kind = "idx"
    main = "root"
    image_shape = (1, 28, 28)

    root: str = "data/fashion-mnist"
    """The folder that holds the files."""
    classes: ClassNames | None = None
    """Names of the labels 0, 1, ...; by default Fashion-MNIST's if the folder has its name, else the numbers."""

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        folder = self._find_folder()
        splits = {
            split: _read_split(folder, prefix)
            for split, prefix in _FILE_PREFIXES.items()
            if _find_file(folder, prefix, "images")
        }
        if "train" not in splits:
            raise DataError(f"{folder}: holds the test files but not train-images-idx3-ubyte")
        labels = np.concatenate([split.targets["labels"].numpy() for split in splits.values()])
        is_fashion = "fashion" in self.root.lower().replace("-", "") and labels.max() == len(_FASHION_CLASSES) - 1
        names = self.classes or (list(_FASHION_CLASSES) if is_fashion else None)
        names = names or numbered_classes(labels, escape(str(folder)), "data.source.idx.classes")
        if len(names) <= labels.max():
            raise DataError(f"{folder}: has labels up to {labels.max()}, but {len(names)} names in classes")
        return SourceContents(tuple(names), splits)

    def _find_folder(self) -> Path:
        """The first folder that holds images. Raises DataError, with ways to get the files, if there is none."""
        root = Path(self.root)
        folders = [root, *sorted(root.glob("*/raw")), DEBIAN_FOLDER / root.name]
        for folder in folders:
            if any(_find_file(folder, prefix, "images") for prefix in _FILE_PREFIXES.values()):
                return folder
        searched = ", ".join(map(str, folders))
        raise DataError(
            f"no train-images-idx3-ubyte(.gz) in {searched}. Three ways: put the files into {root}; "
            f"`apt-get install dataset-{root.name}` (Debian has fashion-mnist); "
            f"or `python -c \"import torchvision; torchvision.datasets.FashionMNIST('{root}', download=True)\"`"
        )


def _find_file(folder: Path, prefix: str, content: str) -> Path | None:
    """The file of `images` or `labels`, plain or .gz, under either of the two common names; None if there is none."""
    dimensions = _DIMENSIONS[content]
    for name in (f"{prefix}-{content}-idx{dimensions}-ubyte", f"{prefix}-{content}.idx{dimensions}-ubyte"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _read_split(folder: Path, prefix: str) -> Split:
    images_path, labels_path = _find_file(folder, prefix, "images"), _find_file(folder, prefix, "labels")
    if images_path is None or labels_path is None:
        raise DataError(f"{folder}: {prefix}-labels-idx1-ubyte is missing")
    images, labels = _read_idx_array(images_path, "images"), _read_idx_array(labels_path, "labels")
    if len(images) != len(labels):
        counts = f"{format_count(len(images), 'image')} but {format_count(len(labels), 'label')}"
        raise DataError(f"{folder}: {counts} for {prefix}")
    targets = {"labels": torch.from_numpy(labels.astype(np.int64))}
    return Split(images[..., None], targets, images_path.name)


def _read_idx_array(path: Path, content: str) -> NDArray[np.uint8]:
    """The array in an IDX file, which is a magic number, the sizes as big-endian 32-bit integers, then the bytes.

    Raises DataError if the file is not one of `content` (images or labels), or is longer or shorter than it claims.
    """
    dimensions = _DIMENSIONS[content]
    with open_gzip(path, DataError) if path.suffix == ".gz" else open_file(path, DataError) as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or int.from_bytes(header[:4], "big") != _MAGIC[content]:
            raise DataError(f"{path}: not an IDX file of {content}")
        shape = tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
        count = math.prod(shape)
        check_expansion(path, path.stat().st_size, count, DataError)  # before it is unpacked
        data = file.read(count)
        if not count or len(data) < count or file.read(1):
            size = f"{len(data):,}" if len(data) < count else "more"
            raise DataError(f"{path}: claims the shape {shape} but holds {size} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape)
