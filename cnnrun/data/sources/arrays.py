"""Images and targets in one NumPy .npz file."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.base.bounded_files import check_expansion, open_file
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems, join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.class_names import numbered_classes
from cnnrun.data.image_settings import MAX_CHANNELS
from cnnrun.data.npy_headers import read_npy_header
from cnnrun.data.targets import float32_problem

# The array names that Keras, MedMNIST and most others use for each split: images, labels.
_COMMON_NAMES = {
    "train": [("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y")],
    "val": [("x_val", "y_val"), ("val_images", "val_labels")],
    "test": [("x_test", "y_test"), ("test_images", "test_labels")],
}
_MAX_LABEL = 1_000_000
ArrayNames = Annotated[list[str], Field(min_length=2, max_length=2)]


class Arrays(SourceSpec):
    """A .npz file with arrays of images, [N, H, W] or [N, H, W, C], and of labels, whole numbers [N].

    Images are uint8, or uint16 and int16 for 16 bits.
    With `numbers` the second array holds numbers [N, T]; with `labels` it holds 0 and 1 [N, K].
    """

    kind = "arrays"
    main = "path"

    path: str
    train: ArrayNames | None = None
    """The names of the two training arrays, `[images, labels]`; by default the common ones (x_train and y_train, \
train_images and train_labels, images and labels, x and y)."""
    val: ArrayNames | None = None
    """The names of the two validation arrays; by default x_val and y_val, or val_images and val_labels."""
    test: ArrayNames | None = None
    """The names of the two test arrays; by default x_test and y_test, or test_images and test_labels."""
    classes: ClassNames | None = None
    """Names of the labels 0, 1, ...; by default the numbers."""
    labels: ClassNames | None = None
    """For label sets: the second array has one column of 0 and 1 for each of these classes."""
    numbers: ClassNames | None = None
    """For numbers: the second array has one column for each of these names."""

    @model_validator(mode="after")
    def _refuse_two_target_kinds(self) -> Self:
        if sum(names is not None for names in (self.classes, self.labels, self.numbers)) > 1:
            raise ValueError("give one of classes, labels and numbers")
        return self

    @property
    def target_kind(self) -> TargetKind:
        if self.labels:
            return TargetKind.LABEL_SETS
        return TargetKind.NUMBERS if self.numbers else TargetKind.LABELS

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"{escape(str(path))}: no such file")
        try:
            _refuse_large_archive(path)
            with np.load(path, allow_pickle=False) as file:
                array_names = {split: self._array_names(split, list(file.files)) for split in _COMMON_NAMES}
                read_names = {name for names in array_names.values() for name in names or ()}
                unread = [name for name in file.files if name not in read_names]
                splits = {split: self._read_split(path, file, *names) for split, names in array_names.items() if names}
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            KeyError,
            RuntimeError,
            NotImplementedError,
            ValueError,  # numpy takes a file that is not a zip for a pickle, which it refuses to read
        ) as error:
            raise DataError(f"{path}: not a .npz file: {escape(str(error))}") from None
        if "train" not in splits:
            problem = f"no training arrays among {join_names(unread) or 'none'}"
            raise DataError(f"{path}: {problem}; name them with data.source.arrays.train: [images, labels]")
        if unread:
            say(f"{escape(str(path))}: {format_count(len(unread), 'array')} not read: {join_names(unread, 3)}")
        if self.target_kind is not TargetKind.LABELS:
            return SourceContents(tuple(self.labels or ()), splits, number_names=tuple(self.numbers or ()))
        labels = np.concatenate([split.targets["labels"].numpy() for split in splits.values()])
        names = self.classes or numbered_classes(labels, escape(str(path)), "data.source.arrays.classes")
        if len(names) <= labels.max():
            raise DataError(f"{path}: has labels up to {labels.max()}, but {len(names)} names in classes")
        return SourceContents(tuple(names), splits)

    def _read_split(self, path: Path, file: Any, images_name: str, targets_name: str) -> Split:
        images, values = _read_images(path, file, images_name), _read_npy_array(path, file, targets_name)
        columns = self.labels or self.numbers
        if columns is None:
            labels = _convert_labels(path, values, targets_name, len(images))
            return Split(images, {"labels": labels}, images_name)
        numbers = _convert_numbers(path, values, targets_name, (len(images), len(columns)))
        if self.numbers:
            return Split(images, {"numbers": torch.from_numpy(numbers)}, images_name)
        if bad := np.argwhere((numbers != 0) & (numbers != 1)).tolist():
            row, column = bad[0]
            raise DataError(f"{path}: {targets_name}[{row}, {column}] is {numbers[row, column]:g}; expected 0 or 1")
        return Split(images, {"present": torch.from_numpy(numbers > 0)}, images_name)

    def _array_names(self, split: str, file_names: list[str]) -> tuple[str, str] | None:
        """The names of a split's two arrays, or None if the file has no such split.

        Raises DataError if the config names an array that the file does not have.
        """
        if config_names := getattr(self, split):
            if missing := [name for name in config_names if name not in file_names]:
                known = ", ".join(map(escape, file_names))
                raise DataError(f"{self.path}: has no array {missing[0]!r} (arrays: {known})")
            return config_names[0], config_names[1]
        return next((names for names in _COMMON_NAMES[split] if set(names) <= set(file_names)), None)


def _refuse_large_archive(path: Path) -> None:
    """Raise DataError if the arrays would not fit the memory, before any of them is unpacked."""
    with open_file(path, DataError) as file, zipfile.ZipFile(file) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    check_expansion(path, path.stat().st_size, unpacked_bytes, DataError)


def _read_images(path: Path, file: Any, name: str) -> NDArray[Any]:
    """The images in array `name`, uint8, uint16 or int16 [N, H, W, C]. Raises DataError if it holds anything else."""
    images = _read_npy_array(path, file, name)
    if images.ndim == 3:
        images = images[..., None]
    is_known = images.dtype.newbyteorder("=") in (np.uint8, np.uint16, np.int16) and images.ndim == 4
    if not is_known or not 1 <= images.shape[3] <= MAX_CHANNELS or 0 in images.shape:
        expected = f"uint8, uint16 or int16 [N, H, W] or [N, H, W, C], with up to {MAX_CHANNELS} channels"
        raise DataError(f"{path}: {name} is {images.dtype} {list(images.shape)}; expected {expected}")
    if images.shape[3] not in (1, 3) and images.shape[1] < images.shape[2] == images.shape[3]:
        hint = f"give {name}.transpose(0, 2, 3, 1)"
        raise DataError(f"{path}: {name} is {list(images.shape)}, which looks like [N, C, H, W]; {hint}")
    return np.ascontiguousarray(images, images.dtype.newbyteorder("="))


def _convert_labels(path: Path, labels: NDArray[Any], name: str, count: int) -> Tensor:
    """Convert labels to int64 [N]. Raises DataError if they are not `count` whole numbers from 0 up."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST writes them
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"{path}: {name} is {labels.dtype} {list(labels.shape)}; expected whole numbers [{count}]")
    if labels.min() < 0 or labels.max() > _MAX_LABEL:
        bad = int(np.flatnonzero((labels < 0) | (labels > _MAX_LABEL))[0])
        raise DataError(f"{path}: {name}[{bad}] is {labels[bad]}; labels are 0, 1, ...")
    return torch.from_numpy(labels.astype(np.int64))


