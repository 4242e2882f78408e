"""Preparation of a data set: decode it, leave bad samples out, check for leaks, and measure its statistics."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.error_lines import join_names, truncate_lines
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import OBJECT_COLUMNS
from cnnrun.contracts.source import BadBox, Masks, SourceContents, Split
from cnnrun.data.cache import ProgressBar
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.file_listing import content_digest, list_files
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.image_statistics import describe_dark_images, narrow_peak, training_mean_std
from cnnrun.data.index import SourceIndex, class_warnings
from cnnrun.data.leakage import apply_leakage_policy, move_copies_together
from cnnrun.data.masks import mask_problems
from cnnrun.data.settings import Data
from cnnrun.data.storage import StoredSplit, store_split
from cnnrun.data.targets import measure_numbers, select_targets

MOVED_NOTE = "moved within data.split, so that all copies of an image are in one split"


def build_dataset(
    data: Data, source_index: SourceIndex, progress: ProgressBar, only: Sequence[str] | None = None
) -> Dataset:
    """Decode a data set, leave out what the config skips, and measure mean and deviation of the training images.

    With `only`, just these splits are decoded and nothing is measured: a trained network brings its own statistics.
    Raises DataError for bad samples and leaks that the config does not allow.
    """
    refuse_bad_boxes(source_index, data.bad_boxes)
    return finish_dataset(data, source_index, decode_splits(data, source_index, progress, only))


@dataclass(frozen=True)
class DecodedSplits:
    """Decoded splits with their problems, before the policies of the config are applied.

    `moved_count` is the number of images that were moved to the split of their copies.
    """

    splits: dict[str, tuple[Split, Tensor]]
    stored_splits: dict[str, StoredSplit]
    stored_masks: dict[str, StoredSplit]
    file_listings: dict[int, NDArray[np.int64] | None]
    moved_count: int
    has_all_splits: bool


def decode_splits(
    data: Data, source_index: SourceIndex, progress: ProgressBar, only: Sequence[str] | None = None
) -> DecodedSplits:
    """Decode all splits, or `only` some of them.

    Raises StorageError if the cache cannot be used, and UnreadableFileError for files that cannot be read now.
    """
    shape = _required_shape(data)
    listings = _list_splits(data, source_index)
    wanted = {name: pair for name, pair in source_index.splits.items() if only is None or name in only}
    stored: dict[int, StoredSplit] = {}
    for split, _ in wanted.values():
        if id(split) not in stored:
            stored[id(split)] = store_split(split, shape, data.image, data, listings[id(split)], progress)
        if split.masks is not None and id(split.masks) not in stored:
            listing = listings[id(split.masks)]
            stored[id(split.masks)] = store_split(split.masks, (1, *shape[1:]), data.image, data, listing, progress)
    splits, moved_count = move_copies_together(source_index, wanted, stored)
    stored_by_name = {name: stored[id(split)] for name, (split, _) in splits.items()}
    masks_by_name = {name: stored[id(split.masks)] for name, (split, _) in splits.items() if split.masks is not None}
    return DecodedSplits(splits, stored_by_name, masks_by_name, listings, moved_count, only is None)


def finish_dataset(data: Data, source_index: SourceIndex, decoded: DecodedSplits) -> Dataset:
    """Apply the config's policies to decoded splits. Raises DataError for samples that they do not allow."""
    refuse_bad_boxes(source_index, data.bad_boxes)
    shape = _required_shape(data)
    splits, skipped = _skip_bad_images(decoded, data.bad_files)
    facts = DataFacts(
        classes=source_index.contents.classes,
        image_shape=shape,
        class_counts=source_index.class_counts(),
        counts={name: len(rows) for name, (_, rows) in splits.items()}
        if decoded.has_all_splits
        else source_index.counts,
        fingerprint=_fingerprint(source_index.contents, decoded.file_listings),
        class_ids=source_index.contents.class_ids,
        numbers=source_index.numbers(),
    )
    parts: list[tuple[str, Split | Masks]] = list(source_index.contents.splits.items())
    parts += [(name, split.masks) for name, split in source_index.contents.splits.items() if split.masks is not None]
    listings = [(name, part, decoded.file_listings[id(part)]) for name, part in parts]
    dataset = Dataset(
        facts,
        _build_examples(splits, decoded, shape, data.image),
        decoded.stored_splits,
        tuple(skipped),
        bad_boxes=source_index.contents.bad_boxes,
        file_listings=tuple((name, part, files) for name, part, files in listings if files is not None),
    )
    if not decoded.has_all_splits:
        return dataset
    has_disjoint_classes = data.split.by == "label"
    moved = [f"{format_count(decoded.moved_count, 'image')} {MOVED_NOTE}"] if decoded.moved_count else []
    notes = [*class_warnings(source_index), *moved, *_split_remarks(dataset, has_disjoint_classes)]
    dataset = replace(dataset, notes=tuple(notes))
    return _add_statistics(data.image, apply_leakage_policy(dataset, data.leakage, has_disjoint_classes))


