"""From a source to pictures in memory: splits, decoding once, statistics. The `data` section of the YAML."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cnnrun.augment import Augment
from cnnrun.contracts import Facts, Indexed, Pair, Shape, SourceSpec, Split
from cnnrun.data import Source
from cnnrun.errors import DataError
from cnnrun.pictures import Image, load, resize
from cnnrun.randomness import key, permutation
from cnnrun.spec import Kinds, Spec

Progress = Callable[[str, int], Any]  # (what, total) -> a context manager that gives advance(count)


class HoldOut(Spec):
    """Parts of the training pictures held out where the source has no such split of its own; stratified by class."""

    val: float = Field(0.1, ge=0, lt=1)
    """The part that chooses: best checkpoint, early stop."""
    test: float = Field(0.0, ge=0, lt=1)
    """The part that is reported, once."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Apart from the run's own seed, so that several seeds are compared on the same pictures."""


class Data(Spec):
    """What the network learns from."""

    source: Annotated[Source, Kinds()]
    image: Image = Image()
    augment: Augment = Augment()
    split: HoldOut = HoldOut()
    memory_gib: float = Field(4.0, gt=0)
    """A source's split whose decoded pictures take more is kept in a memory-mapped file (see `cache_dir`) instead."""
    cache_dir: str | None = None
    """Where such files are kept; by default cnnrun's folder under the user's cache folder."""

    def image_shape(self) -> Shape | None:
        """(C, H, W) that the network will see, or None where the config must say and does not."""
        own = self.source.image
        size = self.image.size or (own[1:] if own else None)
        channels = self.image.channels or (own[0] if own else None)
        return None if size is None or channels is None else (channels, *size)


@dataclass(frozen=True)
class Examples:
    """A split in memory: `rows` says which pictures of the shared uint8 cache [M, C, H, W] are its own."""

    pictures: Tensor
    rows: Tensor
    targets: dict[str, Tensor]
    source: Split
    source_rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """What to call sample `index` in messages."""
        return self.source.name(int(self.source_rows[index]))


@dataclass(frozen=True)
class Dataset:
    """Every split, decoded, and what was measured on the training split."""

    facts: Facts
    splits: dict[str, Examples]


@dataclass(frozen=True)
class Index:
    """A source looked through: its splits as (source split, rows), held-out ones included."""

    source: Indexed
    splits: dict[str, tuple[Split, Tensor]]
    held_out: frozenset[str]

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, (_, rows) in self.splits.items()}

    def class_counts(self) -> tuple[int, ...]:
        """Training pictures of each class; empty where the targets are not labels."""
        split, rows = self.splits["train"]
        if "labels" not in split.targets:
            return ()
        return tuple(torch.bincount(split.targets["labels"][rows], minlength=len(self.source.classes)).tolist())


_DECODER = 2  # raised whenever the same file would be decoded to other pixels
_HOLD_OUT_KEYS = {"test": 1, "val": 2}


def index(data: Data) -> Index:
    """Look through the source and hold out what it does not split itself. Raises DataError."""
    source: SourceSpec = data.source
    indexed = source.read()
    splits = {name: (split, torch.arange(len(split.pictures))) for name, split in indexed.splits.items()}
    wanted = {name: getattr(data.split, name) for name in _HOLD_OUT_KEYS if name not in indexed.splits}
    held_out = frozenset(name for name, part in wanted.items() if part > 0)
    for name in sorted(held_out):
        split, rows = splits["train"]
        held = _held_out(rows, split.targets, wanted[name], key(data.split.seed, _HOLD_OUT_KEYS[name]))
        splits["train"] = (split, rows[~held])
        splits[name] = (split, rows[held])
    for name, (_, rows) in splits.items():
        if len(rows) == 0:
            raise DataError(f"the {name} split is empty; change data.split")
    return Index(indexed, splits, held_out)


def prepare(data: Data, indexed: Index, progress: Progress, only: Sequence[str] | None = None) -> Dataset:
    """Decode; measure mean and deviation on the training pictures.

    `only` decodes those splits alone and measures nothing: for evaluating a network that knows its own statistics.
    """
    shape = data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    wanted = {name: pair for name, pair in indexed.splits.items() if only is None or name in only}
    decoded: dict[int, Tensor] = {}
    examples: dict[str, Examples] = {}
    for name, (split, rows) in wanted.items():
        if id(split) not in decoded:
            decoded[id(split)] = _decoded(split, data, shape, progress)
        targets = {target: values[rows] for target, values in split.targets.items()}
        examples[name] = Examples(decoded[id(split)], rows, targets, split, rows)
    facts = Facts(
        classes=indexed.source.classes,
        image=shape,
        class_counts=indexed.class_counts(),
        counts=indexed.counts,
        fingerprint=_fingerprint(indexed.source),
    )
    if only is None:
        mean, std = _statistics(data.image, examples["train"])
        facts = replace(facts, mean=mean, std=std)
    return Dataset(facts, examples)


