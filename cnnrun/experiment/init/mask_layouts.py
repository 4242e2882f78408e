"""Guess images with masks: a file of few values for each image, in a folder of its own or beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnrun.base.bounded_files import read_text
from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.base.machine_load import processor_count
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN
from cnnrun.data.image_files import image_errors, open_image, read_image_bytes
from cnnrun.data.image_names import is_image_name
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.mask_files import format_colour, read_mask_colours, read_mask_values
from cnnrun.experiment.init.paths import SPLIT_PREFIX, folders_below, name_of_path, split_of
from cnnrun.experiment.init.reading import Reading

_MAX_VALUES = 60  # a file of more values is a picture, not a mask
_MIN_PAIRED = 0.8  # share of the images that must have a mask
_SUFFIXES = ("", "_mask", "-mask", "_seg", "_label", "_labels", "_gt", "_L", "_segmentation", "_manual1", "_GT")
_MASK_WORDS = re.compile(
    r"masks?|labels?|annots?|annotations?|annos?|(ground)?truth|gt|segs?|segmentations?|manual", re.IGNORECASE
)

_MAX_NAMES_BYTES, _MAX_LINE = 1 << 16, 200  # a list of colours is short, and so are its lines
_RGB = r"(?P<r>\d{1,3})[\s,;]+(?P<g>\d{1,3})[\s,;]+(?P<b>\d{1,3})"
_NAME_AND_COLOUR = re.compile(rf"\s*(?P<name>[^\d\s,;][^,;\t]*?)[\s,;]+{_RGB}\s*$")
_COLOUR_AND_NAME = re.compile(rf"\s*{_RGB}[\s,;]+(?P<name>[^\d\s,;][^,;\t]*?)\s*$")

_Entry = int | str  # a value of a mask, or a colour such as #ff8000
_Files = dict[str, list[str]]  # the image files of a folder by their names without suffix


@dataclass(frozen=True)
class _Pair:
    """A folder of images, one of masks, and what a mask's name has after that of its image; the split they name."""

    images: Path
    masks: Path
    suffix: str
    split: str | None
    names: tuple[str, ...]
    """The names of the masks."""


def guess_masks(root: Path) -> Reading | None:
    """Folders in which nearly every image has a mask of its name. Raises DataError for masks that cannot be read."""
    pairs = list(_find_pairs(root))
    if not pairs:
        return None
    readable, errors = list[tuple[_Pair, set[_Entry]]](), list[DataError]()
    for pair in sorted(pairs, key=lambda item: -len(item.names)):
        try:
            readable.append((pair, _read_values(pair)))
        except DataError as error:
            errors.append(error)
    if not readable:
        if all(pair.images == pair.masks for pair in pairs):
            return None  # two files of one name, and none of them a mask
        raise errors[0]
    return _describe_pairs(root, readable)


def _describe_pairs(root: Path, readable: list[tuple[_Pair, set[_Entry]]]) -> Reading:
    """The reading of pairs of folders: one for each split, or the first one; the others are named in a note."""
    by_split: dict[str | None, tuple[_Pair, set[_Entry]]] = {}
    for pair, values in readable:
        by_split.setdefault(pair.split, (pair, values))
    if "train" in by_split:
        chosen = [by_split[split] for split in ("train", "val", "test") if split in by_split]
        images: Any = {str(pair.split): str(pair.images) for pair, _ in chosen}
        masks: Any = {str(pair.split): str(pair.masks) for pair, _ in chosen}
    else:
        chosen = readable[:1]
        images, masks = str(chosen[0][0].images), str(chosen[0][0].masks)
    first = chosen[0][0]
    settings, note = _class_settings(set().union(*(values for _, values in chosen)), root)
    source = {"images": images, "masks": masks} | ({"mask_suffix": first.suffix} if first.suffix else {}) | settings
    name = f"{escape(first.suffix)}.png" if first.suffix else "the same name"
    reason = f"{format_count(sum(len(pair.names) for pair, _ in chosen), 'image')} have a mask of {name}"
    used = {pair.masks for pair, _ in chosen}
    others = [escape(str(pair.masks)) for pair, _ in readable if pair.masks not in used]
    notes = [note, *([f"masks that are not used: {join_names(others, 3)}"] if others else [])]
    return Reading({"masks": source}, "segment", reason, name_of_path(root), ("segment",), notes=tuple(notes))


def _find_pairs(root: Path) -> Iterator[_Pair]:
    """Yield the pairs of folders, the same folder twice included, in which masks have the names of images."""
    files = {folder: names for folder in folders_below(root) if (names := _files_by_stem(folder))}
    masks_like = [folder for folder in files if is_mask_name(folder.name) or is_mask_name(folder.parent.name)]
    for images in files:
        for masks in [images, *(folder for folder in masks_like if _differ_as_masks(root, images, folder))]:
            for suffix in _SUFFIXES:
                split = split_of(root, images)
                if found := _match_names(files[images], files[masks], images == masks, suffix):
                    yield _Pair(images, masks, suffix, split, found)


def _files_by_stem(folder: Path) -> _Files:
    stems: _Files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file() and is_image_name(entry.name):
                stems.setdefault(Path(entry.name).stem, []).append(entry.name)
    return stems


def _words(name: str) -> list[str]:
    """The words of a folder's name, such as `train_masks` or `trainannot`, without a split's name in front."""
    parts = re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", name)
    return [SPLIT_PREFIX.sub("", part.lower()) for part in parts if part]


def is_mask_name(name: str) -> bool:
    """Return whether a folder is named like one of masks."""
    return any(_MASK_WORDS.fullmatch(word) for word in _words(name))