def _required_shape(data: Data) -> Shape:
    shape = data.image_shape()
    assert shape is not None, "the checks of an experiment refuse a config without an image size"
    return shape


def data_fingerprint(data: Data, source_index: SourceIndex) -> str:
    """Compute the fingerprint that `build_dataset` gives the data, without decoding it."""
    return _fingerprint(source_index.contents, _list_splits(data, source_index))


def _list_splits(data: Data, source_index: SourceIndex) -> dict[int, NDArray[np.int64] | None]:
    """The files of each source split and its masks, with sizes and times or hashes of their contents, by id."""
    splits = source_index.source_splits()
    lists: list[Split | Masks] = [*splits, *(split.masks for split in splits if split.masks is not None)]
    return {id(split): list_files(split, data.fingerprint == "content", data.workers) for split in lists}


def _build_examples(
    splits: dict[str, tuple[Split, Tensor]], decoded: DecodedSplits, shape: Shape, image_settings: ImageSettings
) -> dict[str, Examples]:
    examples = {}
    for name, (split, rows) in splits.items():
        targets, objects = select_targets(split, rows, shape, image_settings)
        masks = decoded.stored_masks[name].images if name in decoded.stored_masks else None
        examples[name] = Examples(decoded.stored_splits[name].images, rows, targets, split, rows, objects, masks)
    return examples


def _add_statistics(image_settings: ImageSettings, dataset: Dataset) -> Dataset:
    """Add the final counts, and mean and deviation of the training images, to a data set's facts. Raises DataError."""
    train, facts = dataset.splits["train"], dataset.facts
    counts = {name: len(examples) for name, examples in dataset.splits.items()}
    class_counts = train.class_counts(len(facts.classes))
    mean, std = _input_mean_std(image_settings, dataset)
    numbers = measure_numbers([number.name for number in facts.numbers], train.targets)
    facts = replace(facts, mean=mean, std=std, counts=counts, class_counts=class_counts, numbers=numbers)
    return replace(dataset, facts=facts)


def _skip_bad_images(
    decoded: DecodedSplits, policy: str
) -> tuple[dict[str, tuple[Split, Tensor]], list[dict[str, str]]]:
    """Leave out the images that cannot be used; returns the splits and a list of the left out images.

    Raises DataError if `policy` is error.
    """
    skipped: list[dict[str, str]] = []
    good_splits = {}
    for name, (split, rows) in decoded.splits.items():
        stored = decoded.stored_splits[name]
        decodable = rows[~torch.isin(rows, torch.tensor(list(stored.problems), dtype=torch.int64))]
        problems = stored.problems | _size_problems(split, decodable, stored)
        if name in decoded.stored_masks:
            problems |= mask_problems(split, decodable, stored, decoded.stored_masks[name])
        is_bad = torch.isin(rows, torch.tensor(list(problems), dtype=torch.int64))
        for row in rows[is_bad].tolist():
            skipped.append({"split": name, "picture": split.sample_name(row), "reason": problems[row]})
        good_splits[name] = (split, rows[~is_bad])
        _refuse_all_bad(name, len(rows), [problems[row] for row in rows[is_bad].tolist()])
    if policy == "error":
        _refuse_bad_files([sample["reason"] for sample in skipped])
    return good_splits, skipped


