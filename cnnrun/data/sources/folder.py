"""Pictures in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files, is_clutter
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, SourceContents, SourceSpec, Split
from cnnrun.data.image_files import SUFFIX_LIST, is_image_name
from cnnrun.data.sources.lfw_pairs import pair_targets, read_pairs
from cnnrun.data.split_names import parse_split_name


class Folder(SourceSpec):
    """`root/train/cat/1.jpg`, `root/val/...`, `root/test/...`; or `root/cat/1.jpg`, which `data.split` divides.

    With `data.split.by: label` a folder is a person, say, and those of val and test are others than those of train.
    """

    kind = "folder"
    main = "root"

    root: str
    classes: ClassNames | None = None
    """The classes in the order wanted; by default the folders' names in torchvision's order."""
    pairs: str | None = None
    """A file of pairs in LFW's format, on which test is measured. Without a test folder the people in it are test."""

    @property
    def has_pairs(self) -> bool:
        return self.pairs is not None

    def read(self, apart: bool = False) -> SourceContents:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        found = _split_folders(root)
        if found and "train" not in found:
            raise DataError(f"{root}: has {', '.join(f.name for f in found.values())} but no train folder")
        pairs = [Path(self.pairs)] if self.pairs else []
        if found:
            _say_unread(root, [*found.values(), *pairs], "splits")
        found = found or {"train": root}
        for folder in found.values():
            _say_unread(folder, pairs, "classes")
        folders = found.values() if apart else [found["train"]]
        classes = self.classes or sorted({name for folder in folders for name in _class_names(folder)})
        if len(classes) < 2:
            raise DataError(f"{found['train']}: needs a folder for each of two or more classes; has {len(classes)}")
        splits = {name: _split(folder, classes, root, name, apart) for name, folder in found.items()}
        return SourceContents(
            tuple(classes), splits if self.pairs is None else _paired(splits, classes, Path(self.pairs))
        )


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` that are called as splits are. Raises DataError where two are one split's."""
    found: dict[str, Path] = {}
    for entry in sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_clutter(entry.name)):
        if name := parse_split_name(entry.name):
            if name in found:
                raise DataError(f"{escape(str(root))}: both {found[name].name} and {entry.name} are {name} folders")
            found[name] = entry
    return found


def _say_unread(folder: Path, read: Sequence[Path], what: str) -> None:
    """Say which entries of a folder are not read; of loose pictures in a class's place something is said elsewhere."""
    names = sorted(entry.name for entry in folder.iterdir() if entry not in read and not is_clutter(entry.name))
    if what == "classes":
        names = [name for name in names if (folder / name).is_file() and not is_image_name(name)]
    if names:
        say(f"{escape(str(folder))}: beside the {what}, not read: {join_names(names, 3)}")


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_clutter(entry.name))


def _paired(splits: dict[str, Split], classes: list[str], path: Path) -> dict[str, Split]:
    """The splits, test with the pairs of a file on which it is measured: its own pictures, or else those of the people
    in the file.
    """
    listed, header = read_pairs(path)
    if "test" not in splits:
        whole, named = splits["train"], {name for each in listed for name in each.people}
        away = torch.tensor([name in named for name in classes])[whole.targets["labels"]]
        splits = splits | {"train": _part(whole, ~away), "test": _part(whole, away)}
        if away.all():
            raise DataError(f"{path}: names everyone; nobody is left to train on")
    test = splits["test"]
    places: dict[str, list[tuple[str, int]]] = {}
    for number, label in enumerate(test.targets["labels"].tolist()):
        places.setdefault(classes[label], []).append((Path(test.sample_name(number)).name, number))
    pairs = pair_targets(path, listed, header, places, len(test))
    return splits | {"test": replace(test, targets=test.targets | {"number": torch.arange(len(test)), "pairs": pairs})}


def _part(split: Split, chosen: Tensor) -> Split:
    assert isinstance(split.images, Files)
    files = Files([os.fsdecode(split.images.path_bytes(number)) for number in chosen.nonzero()[:, 0].tolist()])
    return replace(split, images=files, targets={name: values[chosen] for name, values in split.targets.items()})


def _split(folder: Path, classes: list[str], root: Path, split: str, apart: bool) -> Split:
    loose = [entry.name for entry in folder.iterdir() if entry.is_file() and is_image_name(entry.name)]
    if loose:
        example = escape(min(loose))
        say(f"{escape(str(folder))}: {len(loose)} picture(s) of no class left out, such as {example!r}")
    unknown = [name for name in _class_names(folder) if name not in classes]
    if unknown:
        raise DataError(f"{folder}: folder {escape(unknown[0])!r} is not a class of the training split")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files(folder / name, root)
        if not files and split == "train" and not (apart and not (folder / name).exists()):
            raise DataError(f"{folder / name}: no pictures ({SUFFIX_LIST}) for this class")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"{folder}: no pictures")
    return Split(Files(paths), {"labels": torch.tensor(labels)}, str(folder))


def _files(folder: Path, root: Path) -> list[str]:
    """The picture files under `folder`, sorted by bytes; linked folders visited once, links out of `root` refused."""
    found: list[str] = []
    left_out: list[str] = []
    seen: set[tuple[int, int]] = set()
    inside = root.resolve()

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a class without a folder, told by the caller
            raise DataError(f"{escape(str(error.filename))}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if not Path(place).resolve().is_relative_to(inside):
            raise DataError(f"{escape(place)}: a link to outside {root}; copy the folder in")
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not is_clutter(name)]
        for name in names:
            if not is_clutter(name):
                (found if is_image_name(name) else left_out).append(f"{place}{os.sep}{name}")
    if left_out:
        example = Path(left_out[0]).name
        say(f"{escape(str(folder))}: {len(left_out)} file(s) of other kinds left out, such as {example!r}")
    for link in filter(Path.is_symlink, map(Path, found)):
        if not link.resolve().is_relative_to(inside):
            raise DataError(f"{escape(str(link))}: a link to outside {root}; copy the file in")
    return sorted(found, key=os.fsencode)