def _differ_as_masks(root: Path, images: Path, masks: Path) -> bool:
    """Return whether two paths differ in one part, which is a name of masks in the second alone, within one split."""
    if images == root or masks == root:
        return is_mask_name(masks.name) and masks.parent == images
    first, second = images.relative_to(root).parts, masks.relative_to(root).parts
    if len(first) != len(second) or split_of(root, images) != split_of(root, masks):
        return False
    different = [(one, other) for one, other in zip(first, second, strict=True) if one != other]
    return len(different) == 1 and not is_mask_name(different[0][0]) and is_mask_name(different[0][1])


def _match_names(images: _Files, masks: _Files, is_same_folder: bool, suffix: str) -> tuple[str, ...]:
    """The names of the images' masks; none if too few images have one."""
    if is_same_folder and not suffix:
        photos = {stem for stem, names in images.items() if any(not name.lower().endswith(".png") for name in names)}
        found = [name for stem in photos for name in images[stem] if name.lower().endswith(".png")]
    else:
        photos = {stem for stem in images if not (is_same_folder and stem.endswith(suffix))}
        found = [name for stem in photos for name in masks.get(f"{stem}{suffix}", [])]
    return tuple(sorted(found)) if len(found) >= max(2, _MIN_PAIRED * len(photos)) else ()


def _read_values(pair: _Pair) -> set[_Entry]:
    """The values of all masks. Raises DataError for files that are no masks."""
    first = _mask_values(pair.masks / pair.names[0])  # a picture in their place is found at once
    with ThreadPoolExecutor(processor_count()) as pool:
        values = first.union(*pool.map(_mask_values, [pair.masks / name for name in pair.names[1:]]))
    if not 2 <= len(values) < UNKNOWN:
        raise DataError(f"{escape(str(pair.masks))}: the masks have {format_count(len(values), 'value')}")
    return values


def _mask_values(path: Path) -> set[_Entry]:
    with image_errors(str(path)):
        data = read_image_bytes(path)
        with open_image(data, ImageSettings()) as (image, orientation):
            has_colours = image.mode in ("RGB", "RGBA")
            read = read_mask_colours(image, orientation) if has_colours else read_mask_values(image, orientation, data)
    found = np.unique(read).tolist()
    if len(found) > _MAX_VALUES:
        what = "colours" if has_colours else "values"
        raise DataError(f"{escape(str(path))}: {len(found)} different {what}; a mask has one for each class")
    return {format_colour(value) if has_colours else value for value in found}


def _class_settings(found: set[_Entry], root: Path) -> tuple[dict[str, Any], str]:
    """The classes and values, or colours, of the masks, and what to tell the user about them."""
    colours = sorted(entry for entry in found if isinstance(entry, str))
    values = sorted(entry for entry in found if isinstance(entry, int))
    if colours and values:
        raise DataError("some masks have colours and others grey values", "save all of them in one way")
    return _classes_of_colours(colours, root) if colours else _classes_of_values(values)


def _classes_of_colours(colours: list[str], root: Path) -> tuple[dict[str, Any], str]:
    file, names = _find_colour_names(root)
    others = {colour: "background" if colour == "#000000" else f"class_{colour[1:]}" for colour in colours}
    settings = {"classes": [names.get(colour, others[colour]) for colour in colours], "colours": colours}
    if len(set(settings["classes"])) < len(colours):  # two colours of one name
        settings["classes"], names = [others[colour] for colour in colours], {}
    unnamed = [colour for colour in colours if colour not in names]
    if names and not unnamed:
        return settings, f"the names of the masks' colours are those of {escape(str(file))}"
    return settings, f"the masks have the colours {join_names(unnamed)}: name the classes"


def _find_colour_names(root: Path) -> tuple[Path | None, dict[str, str]]:
    """A file of names and colours in the folder, such as class_dict.csv, and the names by their colours."""
    for file in sorted([*root.glob("*.csv"), *root.glob("*.txt")]):
        try:
            lines = read_text(file, DataError, _MAX_NAMES_BYTES).splitlines()
        except DataError:
            continue
        if max(map(len, lines), default=0) > _MAX_LINE:
            continue
        found = [match for line in lines if (match := _NAME_AND_COLOUR.match(line) or _COLOUR_AND_NAME.match(line))]
        if len(found) >= max(2, len(lines) - 1):  # a first line may name the columns
            channels = [[int(match[name]) for name in "rgb"] for match in found]
            if max(map(max, channels)) < 256:
                names = [match["name"].strip().strip("\"'") for match in found]
                return file, {f"#{r:02x}{g:02x}{b:02x}": name for (r, g, b), name in zip(channels, names, strict=True)}
    return None, {}


def _classes_of_values(values: list[int]) -> tuple[dict[str, Any], str]:
    if values == [0, 255]:
        return {"classes": ["background", "object"], "values": [0, 255], "ignore": []}, "0 is background, 255 object"
    has_void = values[-1] == IGNORED and len(values) > 2  # 255 beside at least two other values
    named = values[:-1] if has_void else values
    first = "background" if named[0] == 0 else f"class_{named[0]}"
    settings: dict[str, Any] = {"classes": [first, *(f"class_{value}" for value in named[1:])]}
    if named != list(range(len(named))):
        settings["values"] = named
    if not has_void and IGNORED in named:
        settings["ignore"] = []
    void = "; 255 is neither learned nor measured" if has_void else ""
    return settings, f"the masks have the values {join_names([str(value) for value in named])}{void}: name the classes"