def _convert_numbers(path: Path, values: NDArray[Any], name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Convert numbers to float32 [N, T]; a single column may be written [N]. Raises DataError if one is not finite."""
    if values.ndim == 1:
        values = values[:, None]
    if values.dtype.kind not in "iufb" or values.shape != shape:
        raise DataError(f"{path}: {name} is {values.dtype} {list(values.shape)}; expected numbers {list(shape)}")
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    if bad := np.argwhere(~np.isfinite(numbers)).tolist():
        row, column = bad[0]
        raise DataError(f"{path}: {name}[{row}, {column}] is {values[row, column]}; expected a finite number")
    if values.dtype.kind in "iuf":
        check_problems(
            f"{path}: {problem}"
            for t, column_values in enumerate(values.T)
            if (problem := float32_problem(f"{name}[:, {t}]", column_values))
        )
    return numbers


def _check_npy_header(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Raise DataError if a header claims more data than the file holds, before memory is allocated for it."""
    with archive.open(name) as file:
        try:
            shape, dtype = read_npy_header(file)
        except ValueError:
            raise DataError(f"{path}: {escape(name)} is not a NumPy array: its header cannot be read") from None
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > archive.getinfo(name).file_size:
        raise DataError(f"{path}: {escape(name)} claims the shape {list(shape)}, which is more than it holds")


def _read_npy_array(path: Path, file: Any, name: str) -> NDArray[Any]:
    """The array `name` of an opened .npz file. Raises DataError if it cannot be read as numbers."""
    try:
        _check_npy_header(path, file.zip, f"{name}.npy")
        array: NDArray[Any] = file[f"{name}.npy"]  # with its suffix: another member may be called just `name`
    except KeyError:  # a member of another kind, which numpy lists too
        problem = "is not an array: its name in the archive does not end in .npy"
        raise DataError(f"{path}: {escape(name)} {problem}") from None
    except ValueError as error:
        problem = "holds Python objects (a pickle); save it as numbers" if "allow_pickle" in str(error) else str(error)
        raise DataError(f"{path}: {escape(name)} {problem}") from None
    return array
