"""Pictures in one NumPy file."""

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

from cnnrun.base.bounded_files import open_file, refuse_expansion
from cnnrun.base.error_lines import join_names, refuse_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.class_names import float32_problem, numbered_classes

# The names that Keras, MedMNIST and most others use, for each split: pictures and labels.
_USUAL = {
    "train": [("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y")],
    "val": [("x_val", "y_val"), ("val_images", "val_labels")],
    "test": [("x_test", "y_test"), ("test_images", "test_labels")],
}
ArrayNames = Annotated[list[str], Field(min_length=2, max_length=2)]


class Arrays(SourceSpec):
    """A .npz file with arrays of pictures, uint8 [N, H, W] or [N, H, W, C], and of labels, whole numbers [N].

    Or, with `numbers` or `labels`, of numbers [N, T], or of 0 and 1 [N, K].
    """

    kind = "arrays"
    main = "path"

    path: str
    train: ArrayNames | None = None
    """The names of the two arrays, `[pictures, labels]`; by default the usual ones (x_train and y_train, \
train_images and train_labels, images and labels, x and y)."""
    val: ArrayNames | None = None
    """Likewise."""
    test: ArrayNames | None = None
    """Likewise."""
    classes: ClassNames | None = None
    """Names of the labels 0, 1, ...; by default the numbers."""
    labels: ClassNames | None = None
    """The second array is of label sets, a column of 0 and 1 for each of these classes."""
    numbers: ClassNames | None = None
    """The second array is of numbers, which are called so, a column each."""

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> Self:
        if sum(each is not None for each in (self.classes, self.labels, self.numbers)) > 1:
            raise ValueError("give one of classes, labels and numbers")
        return self

    @property
    def target_kind(self) -> str:
        return "label sets" if self.labels else "numbers" if self.numbers else "labels"

    def read(self, apart: bool = False) -> SourceContents:
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"{escape(str(path))}: no such file")
        try:
            _bounded(path)
            with np.load(path, allow_pickle=False) as file:
                found = {split: self._names(split, list(file.files)) for split in _USUAL}
                unread = [name for name in file.files if not any(name in (names or ()) for names in found.values())]
                splits = {name: self._split(path, file, *names) for name, names in found.items() if names}
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            KeyError,
            RuntimeError,
            NotImplementedError,
            ValueError,  # what is no zip numpy takes for a pickle, which it does not read
        ) as error:
            raise DataError(f"{path}: not a .npz file: {escape(str(error))}") from None
        if "train" not in splits:
            known = f"no training arrays among {join_names(unread) or 'none'}"
            raise DataError(f"{path}: {known}; data.source.arrays.train: [pictures, labels] names them")
        if unread:
            say(f"{escape(str(path))}: {len(unread):,} array(s) not read: {join_names(unread, 3)}")
        if self.target_kind != "labels":
            return SourceContents(tuple(self.labels or ()), splits, number_names=tuple(self.numbers or ()))
        labels = np.concatenate([split.targets["labels"].numpy() for split in splits.values()])
        names = self.classes or numbered_classes(labels, escape(str(path)), "data.source.arrays.classes")
        if len(names) <= labels.max():
            raise DataError(f"{path}: has labels up to {labels.max()}, but {len(names)} names are given in classes")
        return SourceContents(tuple(names), splits)

    def _split(self, path: Path, file: Any, pictures: str, known: str) -> Split:
        made, values = _pictures(path, file, pictures), _array(path, file, known)
        columns = self.labels or self.numbers
        if columns is None:
            return Split(made, {"labels": _labels(path, values, known, len(made))}, pictures)
        found = _columns(path, values, known, (len(made), len(columns)))
        if self.numbers:
            return Split(made, {"numbers": torch.from_numpy(found)}, pictures)
        if bad := np.argwhere((found != 0) & (found != 1)).tolist():
            row, column = bad[0]
            raise DataError(f"{path}: {known}[{row}, {column}] is {found[row, column]:g}; expected 0 or 1")
        return Split(made, {"present": torch.from_numpy(found > 0)}, pictures)

    def _names(self, split: str, there: list[str]) -> tuple[str, str] | None:
        if given := getattr(self, split):
            if missing := [name for name in given if name not in there]:
                known = ", ".join(map(escape, there))
                raise DataError(f"{self.path}: has no array {missing[0]!r} (arrays: {known})")
            return given[0], given[1]
        return next((names for names in _USUAL[split] if set(names) <= set(there)), None)


