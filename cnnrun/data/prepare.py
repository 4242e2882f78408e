"""Decoding a data set: what is left out of it, what leaks from one split to another, what is measured on it."""

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

from cnnrun.base.error_lines import join_names, truncate_lines
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import OBJECT_COLUMNS
from cnnrun.contracts.source import BadBox, SourceContents, Split
from cnnrun.data.cache import Progress, images_per_block
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.file_listing import content_digest, list_files
from cnnrun.data.image_files import ImageSettings
from cnnrun.data.image_records import RECORD, channel_mean_std, fill_pixel_sums
from cnnrun.data.index import SourceIndex, class_remarks
from cnnrun.data.leakage import apply_leakage_policy, move_copies_together
from cnnrun.data.settings import Data
from cnnrun.data.storage import StoredSplit, store_split
from cnnrun.data.targets import count_classes, measure_numbers, select_targets

MOVED_NOTE = "moved within data.split, so that copies of a picture are on one side"
_FEW_LEVELS = 64  # of 256: pictures of 16 bits that come to fewer are said


def build_dataset(data: Data, indexed: SourceIndex, progress: Progress, only: Sequence[str] | None = None) -> Dataset:
    """Decode; leave out what the config lets; measure mean and deviation on the training pictures.

    `only` decodes those splits alone and measures nothing: for evaluating a network that knows its own statistics.
    Raises DataError.
    """
    refuse_bad_boxes(indexed, data.bad_boxes)
    return finish_dataset(data, indexed, decode_splits(data, indexed, progress, only))


@dataclass(frozen=True)
class DecodedSplits:
    """The splits and all that decoding has found, before any of it is judged; `moved` pictures changed sides."""

    splits: dict[str, tuple[Split, Tensor]]
    stored_splits: dict[str, StoredSplit]
    file_listings: dict[int, NDArray[np.int64] | None]
    moved_count: int
    has_all_splits: bool


def decode_splits(
    data: Data, indexed: SourceIndex, progress: Progress, only: Sequence[str] | None = None
) -> DecodedSplits:
    """Decode the splits, or `only` some of them. Raises StorageError, and Unreadable for files that come not now."""
    shape = data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    listed = _listed(data, indexed)
    wanted = {name: pair for name, pair in indexed.splits.items() if only is None or name in only}
    once: dict[int, StoredSplit] = {}
    for split, _ in wanted.values():
        if id(split) not in once:
            once[id(split)] = store_split(split, shape, data.image, data, listed[id(split)], progress)
    splits, moved = move_copies_together(indexed, wanted, once)
    by_name = {name: once[id(split)] for name, (split, _) in splits.items()}
    return DecodedSplits(splits, by_name, listed, moved, only is None)


def finish_dataset(data: Data, indexed: SourceIndex, decoded: DecodedSplits) -> Dataset:
    """The data set that the config wants of what was decoded. Raises DataError for what it does not let pass."""
    refuse_bad_boxes(indexed, data.bad_boxes)
    shape = data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    splits, left_out = _without_bad(decoded.splits, decoded.stored_splits, data.bad_files)
    facts = Facts(
        classes=indexed.contents.classes,
        image=shape,
        class_counts=indexed.class_counts(),
        counts={name: len(rows) for name, (_, rows) in splits.items()} if decoded.has_all_splits else indexed.counts,
        fingerprint=_fingerprint(indexed.contents, decoded.file_listings),
        class_ids=indexed.contents.class_ids,
        numbers=indexed.numbers(),
    )
    of_files = [(name, split, decoded.file_listings[id(split)]) for name, split in indexed.contents.splits.items()]
    dataset = Dataset(
        facts,
        _examples(splits, decoded.stored_splits, shape, data.image),
        decoded.stored_splits,
        tuple(left_out),
        bad_boxes=indexed.contents.bad_boxes,
        file_listings=tuple((name, split, found) for name, split, found in of_files if found is not None),
    )
    if not decoded.has_all_splits:
        return dataset
    apart = data.split.by == "label"
    moved = [f"{decoded.moved_count:,} picture(s) {MOVED_NOTE}"] if decoded.moved_count else []
    notes = [*class_remarks(indexed), *moved, *_remarks(dataset, apart)]
    return _measured(data.image, apply_leakage_policy(replace(dataset, notes=tuple(notes)), data.leakage, apart))


def data_fingerprint(data: Data, indexed: SourceIndex) -> str:
    """The fingerprint that `build_dataset` gives the data, without decoding it."""
    return _fingerprint(indexed.contents, _listed(data, indexed))


def _listed(data: Data, indexed: SourceIndex) -> dict[int, NDArray[np.int64] | None]:
    """Each split's files with their sizes and times, or hashes of their contents."""
    return {
        id(split): list_files(split, data.fingerprint == "content", data.workers) for split in indexed.source_splits()
    }