def _box_remarks(bad_boxes: Sequence[BadBox]) -> list[str]:
    """A line for each way to treat bad boxes (left out, cut, used as they are), with a count and an example."""
    boxes_by_treatment: dict[str, list[BadBox]] = {}
    for box in bad_boxes:
        treatment = {
            "left out": "left out (data.bad_boxes: skip)",
            "cut": "cut at the edges of the image",
            "kept": f"used all the same ({box.kind})",
        }[box.treatment]
        boxes_by_treatment.setdefault(treatment, []).append(box)
    return [
        f"{format_count(len(boxes), 'box is', 'boxes are')} {treatment}, such as {boxes[0].name}: {boxes[0].problem}"
        for treatment, boxes in boxes_by_treatment.items()
    ]


def refuse_bad_boxes(source_index: SourceIndex, policy: str) -> None:
    """Raise DataError with the boxes that cannot be used, unless `policy` is to skip them."""
    unusable = [box for box in source_index.contents.bad_boxes if not box.is_used]
    if unusable and policy == "error":
        lines = truncate_lines([f"{box.name}: {box.problem}" for box in unusable], "boxes")
        raise DataError(*lines, "fix or remove them, or leave them out with data.bad_boxes: skip")


def refuse_missing_files(source_index: SourceIndex, policy: str) -> None:
    """Raise DataError for missing files, with the message that decoding them would give."""
    lines: list[str] = []
    for name, (split, rows) in source_index.splits.items():
        if not isinstance(split.images, Files):
            continue
        missing = [row for row in rows.tolist() if not split.images[row].exists()]
        split_lines = [
            f"{escape(split.sample_name(row))}: cannot be decoded: {os.strerror(errno.ENOENT)}" for row in missing
        ]
        _refuse_all_bad(name, len(rows), split_lines)
        lines += split_lines
    if policy == "error":
        _refuse_bad_files(lines)


def _refuse_all_bad(split: str, count: int, reasons: list[str]) -> None:
    if len(reasons) == count:
        raise DataError(f"no image of the {split} split can be used; the first: {reasons[0]}")


def _refuse_bad_files(reasons: list[str]) -> None:
    if reasons:
        advice = "fix or remove them, or leave them out with data.bad_files: skip"
        raise DataError(*truncate_lines(reasons, "files"), advice)


def _size_problems(split: Split, rows: Tensor, stored: StoredSplit) -> dict[int, str]:
    """Problems of images whose size is not the one that their boxes are written for, by the index of the image."""
    if split.sizes is None or stored.records is None or not isinstance(split.images, Files):
        return {}
    records = stored.records()
    actual = np.stack([records["height"], records["width"]], 1)[rows.numpy()]
    expected = split.sizes[rows.numpy()]
    return {
        int(rows[i]): f"{escape(split.sample_name(int(rows[i])))}: is {actual[i][1]}x{actual[i][0]} pixels; "
        f"its boxes are written for {expected[i][1]}x{expected[i][0]}"
        for i in np.flatnonzero((actual != expected).any(1))
    }


def _split_remarks(dataset: Dataset, has_disjoint_classes: bool) -> list[str]:
    """Warnings about bad boxes, missing classes, constant targets, doubtful files and skipped images, a line each."""
    lines, classes = _box_remarks(dataset.bad_boxes), dataset.facts.classes
    for split, examples in dataset.splits.items():
        if not has_disjoint_classes and (counts := examples.class_counts(len(classes))):
            missing = [name for name, count in zip(classes, counts, strict=True) if not count]
            sample_noun = "image" if examples.objects is None else "object"
            lines += [f"no {sample_noun} of {join_names(missing)} in {split}"] if missing else []
        lines += [f"{name} is {value:g} in every image of {split}" for name, value in constant_numbers(dataset, split)]
        lines += _dark_image_remarks(dataset.stored_splits[split], examples, split)
        lines += _file_remarks(dataset.stored_splits[split], examples, split)
    return [*lines, *_skip_remarks(dataset.skipped_samples)]


