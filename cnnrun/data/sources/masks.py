"""Images in one folder, and the mask of each, with a class for every pixel, in another."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import check_problems
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files, is_hidden_or_system_name
from cnnrun.base.progress import say
from cnnrun.contracts.source import ClassNames, Masks, SourceContents, SourceSpec, Split
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN, TargetKind
from cnnrun.data.image_names import SUFFIX_LIST, choose_images
from cnnrun.data.split_names import parse_split_name

SplitName = Literal["train", "val", "test"]
Value = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]


class MaskFolders(SourceSpec):
    """`images/1.jpg` and `masks/1.png`: a mask has the name of its image, in any image format that keeps its values.

    If the folder of images has folders named train, val or test, these are the splits, and the folder of masks must
    have the same; otherwise `data.split` divides the images.
    """

    kind = "masks"

    images: str | dict[SplitName, str]
    """The folder of the images, or that of each split."""
    masks: str | dict[SplitName, str]
    """The folder of the masks, or that of each split: grey values or palette indices. Where it is the folder of the \
images, masks are the files with `mask_suffix` or, without one, the PNG files, and images are the others."""
    mask_suffix: str = Field("", pattern=r"^[^/\\]*$", max_length=50)
    """What a mask's name has after that of its image: `_mask` for `1.jpg` and `1_mask.png`."""
    classes: ClassNames = Field(min_length=2)
    """The classes in the order of their values in the masks."""
    values: list[Value] | None = None
    """The value of each class in the masks; by default 0, 1, 2 and so on."""
    colours: list[Colour] | None = None
    """The RGB colour of each class, such as `'#ff8000'`, for masks that show classes by colours."""
    ignore: list[Value | Colour] = [IGNORED]
    """Values of pixels, or with `colours` colours, that are neither learned nor measured."""

    @model_validator(mode="after")
    def _check_folders(self) -> Self:
        if _keys(self.images) != _keys(self.masks):
            raise ValueError("images and masks name different splits; give both one folder, or both the same splits")
        if (keys := _keys(self.images)) is not None and "train" not in keys:
            raise ValueError("images and masks have no train")
        return self

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if len(self.classes) >= UNKNOWN:
            raise ValueError(f"at most {UNKNOWN - 1} classes")
        if self.colours is not None and self.values is not None:
            raise ValueError("give values or colours, not both")
        used, ignored = self._class_values(), self._ignored()
        name = "values" if self.colours is None else "colours"
        if len(used) != len(self.classes):
            entries = "numbers" if self.colours is None else "entries"
            raise ValueError(f"{name} has {len(used)} {entries}; there are {len(self.classes)} classes")
        if wrong := [entry for entry in ignored if isinstance(entry, int) == (self.colours is not None)]:
            raise ValueError(f"ignore has {wrong[0]!r}, which is not one of the {name}")
        if len(set(used)) < len(used) or (set(used) & set(ignored)):
            hint = " (255 unless given); ignore: [] for none" if self.colours is None else ""
            raise ValueError(f"a {name[:-1]} is used twice, among {name} and ignore{hint}")
        return self

    def _class_values(self) -> list[int | str]:
        """The values of the classes, or their colours in lower case."""
        if self.colours is not None:
            return [colour.lower() for colour in self.colours]
        return list(range(len(self.classes))) if self.values is None else list(self.values)

    def _ignored(self) -> list[int | str]:
        """The values or colours to ignore; by default 255, but no colour."""
        if self.colours is not None and "ignore" not in self.model_fields_set:
            return []
        return [entry.lower() if isinstance(entry, str) else entry for entry in self.ignore]

    @property
    def target_kind(self) -> TargetKind:
        return TargetKind.MASKS

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        meaning = Masks(Files([]), self._value_table(), class_of_colour=self._colour_table())
        splits = {
            name: _read_split(_Pairing(images, masks, self.mask_suffix), meaning)
            for name, (images, masks) in self._folders().items()
        }
        return SourceContents(tuple(self.classes), splits)

    def _folders(self) -> dict[str, tuple[Path, Path]]:
        """The folders of the images and of the masks of each split. Raises DataError if one is missing."""
        if isinstance(self.images, dict) and isinstance(self.masks, dict):
            return {str(name): (Path(folder), Path(self.masks[name])) for name, folder in self.images.items()}
        images, masks = Path(str(self.images)), Path(str(self.masks))
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(f"{escape(str(folder))}: no such folder")
        names: dict[str, Path] = {}
        for folder in _subfolders(images):
            if name := parse_split_name(folder.name):
                if name in names:
                    both = f"{names[name].name} and {folder.name}"
                    raise DataError(f"{escape(str(images))}: both {both} are {name} folders")
                names[name] = folder
        if names and "train" not in names:
            raise DataError(f"{escape(str(images))}: has {', '.join(names)} but no train folder")
        return {name: (folder, masks / folder.name) for name, folder in names.items()} or {"train": (images, masks)}

    def _value_table(self) -> tuple[int, ...]:
        """The class of each value of a mask; see `Masks.class_of_value`."""
        table = [UNKNOWN] * 256
        for value, label in self._labels_by_entry().items():
            if isinstance(value, int):
                table[value] = label
        return tuple(table)

    def _colour_table(self) -> tuple[tuple[int, int], ...]:
        """The class of each colour of a mask; see `Masks.class_of_colour`."""
        labels = self._labels_by_entry().items()
        return tuple((int(entry[1:], 16), label) for entry, label in labels if isinstance(entry, str))

    def _labels_by_entry(self) -> dict[int | str, int]:
        """The class of each value or colour, or IGNORED."""
        labels: dict[int | str, int] = dict.fromkeys(self._ignored(), IGNORED)
        labels.update({entry: label for label, entry in enumerate(self._class_values())})
        return labels