def _examples(
    splits: dict[str, tuple[Split, Tensor]], kept: dict[str, StoredSplit], shape: Shape, image: ImageSettings
) -> dict[str, Examples]:
    made = {}
    for name, (split, rows) in splits.items():
        targets, objects = select_targets(split, rows, shape, image)
        made[name] = Examples(kept[name].images, rows, targets, split, rows, objects)
    return made


def _measured(image: ImageSettings, dataset: Dataset) -> Dataset:
    """The data set with its final counts and the training pictures' mean and deviation. Raises DataError."""
    train, facts = dataset.splits["train"], dataset.facts
    counts = {name: len(examples) for name, examples in dataset.splits.items()}
    of_class = count_classes(train.all_targets(), len(facts.classes))
    mean, std = _statistics(image, dataset)
    numbers = measure_numbers([each.name for each in facts.numbers], train.targets)
    measured = replace(facts, mean=mean, std=std, counts=counts, class_counts=of_class, numbers=numbers)
    return replace(dataset, facts=measured)


def _without_bad(
    splits: dict[str, tuple[Split, Tensor]], kept: dict[str, StoredSplit], policy: str
) -> tuple[dict[str, tuple[Split, Tensor]], list[dict[str, str]]]:
    """The splits without pictures that could not be decoded, and those; or all of them named in a DataError."""
    left_out: list[dict[str, str]] = []
    made = {}
    for name, (split, rows) in splits.items():
        good = rows[~torch.isin(rows, torch.tensor(list(kept[name].problems), dtype=torch.int64))]
        problems = kept[name].problems | _other_size(split, good, kept[name])
        bad = torch.isin(rows, torch.tensor(list(problems), dtype=torch.int64))
        for row in rows[bad].tolist():
            left_out.append({"split": name, "picture": split.sample_name(row), "reason": problems[row]})
        made[name] = (split, rows[~bad])
        _refuse_all_bad(name, len(rows), [problems[row] for row in rows[bad].tolist()])
    if policy == "error":
        _refuse_bad_files([each["reason"] for each in left_out])
    return made, left_out


def _of_boxes(bad: Sequence[BadBox]) -> list[str]:
    """How many boxes are left out, and used although they are of some doubtful kind, with an example of each."""
    kinds: dict[str, list[BadBox]] = {}
    for each in bad:
        used = f"used all the same ({each.kind})" if "the same box" in each.kind else "cut at their pictures' edges"
        kinds.setdefault(used if each.is_used else "left out (data.bad_boxes: skip)", []).append(each)
    return [f"{len(of):,} boxes are {what}, such as {of[0].name}: {of[0].problem}" for what, of in kinds.items()]


def refuse_bad_boxes(indexed: SourceIndex, policy: str) -> None:
    """Raises DataError with the boxes that cannot be used, unless they are to be left out."""
    wrong = [each for each in indexed.contents.bad_boxes if not each.is_used]
    if wrong and policy == "error":
        lines = truncate_lines([f"{each.name}: {each.problem}" for each in wrong], "boxes")
        raise DataError(*lines, "mend or remove them, or leave them out with data.bad_boxes: skip")


def refuse_missing_files(indexed: SourceIndex, policy: str) -> None:
    """Raises DataError for files that are not there, in the words of whoever would decode them."""
    lines: list[str] = []
    for name, (split, rows) in indexed.splits.items():
        if not isinstance(split.images, Files):
            continue
        missing = [row for row in rows.tolist() if not split.images[row].exists()]
        of_split = [
            f"{escape(split.sample_name(row))}: cannot be decoded: {os.strerror(errno.ENOENT)}" for row in missing
        ]
        _refuse_all_bad(name, len(rows), of_split)
        lines += of_split
    if policy == "error":
        _refuse_bad_files(lines)


def _refuse_all_bad(split: str, count: int, reasons: list[str]) -> None:
    if len(reasons) == count:
        raise DataError(f"no picture of the {split} split can be decoded; the first: {reasons[0]}")


def _refuse_bad_files(reasons: list[str]) -> None:
    if reasons:
        advice = "mend or remove them, or leave them out with data.bad_files: skip"
        raise DataError(*truncate_lines(reasons, "files"), advice)


def _other_size(split: Split, rows: Tensor, kept: StoredSplit) -> dict[int, str]:
    """The pictures that are not of the size that their boxes are written for."""
    if split.sizes is None or kept.records is None or not isinstance(split.images, Files):
        return {}
    records = kept.records()
    real = np.stack([records["height"], records["width"]], 1)[rows.numpy()]
    written = split.sizes[rows.numpy()]
    return {
        int(
            rows[place]
        ): f"{escape(split.sample_name(int(rows[place])))}: is {real[place][1]}x{real[place][0]} pixels; "
        f"its boxes are written for {written[place][1]}x{written[place][0]}"
        for place in np.flatnonzero((real != written).any(1))
    }


