"""What the network learns from: the `data` section of the YAML, its splits, and what they are once decoded."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from cnnrun.base.errors import DataError, printable
from cnnrun.base.labelling import listed, unreadable_names
from cnnrun.base.randomness import key
from cnnrun.config.spec import Kinds, Spec, did_you_mean
from cnnrun.contracts.layer import BadBox, Facts, Indexed, Number, Shape, SourceSpec, Split
from cnnrun.contracts.objects import ObjectTable
from cnnrun.data.augment.settings import Augment
from cnnrun.data.box_placement import placed
from cnnrun.data.class_names import alike_names, check_class_names, distinguishable, questionable_numbers
from cnnrun.data.hold_out import combinations, held_out, held_out_classes
from cnnrun.data.image_files import Image
from cnnrun.data.sources import Source
from cnnrun.data.storage import CacheSettings, Pictures, Stored

Part = Annotated[float, Field(ge=0, lt=1)] | Annotated[list[str], Field(min_length=1)]


class HoldOut(Spec):
    """Parts of the training pictures held out where the source has no such split of its own; stratified by label.

    Where the source knows groups, a group is on one side alone.
    """

    by: Literal["picture", "label"] = "picture"
    """`label` holds out whole classes, such as people who are never seen in training."""
    val: Part = 0.1
    """The part that chooses: best checkpoint, early stop, thresholds. With `by: label`, a part of the classes, or \
their names."""
    test: Part = 0.0
    """The part that is reported, once. With `by: label`, a part of the classes, or their names."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Apart from the run's own seed, so that several seeds are compared on the same pictures."""

    @model_validator(mode="after")
    def _names_are_of_classes(self) -> Self:
        if self.by == "picture" and (isinstance(self.val, list) or isinstance(self.test, list)):
            raise ValueError("classes are held out by name with `by: label`")
        return self


class Data(CacheSettings):
    """What the network learns from."""

    source: Annotated[Source, Kinds()]
    image: Image = Image()
    augment: Augment = Augment()
    split: HoldOut = HoldOut()
    bad_files: Literal["error", "skip"] = "error"
    """What to do about files that cannot be decoded: stop and name them, or leave them out and list them in the run."""
    bad_boxes: Literal["error", "skip"] = "error"
    """What to do about boxes of no area, swapped or outside their picture: stop and name them, or leave them out."""
    leakage: Literal["error", "skip", "keep"] = "error"
    """What to do where val or test holds a picture or a group of train, or one picture has two labels: stop, leave \
such pictures out of training, or say so and go on."""
    fingerprint: Literal["times", "content"] = "times"
    """How changed files are noticed: by size and time of change, or by reading them all."""
    prefetch: int | None = Field(None, ge=0, le=1000)
    """Batches read ahead while the network works; by default 2, and none where pictures in memory meet a CPU."""

    def image_shape(self) -> Shape | None:
        """(C, H, W) that the network will see, or None where the config must say and does not."""
        own = self.source.image
        size = self.image.size or (own[1:] if own else None)
        channels = self.image.channels or (own[0] if own else None)
        return None if size is None or channels is None else (channels, *size)