def _keys(folders: str | dict[SplitName, str]) -> set[str] | None:
    """The splits that a setting names; None if it is one folder."""
    return set(map(str, folders)) if isinstance(folders, dict) else None


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden_or_system_name(path.name))


@dataclass(frozen=True)
class _Pairing:
    """A folder of images and one of masks, and what a mask's name has after that of its image."""

    images: Path
    masks: Path
    suffix: str

    def image_names(self) -> list[str]:
        """The names of the images, sorted."""
        names = _file_names(self.images)
        if self.images.resolve() == self.masks.resolve():
            names = [name for name in names if not self._is_mask(name)]
        return sorted(choose_images(names), key=os.fsencode)

    def masks_by_stem(self) -> dict[str, list[str]]:
        """The names of the masks, by the names of their images without suffix."""
        names = _file_names(self.masks)
        if self.images.resolve() == self.masks.resolve():
            names = [name for name in names if self._is_mask(name)]
        names = choose_images(names)
        by_stem: dict[str, list[str]] = {}
        for name in names:
            if Path(name).stem.endswith(self.suffix):
                by_stem.setdefault(Path(name).stem.removesuffix(self.suffix), []).append(name)
        return by_stem

    def _is_mask(self, name: str) -> bool:
        """Return whether a file in a folder of both is a mask."""
        return Path(name).stem.endswith(self.suffix) if self.suffix else name.lower().endswith(".png")


def _read_split(pairing: _Pairing, meaning: Masks) -> Split:
    """List the images of a folder with their masks. Raises DataError for images without exactly one mask."""
    images, masks = pairing.images, pairing.masks
    if not images.is_dir():
        raise DataError(f"{escape(str(images))}: no such folder")
    if not masks.is_dir():
        raise DataError(f"{escape(str(masks))}: no such folder, but {escape(str(images))} has images to segment")
    names, masks_by_stem = pairing.image_names(), pairing.masks_by_stem()
    if not names:
        raise DataError(f"{escape(str(images))}: no images ({SUFFIX_LIST})")
    problems, mask_names = [], []
    name_of_stem: dict[str, str] = {}
    for name in names:
        candidates = masks_by_stem.pop(stem := Path(name).stem, [])
        mask_names += candidates[:1]
        if (other := name_of_stem.setdefault(stem, name)) != name:
            problems.append(f"{escape(str(images / name))}: has the mask of {escape(other)}; give one another name")
        elif len(candidates) != 1:
            masks_text = format_count(len(candidates), "mask") if candidates else "no mask"
            problems.append(f"{escape(str(images / name))}: {masks_text} of its name in {escape(str(masks))}")
    check_problems(problems)
    if masks_by_stem:
        unused = format_count(len(masks_by_stem), "mask has no image and is", "masks have no image and are")
        say(f"{escape(str(masks))}: {unused} not used, such as {min(min(masks_by_stem.values()))!r}")
    files, mask_files = (
        Files([os.fspath(folder / name) for name in file_names])
        for folder, file_names in ((images, names), (masks, mask_names))
    )
    return Split(files, {}, str(images), masks=replace(meaning, images=mask_files))


def _file_names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_file()]
