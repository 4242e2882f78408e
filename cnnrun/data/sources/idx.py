"""MNIST's own file format, which Fashion-MNIST and others share: plain or .gz."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.bounded_files import open_file, open_gzip, refuse_expansion
from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.class_names import numbered_classes

# Where Debian's packages put them: `apt-get install dataset-fashion-mnist`.
DEBIAN_FOLDER = Path("/usr/share/datasets")
_PARTS = {"train": "train", "test": "t10k"}
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_MAGIC = {"images": 0x00000803, "labels": 0x00000801}


class Idx(SourceSpec):
    """Files such as train-images-idx3-ubyte(.gz) in `root`, in torchvision's `*/raw` below it, or in Debian's place."""

    kind = "idx"
    main = "root"
    image = (1, 28, 28)

    root: str = "data/fashion-mnist"
    classes: ClassNames | None = None
    """Names of the labels 0, 1, ...; by default Fashion-MNIST's where the folder is called so, else the numbers."""

    def read(self, apart: bool = False) -> SourceContents:
        folder = self._folder()
        splits = {name: _split(folder, part) for name, part in _PARTS.items() if _find(folder, part, "images")}
        if "train" not in splits:
            raise DataError(f"{folder}: holds the test files but not train-images-idx3-ubyte")
        labels = np.concatenate([split.targets["labels"].numpy() for split in splits.values()])
        fashion = "fashion" in self.root.lower().replace("-", "") and labels.max() == len(_FASHION) - 1
        names = self.classes or (list(_FASHION) if fashion else None)
        names = names or numbered_classes(labels, escape(str(folder)), "data.source.idx.classes")
        if len(names) <= labels.max():
            raise DataError(f"{folder}: has labels up to {labels.max()}, but {len(names)} names are given in classes")
        return SourceContents(tuple(names), splits)

    def _folder(self) -> Path:
        root = Path(self.root)
        places = [root, *sorted(root.glob("*/raw")), DEBIAN_FOLDER / root.name]
        for place in places:
            if _find(place, "train", "images") or _find(place, "t10k", "images"):
                return place
        looked = ", ".join(str(place) for place in places)
        raise DataError(
            f"no train-images-idx3-ubyte(.gz) in {looked}. Three ways: put the files into {root}; "
            f"`apt-get install dataset-{root.name}` (Debian has fashion-mnist); "
            f"or `python -c \"import torchvision; torchvision.datasets.FashionMNIST('{root}', download=True)\"`"
        )


def _find(folder: Path, part: str, what: str) -> Path | None:
    dimensions = {"images": 3, "labels": 1}[what]
    for name in (f"{part}-{what}-idx{dimensions}-ubyte", f"{part}-{what}.idx{dimensions}-ubyte"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _split(folder: Path, part: str) -> Split:
    images_path, labels_path = _find(folder, part, "images"), _find(folder, part, "labels")
    if images_path is None or labels_path is None:
        raise DataError(f"{folder}: {part}-labels-idx1-ubyte is missing")
    images, labels = _array(images_path, "images"), _array(labels_path, "labels")
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} pictures but {len(labels)} labels for {part}")
    targets = {"labels": torch.from_numpy(labels.astype(np.int64))}
    return Split(images[..., None], targets, images_path.name)


def _array(path: Path, what: str) -> NDArray[np.uint8]:
    """The array in an IDX file: a magic number, the sizes as big-endian 32-bit numbers, then the bytes."""
    dimensions = {"images": 3, "labels": 1}[what]
    with open_gzip(path, DataError) if path.suffix == ".gz" else open_file(path, DataError) as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or int.from_bytes(header[:4], "big") != _MAGIC[what]:
            raise DataError(f"{path}: not an IDX file of {what}")
        shape = tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
        count = math.prod(shape)
        refuse_expansion(path, path.stat().st_size, count, DataError)  # before any of it is unpacked
        data = file.read(count)
        if not count or len(data) < count or file.read(1):
            held = f"{len(data):,}" if len(data) < count else "more"
            raise DataError(f"{path}: says {shape} but holds {held} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape)
