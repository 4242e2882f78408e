"""`cnnrun init`: looks at data, says what it found, and writes a config that trains well as it stands."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrun.base.atomic_files import write_text
from cnnrun.base.errors import ConfigError, DataError, printable
from cnnrun.base.progress import bar, say
from cnnrun.config import yaml_reader
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import Pair
from cnnrun.data.audit import look_through
from cnnrun.data.dataset import Dataset
from cnnrun.data.guess_source import source_of
from cnnrun.data.image_files import named, opened_header, read
from cnnrun.data.index import index
from cnnrun.data.prepare import prepare
from cnnrun.data.settings import Data
from cnnrun.experiment.assemble import fitting
from cnnrun.experiment.config_file import parse
from cnnrun.experiment.schema import Experiment
from cnnrun.model.network import build, materialize

_SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
_SMALL = 40  # pictures up to this side are used as they are
_LOOK = 400  # pictures whose headers decide the size
_ENOUGH_STEPS, _FEW_EPOCHS, _MANY_EPOCHS = 3000, 20, 150
_TINY = 40  # pictures: too few to report anything on a part of them
_UNEVEN = 3  # classes that differ in size by more are weighed


def start(data: str, task: str, out: Path | None, minutes: float) -> dict[str, Any]:
    """Write the config; returns what was found and chosen. Raises ConfigError or DataError."""
    if task != "classify":
        raise ConfigError(f"--task {printable(task)}: init writes configs for classify alone")
    source, name = source_of(data)
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"{printable(str(path))}: is there already; choose another --out")
    seen = _seen(source)
    choice = _chosen(seen, minutes)
    lenient = {"bad_files": "skip", "leakage": "skip", "split": choice.split, "image": choice.image(seen)}
    settings = Data.model_validate({"source": source, **lenient})
    dataset = prepare(settings, index(settings), bar)
    strict = settings.model_copy(update={"leakage": "error", "bad_files": "error"})
    found = look_through(strict, prepare(settings.model_copy(update={"leakage": "keep"}), index(settings), bar), bar)
    text = _written(source, seen, choice, dataset, found, minutes, path)
    experiment = parse(text, str(path))
    built = fitting(experiment, dataset.facts)  # what is written passes `check`
    write_text(path, text)
    return {
        "path": str(path),
        "size": list(choice.size),
        "channels": seen.channels,
        "parameters": built.parameters,
        "epochs": choice.epochs,
        "batch": choice.batch,
        "images_per_second": round(choice.speed),
        "minutes": round(choice.epochs * len(dataset.splits["train"]) / choice.speed / 60, 1),
        **found,
    }


@dataclass(frozen=True)
class Seen:
    """What a first look says: how many training pictures, their usual (height, width), channels, own splits."""

    pictures: int
    median: Pair
    channels: int
    own_size: bool
    splits: frozenset[str]


def _seen(source: Any) -> Seen:
    data = Data.model_validate({"source": source, "split": {"val": 0.0, "test": 0.0}})
    indexed = index(data)
    split = indexed.source.splits["train"]
    splits = frozenset(indexed.source.splits)
    if isinstance(split.pictures, np.ndarray):
        height, width, channels = split.pictures.shape[1:]
        return Seen(len(split), (height, width), channels, data.source.image is not None, splits)
    sizes, grey = [], 0
    for number in np.linspace(0, len(split) - 1, min(_LOOK, len(split))).astype(int).tolist():
        item = split.pictures[number]
        try:
            with named(split.name(number)):
                assert not isinstance(item, np.ndarray)
                size, is_grey = opened_header(read(item))
        except DataError:
            continue  # told below with all that cannot be used
        sizes.append(size)
        grey += is_grey
    if not sizes:
        raise DataError(f"{printable(split.name(0))}: neither this nor any other picture can be read")
    height, width = np.median(np.array(sizes), 0).astype(int).tolist()
    return Seen(len(split), (height, width), 1 if grey > 0.95 * len(sizes) else 3, False, splits)


@dataclass(frozen=True)
class Choice:
    """What the config will say, and the speed that was measured for it, in pictures a second."""

    size: Pair
    epochs: int
    batch: int
    speed: float
    layers: str
    split: dict[str, float]

    def image(self, seen: Seen) -> dict[str, Any]:
        """The `image` section; empty where the source knows."""
        return {} if seen.own_size else {"size": list(self.size), "channels": seen.channels}


def _chosen(seen: Seen, minutes: float) -> Choice:
    """The largest pictures that can be shown often enough in the time that there is."""
    train = seen.pictures
    batch = max(2, min(128, 2 ** int(math.log2(max(1, 0.7 * train / 12)))))
    wanted = max(_FEW_EPOCHS, min(_MANY_EPOCHS, math.ceil(_ENOUGH_STEPS / max(1, train // batch))))
    split = {} if "val" in seen.splits else {"val": 0.1 if "test" in seen.splits else 0.15}
    split |= {} if "test" in seen.splits or train < _TINY else {"test": 0.15}
    sides = [side for side in _sides(seen) if side >= 32] or _sides(seen)
    for side in reversed(sides):
        size = _size(seen, side)
        layers = _layers(min(size))
        speed = _speed(layers, (seen.channels, *size), batch)
        possible = int(0.8 * 60 * minutes * speed / train)
        if possible >= _FEW_EPOCHS or side == sides[0]:
            return Choice(size, max(2, min(wanted, possible)), batch, speed, layers, split)
    raise AssertionError("unreachable: the smallest side is always taken")


def _sides(seen: Seen) -> list[int]:
    shorter = min(seen.median)
    if seen.own_size or shorter <= _SMALL:
        return [shorter]
    return [side for side in _SIDES if side <= max(shorter, _SIDES[0])]


def _size(seen: Seen, side: int) -> Pair:
    """That side, and the other in proportion where pictures are far from square."""
    height, width = seen.median
    if seen.own_size or min(seen.median) <= _SMALL:
        return (height, width) if seen.own_size else (max(8, round(height / 4) * 4), max(8, round(width / 4) * 4))
    longer = round(side * max(height, width) / min(height, width) / 8) * 8
    longer = side if longer <= 1.25 * side else min(longer, 2 * side)
    return (side, longer) if height <= width else (longer, side)


_CONV = "  - conv: {{out_channels: {0}, norm: batch, activation: relu}}\n"
_TWICE = "  - repeat: {{times: 2, layers: [conv: {{out_channels: {0}, norm: batch, activation: relu}}]}}\n"
_STAGE = """  - residual:
      norm: batch
      activation: relu
      layers:
        - conv: {{out_channels: {0}, stride: 2, norm: batch, activation: relu}}
        - conv: {{out_channels: {0}, norm: batch}}
