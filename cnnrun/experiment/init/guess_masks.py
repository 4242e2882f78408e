"""Guess images with masks: a file of few values for each image, in a folder of its own or beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.target_kind import IGNORED, UNKNOWN
from cnnrun.data.image_files import image_errors, is_image_name, open_image, read_image_bytes
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.split_names import parse_split_name
from cnnrun.experiment.init.paths import folders_below, name_of_path
from cnnrun.experiment.init.reading import Reading

_MAX_MASKS = 200  # masks whose values are read
_MAX_VALUES = 60  # a file of more values is a picture, not a mask
_MIN_PAIRED = 0.8  # share of the images that must have a mask
_SUFFIXES = ("", "_mask", "-mask", "_seg", "_label", "_labels", "_gt", "_L", "_segmentation", "_manual1", "_GT")
_MASK_WORDS = ("mask", "label", "annot", "truth", "gt", "seg", "anno")


@dataclass(frozen=True)
class _Pair:
    """A folder of images, one of masks, and what a mask's name has after that of its image."""

    images: Path
    masks: Path
    suffix: str
    count: int


def guess_masks(root: Path) -> Reading | None:
    """Folders in which nearly every image has a mask of its name. Raises DataError for masks that cannot be read."""
    pairs = list(_find_pairs(root))
    if not pairs:
        return None
    by_split = {parse_split_name(pair.images.name) or parse_split_name(pair.images.parent.name): pair for pair in pairs}
    if "train" in by_split and None not in by_split and len({pair.suffix for pair in pairs}) == 1:
        chosen = {split: by_split[split] for split in ("train", "val", "test") if split in by_split}
        images: Any = {split: str(pair.images) for split, pair in chosen.items()}
        masks: Any = {split: str(pair.masks) for split, pair in chosen.items()}
        pair, values = _first_readable([chosen["train"]])
        count = sum(item.count for item in chosen.values())
    else:
        pair, values = _first_readable(sorted(pairs, key=lambda item: -item.count))
        images, masks, count = str(pair.images), str(pair.masks), pair.count
    settings, note = _class_settings(values)
    source = {"images": images, "masks": masks} | ({"mask_suffix": pair.suffix} if pair.suffix else {}) | settings
    name = f"{escape(pair.suffix)}.png" if pair.suffix else "the same name"
    reason = f"{format_count(count, 'image')} have a mask of {name}"
    return Reading({"masks": source}, "segment", reason, name_of_path(root), ("segment",), notes=(note,))


def _first_readable(pairs: list[_Pair]) -> tuple[_Pair, dict[int, int]]:
    """The first pair of folders whose masks can be read, and their values. Raises the first DataError if none is."""
    errors: list[DataError] = []
    for pair in pairs:
        try:
            return pair, _read_values(pair)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _find_pairs(root: Path) -> Iterator[_Pair]:
    """Yield the pairs of folders, the same folder twice included, in which masks have the names of images."""
    stems = {folder: names for folder in folders_below(root) if (names := _images_by_stem(folder))}
    for images in stems:
        yield from (
            _Pair(images, masks, suffix, count)
            for masks in stems
            if _could_be_masks(images, masks)
            for suffix in _SUFFIXES
            if (count := _count_pairs(stems[images], stems[masks], images == masks, suffix))
        )


def _images_by_stem(folder: Path) -> dict[str, set[str]]:
    """The suffixes of the images of each name in a folder."""
    stems: dict[str, set[str]] = {}
    for entry in os.scandir(folder):
        if entry.is_file() and is_image_name(entry.name):
            path = Path(entry.name)
            stems.setdefault(path.stem, set()).add(path.suffix.lower())
    return stems


def _could_be_masks(images: Path, masks: Path) -> bool:
    """Return whether the second folder is named like one of masks and the first is not, or both are one folder."""
    if images == masks:
        return True
    is_named = any(word in masks.name.lower() for word in _MASK_WORDS)
    return is_named and not any(word in images.name.lower() for word in _MASK_WORDS)


def _count_pairs(images: dict[str, set[str]], masks: dict[str, set[str]], same: bool, suffix: str) -> int:
    """The number of images with a mask; 0 if too few have one."""
    if same and not suffix:
        photos = {stem for stem, kinds in images.items() if kinds - {".png"}}
        count = sum(".png" in images[stem] for stem in photos)
    elif same:
        photos = {stem for stem in images if not stem.endswith(suffix)}
        count = sum(f"{stem}{suffix}" in images for stem in photos)
    else:
        photos = set(images)
        count = sum(f"{stem}{suffix}" in masks for stem in photos)
    return count if count >= max(2, _MIN_PAIRED * len(photos)) else 0


def _read_values(pair: _Pair) -> dict[int, int]:
    """How many of some masks have each value. Raises DataError for files that are no masks."""
    counts: dict[int, int] = {}
    stems = _images_by_stem(pair.images)
    names = sorted(stem for stem in stems if not pair.suffix or not stem.endswith(pair.suffix))
    files = [path for stem in names for path in pair.masks.glob(f"{_glob_escape(stem)}{pair.suffix}.*")]
    masks = [path for path in files if path.suffix.lower() == ".png" or pair.images != pair.masks or pair.suffix]
    for path in masks[:: max(1, len(masks) // _MAX_MASKS)][:_MAX_MASKS]:
        with image_errors(str(path)), open_image(read_image_bytes(path), ImageSettings()) as (image, _):
            if image.mode not in ("1", "L", "P"):
                problem = f"a mask of kind {image.mode}; masks need a grey value or a palette index for each class"
                raise DataError(f"{escape(str(path))}: {problem}")
            found = np.unique(np.asarray(image).astype(np.uint8)).tolist()
        if len(found) > _MAX_VALUES:
            raise DataError(f"{escape(str(path))}: {len(found)} different values; a mask has one for each class")
        for value in found:
            counts[value] = counts.get(value, 0) + 1
    if not 2 <= len(counts) < UNKNOWN:
        raise DataError(f"{escape(str(pair.masks))}: the masks have {format_count(len(counts), 'value')}")
    return counts


def _glob_escape(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


def _class_settings(counts: dict[int, int]) -> tuple[dict[str, Any], str]:
    """The classes and values of the masks, and what to tell the user about them."""
    values = sorted(counts)
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