def _statistics(image: Image, train: Examples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation as the config gives them, or else as measured on the training pictures."""
    if image.mean is not None and image.std is not None:
        return tuple(image.mean), tuple(image.std)
    mean, std = channel_statistics(train.pictures, train.rows)
    if min(std) == 0:
        raise DataError("every training picture has one and the same colour; there is nothing to learn from")
    return tuple(image.mean or mean), tuple(image.std or std)


def channel_statistics(
    pictures: Tensor, rows: Tensor, chunk: int = 2048
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the pictures `rows` of a uint8 cache; float64 sums."""
    channels = pictures.shape[1]
    total, square, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for part in rows.split(chunk):
        values = pictures[part].float()
        total += values.sum((0, 2, 3), dtype=torch.float64)
        square += values.square_().sum((0, 2, 3), dtype=torch.float64)
        count += values[:, 0].numel()
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _held_out(rows: Tensor, targets: dict[str, Tensor], part: float, seed: int) -> Tensor:
    """Which of `rows` to hold out: bool [len(rows)], `part` of every class, at least one where a class has two."""
    labels = targets["labels"][rows] if "labels" in targets else torch.zeros(len(rows), dtype=torch.int64)
    order = permutation(seed, 0, len(rows))
    held = torch.zeros(len(rows), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        count = round(part * len(members))
        held[members[: max(count, 1) if len(members) > 1 else count]] = True
    return held


def _decoded(split: Split, data: Data, shape: Shape, progress: Progress) -> Tensor:
    """The split's pictures as one uint8 tensor [N, C, H, W]: in memory, or mapped from a file when too large."""
    count = len(split.pictures)
    if isinstance(split.pictures, np.ndarray) and split.pictures.shape[1:] == (*shape[1:], shape[0]):
        return torch.from_numpy(np.require(split.pictures.transpose(0, 3, 1, 2), requirements=["C", "W"]))
    if count * int(np.prod(shape)) <= data.memory_gib * 2**30:
        pixels = np.empty((count, *shape), np.uint8)
        _decode_into(pixels, split, data.image, progress)
        return torch.from_numpy(pixels)
    return _mapped(split, data, shape, progress)


def _decode_into(out: Any, split: Split, image: Image, progress: Progress) -> None:
    """Decode every picture into out[i] = [C, H, W], in parallel; name every bad file before giving up."""
    size: Pair = (out.shape[2], out.shape[3])

    def decode(number: int) -> str | None:
        item = split.pictures[number]
        try:
            if isinstance(item, Path):
                pixels = load(item, size, out.shape[1], image)
            else:
                pixels = resize(item, size, out.shape[1], image)
        except DataError as error:
            return str(error)
        out[number] = pixels.transpose(2, 0, 1)
        return None

    bad: list[str] = []
    # Pillow lets go of the interpreter while it decodes, so threads use every core and share the memory.
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool, progress("decoding", len(out)) as advance:
        for message in pool.map(decode, range(len(out)), chunksize=16):
            advance(1)
            bad += [] if message is None else [message]
    if bad:
        more = [f"... and {len(bad) - 20} more files"] if len(bad) > 20 else []
        raise DataError(*bad[:20], *more)


def _mapped(split: Split, data: Data, shape: Shape, progress: Progress) -> Tensor:
    """As `_decoded`, in a file named by what was decoded and how, so that the next run finds it."""
    folder = Path(data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cnnrun")
    folder.mkdir(parents=True, exist_ok=True)
    how = (_DECODER, shape, data.image.model_dump(exclude={"size", "channels", "mean", "std"}))
    name = hashlib.sha256(_files_digest(split) + repr(how).encode()).hexdigest()[:32]
    path = folder / f"{name}.u8"
    full = (len(split.pictures), *shape)
    if not path.exists() or path.stat().st_size != int(np.prod(full)):
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            pixels = np.memmap(temporary, np.uint8, "w+", shape=full)
            _decode_into(pixels, split, data.image, progress)
            pixels.flush()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=full))


def _fingerprint(indexed: Indexed) -> str:
    """A digest of what the data is: names, sizes and times of files, or the pixels themselves, and every target."""
    digest = hashlib.sha256(repr(indexed.classes).encode())
    for name, split in sorted(indexed.splits.items()):
        digest.update(name.encode() + _files_digest(split))
        for target, values in sorted(split.targets.items()):
            digest.update(target.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _files_digest(split: Split) -> bytes:
    digest = hashlib.sha256()
    if isinstance(split.pictures, np.ndarray):
        digest.update(np.ascontiguousarray(split.pictures).data)
        return digest.digest()
    for path in _paths(split):
        status = path.stat()
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.digest()


def _paths(split: Split) -> Iterator[Path]:
    for item in split.pictures:
        assert isinstance(item, Path)
        yield item