"""


def _layers(side: int) -> str:
    """Layers for pictures of that side: convolutions in pairs for small ones, residual stages for larger."""
    if side <= _SMALL:
        made = _CONV.format(32) + _CONV.format(32)
        for width in (64, 128)[: max(1, round(math.log2(side / 8)))]:
            made += "  - max_pool: 2\n" + _TWICE.format(width)
    else:
        made = "  - conv: {out_channels: 32, stride: 2, norm: batch, activation: relu}\n"
        for width in (64, 128, 256, 256)[: max(2, round(math.log2(side / 12)))]:
            made += _STAGE.format(width)
    return made + "  - global_avg_pool\n  - dropout: 0.2\n"


def _speed(layers: str, shape: tuple[int, int, int], batch: int) -> float:
    """Pictures a second of a training step on this machine, of three the fastest."""
    say(f"measuring a training step at {shape[1]}x{shape[2]}")
    text = f"task: classify\ndata: {{source: digits}}\nmodel:\n{layers}"
    experiment: Experiment = parse(text, "init")
    facts = Facts(tuple(map(str, range(10))), shape)
    net = materialize(build(experiment.model.layers, experiment.task, facts).network, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device).to(memory_format=torch.channels_last)
    pictures = torch.rand(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        net(pictures).logsumexp(1).mean().backward()
        float(next(net.parameters()).detach().sum())  # waits for the device
        best = min(best, time.perf_counter() - began)
    return batch / best


def _written(
    source: Any, seen: Seen, choice: Choice, dataset: Dataset, found: dict[str, Any], minutes: float, path: Path
) -> str:
    """The config with a comment for each choice."""
    counts = [count for count in dataset.facts.class_counts if count]
    uneven = max(counts) / min(counts) > _UNEVEN
    problems = {each["what"]: each for each in found["findings"] if each["level"] == "error"}
    bad = problems.pop("cannot be decoded", None)
    problems = {what: each for what, each in problems.items() if "without a picture" not in what}
    lines = [
        f"# Written by `cnnrun init`: {sum(found['pictures'].values()):,} pictures, "
        f"{len(dataset.facts.classes)} classes of {min(counts):,} to {max(counts):,} training pictures.",
        f"# Train: cnnrun train {path}    Look at the data: cnnrun data check {path}, cnnrun data show {path}",
        f"# A training step was measured at {choice.speed:,.0f} pictures/s here; the epochs fit {minutes:g} minutes.",
        "task: {classify: {class_weights: balanced}}    # rare classes count as much as frequent ones"
        if uneven
        else "task: classify",
        "data:",
        *_indented(yaml_reader.dump({"source": source}), 2),
    ]
    if image := choice.image(seen):
        height, width = seen.median
        lines.append(f"  image: {yaml_reader.flow(image)}    # the usual picture has {width}x{height} pixels")
    lines += [f"  # {_flip_note(seen)}", f"  augment: {yaml_reader.flow(_augment(seen))}"]
    if choice.split:
        lines.append(f"  split: {yaml_reader.flow(choice.split)}    # held out of train; val chooses, test is reported")
    if bad:
        lines.append(f"  bad_files: skip    # {bad['count']:,} cannot be decoded; `cnnrun data check` names them")
    if problems:
        worst = next(iter(problems.values()))
        lines.append(f"  leakage: skip    # {worst['count']:,}: {worst['what']}; training leaves them out")
    lines += ["model:    # summary: cnnrun summary " + str(path), choice.layers.rstrip()]
    lines += _training(choice, uneven, dataset)
    return "\n".join(lines) + "\n"


def _training(choice: Choice, uneven: bool, dataset: Dataset) -> list[str]:
    few = len(dataset.splits["val"]) < 400
    monitor = "val/f1" if uneven else "val/loss" if few else "val/accuracy"
    rate = float(f"{0.1 * math.sqrt(choice.batch / 128):.1g}")
    return [
        "train:",
        f"  epochs: {choice.epochs}",
        f"  batch: {choice.batch}",
        f"  optimizer: {{sgd: {{lr: {rate}, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}}}}",
        "  schedule: {one_cycle: {warmup: 0.2}}",
        f"  monitor: {monitor}    # chooses the best checkpoint",
    ]


def _augment(seen: Seen) -> dict[str, Any]:
    if seen.channels == 1 or min(seen.median) <= _SMALL:
        return {"shift": 0.1} if seen.channels == 3 else {"shift": 0.08, "rotate": 8, "scale": 0.1}
    return {"flip": "horizontal", "crop": {"scale": [0.5, 1.0]}, "brightness": 0.2, "contrast": 0.2}


def _flip_note(seen: Seen) -> str:
    if "flip" in _augment(seen):
        return "Remove the flip where left and right differ."
    return "Add `flip: horizontal` where left and right are alike."


def _indented(text: str, by: int) -> list[str]:
    return [" " * by + line for line in text.rstrip().splitlines()]