def _bounded(path: Path) -> None:
    """Refuse what would not fit the machine, before anything of it is unpacked."""
    with open_file(path, DataError) as file, zipfile.ZipFile(file) as archive:
        needed = sum(entry.file_size for entry in archive.infolist())
    refuse_expansion(path, path.stat().st_size, needed, DataError)


def _pictures(path: Path, file: Any, pictures: str) -> NDArray[np.uint8]:
    made = _array(path, file, pictures)
    if made.ndim == 3:
        made = made[..., None]
    if made.dtype != np.uint8 or made.ndim != 4 or made.shape[3] not in (1, 3) or 0 in made.shape:
        raise DataError(
            f"{path}: {pictures} is {made.dtype} {list(made.shape)}; expected uint8 [N, H, W] or [N, H, W, 1 or 3]"
        )
    return np.ascontiguousarray(made)


def _labels(path: Path, numbers: NDArray[Any], labels: str, count: int) -> Tensor:
    if numbers.ndim == 2 and numbers.shape[1] == 1:  # as MedMNIST writes them
        numbers = numbers[:, 0]
    if numbers.dtype.kind not in "iu" or numbers.shape != (count,):
        raise DataError(f"{path}: {labels} is {numbers.dtype} {list(numbers.shape)}; expected whole numbers [{count}]")
    if numbers.min() < 0 or numbers.max() > 1_000_000:
        bad = int(np.flatnonzero((numbers < 0) | (numbers > 1_000_000))[0])
        raise DataError(f"{path}: {labels}[{bad}] is {numbers[bad]}; labels are 0, 1, ...")
    return torch.from_numpy(numbers.astype(np.int64))


def _columns(path: Path, values: NDArray[Any], name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Finite numbers [N, T]; a single column may be written [N]."""
    if values.ndim == 1:
        values = values[:, None]
    if values.dtype.kind not in "iufb" or values.shape != shape:
        raise DataError(f"{path}: {name} is {values.dtype} {list(values.shape)}; expected numbers {list(shape)}")
    with np.errstate(over="ignore"):
        made = values.astype(np.float32)
    if bad := np.argwhere(~np.isfinite(made)).tolist():
        row, column = bad[0]
        raise DataError(f"{path}: {name}[{row}, {column}] is {values[row, column]}; expected a finite number")
    if values.dtype.kind in "iuf":
        refuse_problems(
            f"{path}: {problem}"
            for t, each in enumerate(values.T)
            if (problem := float32_problem(f"{name}[:, {t}]", each))
        )
    return made


def _check_header(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse a header that claims more than the file holds, before memory is taken for it."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, kind = read(file)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise DataError(f"{path}: {escape(name)} has a header that is none of numpy's") from None
    if not kind.hasobject and math.prod(shape) * kind.itemsize > archive.getinfo(name).file_size:
        raise DataError(f"{path}: {escape(name)} says {list(shape)}, which is more than it holds")


def _array(path: Path, file: Any, name: str) -> NDArray[Any]:
    try:
        _check_header(path, file.zip, f"{name}.npy")
        array: NDArray[Any] = file[f"{name}.npy"]  # by its own name: there may be a member called `name` as well
    except ValueError as error:
        what = "holds Python objects (a pickle); save it as numbers" if "allow_pickle" in str(error) else str(error)
        raise DataError(f"{path}: {escape(name)} {what}") from None
    return array