def constant_numbers(dataset: Dataset, split: str) -> list[tuple[str, float]]:
    """Name and value of the regression targets that are constant in a split, where no metric can be measured."""
    values = dataset.splits[split].targets.get("numbers")
    if values is None:
        return []
    ranges = zip(dataset.facts.numbers, values.amin(0).tolist(), values.amax(0).tolist(), strict=True)
    return [(escape(number.name), minimum) for number, minimum, maximum in ranges if minimum == maximum]


def _skip_remarks(skipped: Sequence[dict[str, str]]) -> list[str]:
    if not skipped:
        return []
    images = format_count(len(skipped), "image cannot be used and is", "images cannot be used and are")
    return [f"{images} left out (data.bad_files: skip), such as {escape(skipped[0]['reason'])}"]


def _file_remarks(stored: StoredSplit, examples: Examples, split: str) -> list[str]:
    """A line for each kind of doubtful file in a split."""
    if stored.records is None:
        return []
    records, lines = stored.records()[examples.rows.numpy()], []
    kinds = {
        "of another format than named": records["misnamed"],
        "of one single colour": records["is_single_colour"],
        "without readable EXIF": records["orientation"] == 0,
    }
    for kind, is_doubtful in kinds.items():
        if len(rows := np.flatnonzero(is_doubtful)):
            example = escape(examples.sample_name(int(rows[0])))
            files = format_count(len(rows), f"file of {split} is", f"files of {split} are")
            lines.append(f"{files} {kind}, such as {example}")
    return lines


def _input_mean_std(image_settings: ImageSettings, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the config, or else those of the training images."""
    if image_settings.mean is not None and image_settings.std is not None:
        return tuple(image_settings.mean), tuple(image_settings.std)
    mean, std = training_mean_std(dataset)
    if max(std) == 0:
        raise DataError("all training images have one and the same colour: there is nothing to learn from")
    if image_settings.std is None and 0 in std:
        index = std.index(0)
        channel = f"the {('red', 'green', 'blue')[index]} channel" if len(std) == 3 else f"channel {index} (from 0)"
        raise DataError(f"{channel} is the same in every training image; set data.image.std for it")
    return tuple(image_settings.mean or mean), tuple(image_settings.std or std)


def _dark_image_remarks(stored: StoredSplit, examples: Examples, split: str) -> list[str]:
    if stored.images.pixel_format.is_deep or stored.records is None:
        return []
    if (peak := narrow_peak(stored.records()["peak"][examples.rows.numpy()])) is None:
        return []
    return [f"the 16-bit images of {split} {describe_dark_images(peak)}"]


def _fingerprint(contents: SourceContents, listings: dict[int, NDArray[np.int64] | None]) -> str:
    """Compute a digest of the data: names, sizes and times of files, or the pixels themselves, and every target."""
    hasher = hashlib.sha256(repr(contents.classes + contents.number_names).encode())
    for name, split in sorted(contents.splits.items()):
        hasher.update(name.encode() + content_digest(split, listings[id(split)]))
        for target, values in sorted(split.targets.items()):
            hasher.update(target.encode() + values.numpy().tobytes())
        if split.objects is not None:
            for target in sorted(OBJECT_COLUMNS):
                hasher.update(target.encode())
                for block in split.objects.padded_blocks():  # padded, so that older fingerprints stay valid
                    hasher.update(block[target].numpy().tobytes())
        if split.masks is not None:
            hasher.update(split.masks.meaning.encode())
            hasher.update(content_digest(split.masks, listings[id(split.masks)]))
    return hasher.hexdigest()