@dataclass(frozen=True)
class Examples:
    """A split, decoded: `rows` says which of the pictures [M, C, H, W] that splits may share are its own."""

    pictures: Pictures
    rows: Tensor
    targets: dict[str, Tensor]
    source: Split
    source_rows: Tensor
    objects: ObjectTable | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """What to call sample `index` in messages."""
        return self.source.name(int(self.source_rows[index]))

    def only(self, kept: Tensor) -> Examples:
        """The samples for which `kept` (bool [N]) holds."""
        targets = {name: values[kept] for name, values in self.targets.items()}
        objects = None if self.objects is None else self.objects.only(kept)
        rows, source_rows = self.rows[kept], self.source_rows[kept]
        return replace(self, rows=rows, source_rows=source_rows, targets=targets, objects=objects)

    def targets_of(self, index_B: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The targets of samples `index_B`, objects padded to the most that one of them has."""
        objects = {} if self.objects is None else self.objects.padded(index_B)
        own = {name: values[index_B] for name, values in self.targets.items()} | objects
        return {name: values.to(device, non_blocking=True) for name, values in own.items()}

    def all_targets(self) -> dict[str, Tensor]:
        """The targets of all samples; objects one after the other, with how many there are of each: see `flat`."""
        return flat(self.targets, self.objects)

    def take(self, index_B: Tensor) -> Tensor:
        """Samples `index_B` as [B, C, H, W] on the host."""
        return self.pictures.take(self.rows[index_B])


@dataclass(frozen=True)
class Dataset:
    """Every split, decoded, what was measured on the training split, and what was left out and why."""

    facts: Facts
    splits: dict[str, Examples]
    stored: dict[str, Stored] = field(default_factory=dict)
    left_out: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # what the audit found, for people
    bad_boxes: tuple[BadBox, ...] = ()
    listed: tuple[tuple[str, Split, NDArray[np.int64]], ...] = ()  # the source's splits of files, with sizes and times

    def lines(self) -> Iterator[str]:
        """A line a file: split, path, size, time of change, label (or a digest of its boxes).

        Nothing for pictures that are no files.
        """
        for name, split, of_files in self.listed:
            labels = told(split.targets, split.objects, len(split)).tolist()
            for number, (size, when, *_) in enumerate(of_files.tolist()):
                yield f"{name}\t{printable(split.name(number))}\t{size}\t{when}\t{labels[number]}"


def flat(targets: dict[str, Tensor], objects: ObjectTable | None) -> dict[str, Tensor]:
    """The targets of many samples as tensors, objects one after the other, and `counts` [N] of them."""
    return targets if objects is None else {**targets, **objects.columns, "counts": objects.counts_N}


def told(targets: dict[str, Tensor], objects: ObjectTable | None, count: int) -> Tensor:
    """What is known of each of `count` samples as one number, int64 [N]: its label, or a digest."""
    if "labels" in targets:
        return targets["labels"]
    if objects is not None:
        return torch.tensor(
            [code for block in objects.padded_blocks() for code in _digests(block, len(block["boxes"]))]
        )
    return torch.tensor(_digests(targets, count))


def _digests(targets: dict[str, Tensor], count: int) -> list[int]:
    known = [targets[name].numpy() for name in ("present", "numbers", "boxes", "objects") if name in targets]
    return [zlib.crc32(b"".join(each[i].tobytes() for each in known)) for i in range(count)]


@dataclass(frozen=True)
class Index:
    """A source looked through: its splits as (source split, rows), held-out ones included."""

    source: Indexed
    splits: dict[str, tuple[Split, Tensor]]
    held_out: frozenset[str]
    by_label: bool = False  # whole classes are held out

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, (_, rows) in self.splits.items()}

    def sources(self) -> list[Split]:
        """The source's own splits."""
        return list(self.source.splits.values())

    def targets(self, name: str, shape: Shape, image: Image) -> dict[str, Tensor]:
        """All targets of one of its splits, boxes where they lie in the network's pictures: see `flat`."""
        split, rows = self.splits[name]
        return flat(*targets_of(split, rows, shape, image))

    def class_counts(self) -> tuple[int, ...]:
        """Training pictures of each class, or objects; empty where the targets are neither."""
        split, rows = self.splits["train"]
        objects = {} if split.objects is None else split.objects.only(rows).columns
        own = {name: values[rows] for name, values in split.targets.items()}
        return counted(own | objects, len(self.source.classes))

    def numbers(self) -> tuple[Number, ...]:
        """The numbers that are known of each picture, as they are over the training pictures."""
        split, rows = self.splits["train"]
        return numbers_of(self.source.numbers, {name: values[rows] for name, values in split.targets.items()})


def targets_of(split: Split, rows: Tensor, shape: Shape, image: Image) -> tuple[dict[str, Tensor], ObjectTable | None]:
    """The targets of those of a source's samples, and their objects where they lie in the network's pictures."""
    own = {target: values[rows] for target, values in split.targets.items()}
    if split.objects is None or split.sizes is None:
        return own, None
    objects, views = placed(split.objects.only(rows), split.sizes[rows.numpy()], shape, image)
    return own | {"view": views}, objects


def counted(targets: dict[str, Tensor], classes: int) -> tuple[int, ...]:
    """How often each class stands in targets: of pictures, or of objects that are to be found."""
    if "present" in targets:
        return tuple(targets["present"].sum(0).tolist())
    if "labels" in targets:
        found = targets["labels"]
    elif "objects" in targets:
        found = targets["objects"][(targets["objects"] >= 0) & (targets["roles"] == 0)]
    else:
        return ()
    return tuple(torch.bincount(found, minlength=classes).tolist())


def numbers_of(names: Sequence[str], targets: dict[str, Tensor]) -> tuple[Number, ...]:
    """Mean, deviation and range of each of the numbers in the targets; nothing where they have none."""
    if "numbers" not in targets:
        return ()
    values = targets["numbers"].double()
    columns = (values.mean(0), values.std(0, correction=0), values.amin(0), values.amax(0))
    return tuple(Number(name, *each) for name, *each in zip(names, *(c.tolist() for c in columns), strict=True))


def remarks(indexed: Index) -> list[str]:
    """What of the classes is worth a line: names that look alike, numbers that may stand for no label."""
    names = indexed.source.classes
    lines = [f"classes {' and '.join(distinguishable(group))} differ in writing alone" for group in alike_names(names)]
    counts = indexed.class_counts() if "labels" in indexed.splits["train"][0].targets and not indexed.by_label else ()
    lines += many_classes(names, counts)
    if odd := questionable_numbers(names):
        lines.append(f"the classes are numbers, and {listed(odd)} is far from the others: a label, or none?")
    return lines


def many_classes(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The question that is asked of many classes, most of which have one training picture; nothing else."""
    if len(names) <= _MANY_CLASSES or sum(count == 1 for count in counts) <= len(names) / 2:
        return []
    what = f"{len(names):,} classes for {sum(counts):,} training pictures, most of them with one"
    return [f"{what}: is the label a number (task: regress), or another name for each picture?"]


_MANY_CLASSES = 30  # from here on one with a single picture each is asked about
HOLD_OUT_KEYS = {"test": 1, "val": 2}


def index(data: Data) -> Index:
    """Look through the source and hold out what it does not split itself. Raises DataError."""
    source: SourceSpec = data.source
    with unreadable_names():
        indexed = source.read(data.split.by == "label")
    check_class_names(indexed.classes, f"data.source.{source.kind}", are_declared=source.declares_classes)
    splits = {name: (split, torch.arange(len(split))) for name, split in indexed.splits.items()}
    wanted = {name: getattr(data.split, name) for name in HOLD_OUT_KEYS if name not in indexed.splits}
    away = frozenset(name for name, part in wanted.items() if part)
    _refuse_unknown(indexed, data.split)
    for name in sorted(away):
        split, rows = splits["train"]
        if not len(rows):
            break
        held = _held(data.split, name, split, rows, indexed.classes)
        splits["train"] = (split, rows[~held])
        splits[name] = (split, rows[held])
    for name, (_, rows) in splits.items():
        if len(rows) == 0:
            raise DataError(f"the {name} split is empty; change data.split")
    return Index(indexed, splits, away, data.split.by == "label")


def _held(how: HoldOut, name: str, split: Split, rows: Tensor, classes: Sequence[str]) -> Tensor:
    """Which of these rows of train become the split `name`: bool [N]."""
    part, labels, seed = getattr(how, name), labels_of(split)[rows], key(how.seed, HOLD_OUT_KEYS[name])
    if "present" in split.targets and isinstance(part, float) and part:
        labels = combinations(split.targets["present"][rows], math.ceil(1 / part))
    if isinstance(part, list):
        return torch.isin(labels, torch.tensor([classes.index(each) for each in part]))
    if how.by == "label":
        # A part of all classes, whatever was held out before.
        return held_out_classes(labels, min(1.0, part * len(labels_of(split).unique()) / len(labels.unique())), seed)
    return held_out(labels, None if split.groups is None else split.groups[rows], part, seed)


def _refuse_unknown(indexed: Indexed, how: HoldOut) -> None:
    """Raises DataError where classes are to be held out that are not there, or twice, or that stand aside already."""
    classes = indexed.classes
    named = {name: part for name in HOLD_OUT_KEYS if isinstance(part := getattr(how, name), list)}
    for name, part in named.items():
        if name in indexed.splits:
            raise DataError(f"data.split.{name}: the source says itself which pictures are {name}; remove the line")
        if unknown := [each for each in part if each not in classes]:
            raise DataError(f"data.split.{name}: no class {unknown[0]!r}{did_you_mean(unknown[0], list(classes))}")
    if both := set(named.get("val", ())) & set(named.get("test", ())):
        raise DataError(f"data.split: class {min(both)!r} is held out both for val and for test")


def labels_of(split: Split) -> Tensor:
    """Each sample's label, or 0 where it has no single one: int64 [N]."""
    return split.targets.get("labels", torch.zeros(len(split), dtype=torch.int64))