def _remarks(dataset: Dataset, apart: bool) -> list[str]:
    """What else is worth a line before training: classes that a split lacks, files that are not what they are named."""
    lines, classes = _of_boxes(dataset.bad_boxes), dataset.facts.classes
    for split, examples in dataset.splits.items():
        if not apart and (counts := count_classes(examples.all_targets(), len(classes))):
            missing = [name for name, count in zip(classes, counts, strict=True) if not count]
            what = "picture" if examples.objects is None else "object"
            lines += [f"no {what} of {join_names(missing)} in {split}"] if missing else []
        lines += [
            f"{name} is {value:g} in every picture of {split}" for name, value in constant_numbers(dataset, split)
        ]
        lines += _dark(dataset.stored_splits[split], examples, split)
        lines += _odd_files(dataset.stored_splits[split], examples, split)
    return [*lines, *_undecoded(dataset.skipped_samples)]


def constant_numbers(dataset: Dataset, split: str) -> list[tuple[str, float]]:
    """The numbers that are one value in all pictures of a split, on which no error can be told from another."""
    values = dataset.splits[split].targets.get("numbers")
    if values is None:
        return []
    same = zip(dataset.facts.numbers, values.amin(0).tolist(), values.amax(0).tolist(), strict=True)
    return [(escape(number.name), least) for number, least, most in same if least == most]


def _undecoded(left_out: Sequence[dict[str, str]]) -> list[str]:
    if not left_out:
        return []
    how = "cannot be decoded and are left out (data.bad_files: skip)"
    return [f"{len(left_out):,} picture(s) {how}, such as {escape(left_out[0]['reason'])}"]


def _odd_files(kept: StoredSplit, examples: Examples, split: str) -> list[str]:
    """What files of a split are doubtful for: a line a kind."""
    if kept.records is None:
        return []
    records, lines = kept.records()[examples.rows.numpy()], []
    kinds = {
        "are of another format than named": records["misnamed"],
        "are of one single colour": records["flat"],
        "have EXIF that cannot be read": records["orientation"] == 0,
    }
    for what, are_so in kinds.items():
        if len(found := np.flatnonzero(are_so)):
            lines.append(
                f"{len(found):,} file(s) of {split} {what}, such as {escape(examples.sample_name(int(found[0])))}"
            )
    return lines


def _statistics(image: ImageSettings, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation as the config gives them, or else as measured on the training pictures."""
    if image.mean is not None and image.std is not None:
        return tuple(image.mean), tuple(image.std)
    mean, std = training_mean_std(dataset)
    if min(std) == 0:
        raise DataError("every training picture has one and the same colour; there is nothing to learn from")
    return tuple(image.mean or mean), tuple(image.std or std)


def _dark(kept: StoredSplit, examples: Examples, split: str) -> list[str]:
    if kept.records is None or (peak := narrow_peak(kept.records()["peak"][examples.rows.numpy()])) is None:
        return []
    return [f"the 16-bit pictures of {split} {describe_dark_images(peak)}"]


def narrow_peak(peak_N: NDArray[np.uint16]) -> int | None:
    """The largest value of all pictures of 16 bits, where they use so few of them that little is left in 8."""
    peak = int(peak_N.max(initial=0))
    return peak if 0 < peak < _FEW_LEVELS << 8 else None


def describe_dark_images(peak: int) -> str:
    """Words for what becomes of pictures of 16 bits with that largest value."""
    return (
        f"have no value above {peak:,} of 65,535, which leaves {(peak >> 8) + 1} of 256 grey levels: stretch them first"
    )


def training_mean_std(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over the training pictures."""
    train, kept = dataset.splits["train"], dataset.stored_splits["train"]
    if kept.records is None:
        total, squares = _sums(train)
    else:
        records, channels = kept.records()[train.rows.numpy()], train.images.shape[0]
        total, squares = records["total"][:, :channels], records["squares"][:, :channels]
    return channel_mean_std(total, squares, int(np.prod(train.images.shape[1:])))


def _sums(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums over the pixels of each picture and channel, and of their squares: int64 [N, C] each."""
    made = np.zeros(len(examples), RECORD)
    for part in torch.arange(len(examples)).split(images_per_block(int(np.prod(examples.images.shape)))):
        fill_pixel_sums(made[part[0] : part[-1] + 1], examples.load_images(part).numpy())
    channels = examples.images.shape[0]
    return made["total"][:, :channels], made["squares"][:, :channels]


def _fingerprint(indexed: SourceContents, listed: dict[int, NDArray[np.int64] | None]) -> str:
    """A digest of what the data is: names, sizes and times of files, or the pixels themselves, and every target."""
    made = hashlib.sha256(repr(indexed.classes + indexed.number_names).encode())
    for name, split in sorted(indexed.splits.items()):
        made.update(name.encode() + content_digest(split, listed[id(split)]))
        for target, values in sorted(split.targets.items()):
            made.update(target.encode() + values.numpy().tobytes())
        if split.objects is not None:
            for target in sorted(OBJECT_COLUMNS):
                made.update(target.encode())
                for block in split.objects.padded_blocks():  # the bytes that the first edition hashed
                    made.update(block[target].numpy().tobytes())
    return made.hexdigest()
