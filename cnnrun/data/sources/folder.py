"""Images in folders, one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files, is_hidden_or_system_name
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.image_names import FACES_TABLE, SUFFIX_LIST, choose_images, is_image_name
from cnnrun.data.sources.lfw_pairs import pair_targets, read_pairs
from cnnrun.data.split_names import parse_split_name


class Folder(SourceSpec):
    """`root/train/cat/1.jpg`, `root/val/...`, `root/test/...`; or `root/cat/1.jpg`, which `data.split` divides.

    With `data.split.by: label` a folder is a person, for example, and no person is in two splits.
    """

    kind = "folder"
    main = "root"

    root: str
    classes: ClassNames | None = None
    """The classes in the order of their labels; by default the folders' names, sorted as torchvision does."""
    pairs: str | None = None
    """A file of pairs in LFW's format, on which test is measured. Without a test folder, test is the people in it."""

    @property
    def has_pairs(self) -> bool:
        return self.pairs is not None

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        folders = _split_folders(root)
        if folders and "train" not in folders:
            raise DataError(f"{root}: has {', '.join(f.name for f in folders.values())} but no train folder")
        pairs = [Path(self.pairs)] if self.pairs else []
        if folders:
            _say_unread(root, [*folders.values(), *pairs], "splits")
        folders = folders or {"train": root}
        for folder in folders.values():
            _say_unread(folder, pairs, "classes")
        class_folders = folders.values() if has_disjoint_classes else [folders["train"]]
        classes = self.classes or sorted({name for folder in class_folders for name in _class_names(folder)})
        if len(classes) < 2:
            raise DataError(f"{folders['train']}: needs a folder for each of two or more classes; has {len(classes)}")
        self._refuse_unknown_folders(folders, classes)
        splits = {
            name: _read_split(folder, classes, root, name, has_disjoint_classes) for name, folder in folders.items()
        }
        if self.pairs is not None:
            splits = _add_pairs(splits, classes, Path(self.pairs))
        return SourceContents(tuple(classes), splits)

    def _refuse_unknown_folders(self, folders: Mapping[str, Path], classes: Sequence[str]) -> None:
        """Raise DataError if the folder of a split holds a folder that is not a class."""
        problem = "is not in data.source.folder.classes" if self.classes else "is not a class of the training split"
        for folder in folders.values():
            if unknown := [name for name in _class_names(folder) if name not in classes]:
                raise DataError(f"{folder}: folder {escape(unknown[0])!r} {problem}")


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` that are named like splits. Raises DataError if two of them name the same split."""
    folders: dict[str, Path] = {}
    for entry in sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not is_hidden_or_system_name(entry.name)
    ):
        if split := parse_split_name(entry.name):
            if split in folders:
                raise DataError(f"{escape(str(root))}: both {folders[split].name} and {entry.name} are {split} folders")
            folders[split] = entry
    return folders


def _say_unread(folder: Path, read_paths: Sequence[Path], level: Literal["splits", "classes"]) -> None:
    """Say which entries of a folder of splits or classes are not read; `_read_split` reports images without a class."""
    names = sorted(
        entry.name for entry in folder.iterdir() if entry not in read_paths and not is_hidden_or_system_name(entry.name)
    )
    if level == "classes":
        names = [name for name in names if (folder / name).is_file() and not is_image_name(name)]
        names = [name for name in names if name != FACES_TABLE]
    if names:
        say(f"{escape(str(folder))}: not read, besides the {level}: {join_names(names, 3)}")


def _class_names(folder: Path) -> list[str]:
    """The names of the class folders in the folder of a split, sorted."""
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden_or_system_name(entry.name)
    )


def _add_pairs(splits: dict[str, Split], classes: list[str], path: Path) -> dict[str, Split]:
    """The splits, with the pairs of a file as targets of test.

    Without a test split, the images of all people in the file become test. Raises DataError if nobody is left in train.
    """
    lines, header = read_pairs(path)
    if "test" not in splits:
        train, people = splits["train"], {name for line in lines for name in line.people}
        is_test = torch.tensor([name in people for name in classes])[train.targets["labels"]]
        splits = splits | {"train": _select(train, ~is_test), "test": _select(train, is_test)}
        if is_test.all():
            raise DataError(f"{path}: lists every person, so none is left to train on")
    test = splits["test"]
    images_by_person: dict[str, list[tuple[str, int]]] = {}
    for index, label in enumerate(test.targets["labels"].tolist()):
        images_by_person.setdefault(classes[label], []).append((Path(test.sample_name(index)).name, index))
    pairs = pair_targets(path, lines, header, images_by_person, len(test))
    return splits | {"test": replace(test, targets=test.targets | {"number": torch.arange(len(test)), "pairs": pairs})}


def _select(split: Split, mask: Tensor) -> Split:
    """The samples where the mask, bool [N], is true."""
    assert isinstance(split.images, Files)
    files = Files([os.fsdecode(split.images.path_bytes(index)) for index in mask.nonzero()[:, 0].tolist()])
    return replace(split, images=files, targets={name: values[mask] for name, values in split.targets.items()})


def _read_split(folder: Path, classes: list[str], root: Path, split: str, has_disjoint_classes: bool) -> Split:
    """List the images of a split, class by class.

    Raises DataError for a class without images in train. With `has_disjoint_classes`, a class that
    has no folder in train is allowed: it may be in another split.
    """
    loose = [entry.name for entry in folder.iterdir() if entry.is_file() and is_image_name(entry.name)]
    if loose:
        left_out = format_count(len(loose), "image")
        say(f"{escape(str(folder))}: left out {left_out} outside the class folders, such as {escape(min(loose))!r}")
    files_by_class = [_image_paths(folder / name, root) for name in classes]
    images = set(choose_images(file for files in files_by_class for file in files))
    if arrays := sum(map(len, files_by_class)) - len(images):
        say(f"{escape(str(folder))}: left out {format_count(arrays, '.npy file')} beside other images")
    paths: list[str] = []
    labels: list[int] = []
    for label, (name, class_files) in enumerate(zip(classes, files_by_class, strict=True)):
        files = [file for file in class_files if file in images]
        if not files and split == "train" and not (has_disjoint_classes and not (folder / name).exists()):
            raise DataError(f"{folder / name}: no images ({SUFFIX_LIST}) for this class")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"{folder}: no images")
    return Split(Files(paths), {"labels": torch.tensor(labels)}, str(folder))


def _image_paths(folder: Path, root: Path) -> list[str]:
    """The image files under `folder`, sorted by bytes. A folder that several links lead to is visited once.

    Raises DataError for a link to outside `root`, and for a folder that cannot be read.
    """
    files: list[str] = []
    visited: set[tuple[int, int]] = set()
    resolved_root = root.resolve()

    def refuse_unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # the caller reports a class without a folder
            raise DataError(f"{escape(str(error.filename))}: cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse_unreadable):
        if not Path(parent).resolve().is_relative_to(resolved_root):
            raise DataError(f"{escape(parent)}: a link to outside {root}; copy the folder in")
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not is_hidden_or_system_name(name)]
        files += [f"{parent}{os.sep}{name}" for name in names if not is_hidden_or_system_name(name)]
    paths = [file for file in files if is_image_name(Path(file).name)]
    if left_out := sorted(set(files) - set(paths)):
        counted, example = format_count(len(left_out), "file"), Path(left_out[0]).name
        say(f"{escape(str(folder))}: left out {counted} of other kinds, such as {example!r}")
    for link in filter(Path.is_symlink, map(Path, paths)):
        if not link.resolve().is_relative_to(resolved_root):
            raise DataError(f"{escape(str(link))}: a link to outside {root}; copy the file in")
    return sorted(paths, key=os.fsencode)
