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
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.progress import progress_bar, say
from cnnrun.config import yaml_reader
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.audit import audit_dataset
from cnnrun.data.dataset import Dataset
from cnnrun.data.guess_source import guess_source
from cnnrun.data.image_files import image_errors, read_image_bytes, read_image_header
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.experiment.assemble import build_checked_network
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.schema import Experiment
from cnnrun.model.network import build_network, materialize

_SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
_SMALL = 40  # pictures up to this side are used as they are
_LOOK = 400  # pictures whose headers decide the size
_ENOUGH_STEPS, _FEW_EPOCHS, _MANY_EPOCHS = 3000, 20, 150
_TINY = 40  # pictures: too few to report anything on a part of them
_UNEVEN = 3  # classes that differ in size by more are weighed


def write_config(data: str, task: str, out: Path | None, minutes: float) -> dict[str, Any]:
    """Write the config; returns what was found and chosen. Raises ConfigError or DataError."""
    if task != "classify":
        raise ConfigError(f"--task {escape(task)}: init writes configs for classify alone")
    source, name = guess_source(data)
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"{escape(str(path))}: is there already; choose another --out")
    seen = _seen(source)
    choice = _chosen(seen, minutes)
    lenient = {"bad_files": "skip", "leakage": "skip", "split": choice.split, "image": choice.image_section(seen)}
    settings = Data.model_validate({"source": source, **lenient})
    dataset = build_dataset(settings, index_source(settings), progress_bar)
    strict = settings.model_copy(update={"leakage": "error", "bad_files": "error"})
    found = audit_dataset(
        strict,
        build_dataset(settings.model_copy(update={"leakage": "keep"}), index_source(settings), progress_bar),
        progress_bar,
    )
    text = _written(source, seen, choice, dataset, found, minutes, path)
    experiment = parse_config(text, str(path))
    built = build_checked_network(experiment, dataset.facts)  # what is written passes `check`
    write_text(path, text)
    return {
        "path": str(path),
        "size": list(choice.size),
        "channels": seen.channels,
        "parameters": built.parameter_count,
        "epochs": choice.epochs,
        "batch": choice.batch,
        "images_per_second": round(choice.images_per_second),
        "minutes": round(choice.epochs * len(dataset.splits["train"]) / choice.images_per_second / 60, 1),
        **found,
    }


@dataclass(frozen=True)
class SourceOverview:
    """What a first look says: how many training pictures, their usual (height, width), channels, own splits."""

    images: int
    median: HeightWidth
    channels: int
    has_own_size: bool
    splits: frozenset[str]


def _seen(source: Any) -> SourceOverview:
    data = Data.model_validate({"source": source, "split": {"val": 0.0, "test": 0.0}})
    indexed = index_source(data)
    split = indexed.contents.splits["train"]
    splits = frozenset(indexed.contents.splits)
    if isinstance(split.images, np.ndarray):
        height, width, channels = split.images.shape[1:]
        return SourceOverview(len(split), (height, width), channels, data.source.image is not None, splits)
    sizes, grey = [], 0
    for number in np.linspace(0, len(split) - 1, min(_LOOK, len(split))).astype(int).tolist():
        item = split.images[number]
        try:
            with image_errors(split.sample_name(number)):
                assert not isinstance(item, np.ndarray)
                size, is_grey = read_image_header(read_image_bytes(item))
        except DataError:
            continue  # told below with all that cannot be used
        sizes.append(size)
        grey += is_grey
    if not sizes:
        raise DataError(f"{escape(split.sample_name(0))}: neither this nor any other picture can be read")
    height, width = np.median(np.array(sizes), 0).astype(int).tolist()
    return SourceOverview(len(split), (height, width), 1 if grey > 0.95 * len(sizes) else 3, False, splits)


@dataclass(frozen=True)
class ConfigChoice:
    """What the config will say, and the speed that was measured for it, in pictures a second."""

    size: HeightWidth
    epochs: int
    batch: int
    images_per_second: float
    layers: str
    split: dict[str, float]

    def image_section(self, seen: SourceOverview) -> dict[str, Any]:
        """The `image` section; empty where the source knows."""
        return {} if seen.has_own_size else {"size": list(self.size), "channels": seen.channels}


def _chosen(seen: SourceOverview, minutes: float) -> ConfigChoice:
    """The largest pictures that can be shown often enough in the time that there is."""
    train = seen.images
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
            return ConfigChoice(size, max(2, min(wanted, possible)), batch, speed, layers, split)
    raise AssertionError("unreachable: the smallest side is always taken")


def _sides(seen: SourceOverview) -> list[int]:
    shorter = min(seen.median)
    if seen.has_own_size or shorter <= _SMALL:
        return [shorter]
    return [side for side in _SIDES if side <= max(shorter, _SIDES[0])]


def _size(seen: SourceOverview, side: int) -> HeightWidth:
    """That side, and the other in proportion where pictures are far from square."""
    height, width = seen.median
    if seen.has_own_size or min(seen.median) <= _SMALL:
        return (height, width) if seen.has_own_size else (max(8, round(height / 4) * 4), max(8, round(width / 4) * 4))
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
    experiment: Experiment = parse_config(text, "init")
    facts = Facts(tuple(map(str, range(10))), shape)
    net = materialize(build_network(experiment.model.layers, experiment.task, facts).network, 0)
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
    source: Any,
    seen: SourceOverview,
    choice: ConfigChoice,
    dataset: Dataset,
    found: dict[str, Any],
    minutes: float,
    path: Path,
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
        f"# A training step was measured at {choice.images_per_second:,.0f} images/s here; "
        f"the epochs fit {minutes:g} minutes.",
        "task: {classify: {class_weights: balanced}}    # rare classes count as much as frequent ones"
        if uneven
        else "task: classify",
        "data:",
        *_indented(yaml_reader.dump_yaml({"source": source}), 2),
    ]
    if image := choice.image_section(seen):
        height, width = seen.median
        lines.append(f"  image: {yaml_reader.dump_flow(image)}    # the usual picture has {width}x{height} pixels")
    lines += [f"  # {_flip_note(seen)}", f"  augment: {yaml_reader.dump_flow(_augment(seen))}"]
    if choice.split:
        lines.append(
            f"  split: {yaml_reader.dump_flow(choice.split)}    # held out of train; val chooses, test is reported"
        )
    if bad:
        lines.append(f"  bad_files: skip    # {bad['count']:,} cannot be decoded; `cnnrun data check` names them")
    if problems:
        worst = next(iter(problems.values()))
        lines.append(f"  leakage: skip    # {worst['count']:,}: {worst['what']}; training leaves them out")
    lines += ["model:    # summary: cnnrun summary " + str(path), choice.layers.rstrip()]
    lines += _training(choice, uneven, dataset)
    return "\n".join(lines) + "\n"


def _training(choice: ConfigChoice, uneven: bool, dataset: Dataset) -> list[str]:
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


def _augment(seen: SourceOverview) -> dict[str, Any]:
    if seen.channels == 1 or min(seen.median) <= _SMALL:
        return {"shift": 0.1} if seen.channels == 3 else {"shift": 0.08, "rotate": 8, "scale": 0.1}
    return {"flip": "horizontal", "crop": {"scale": [0.5, 1.0]}, "brightness": 0.2, "contrast": 0.2}


def _flip_note(seen: SourceOverview) -> str:
    if "flip" in _augment(seen):
        return "Remove the flip where left and right differ."
    return "Add `flip: horizontal` where left and right are alike."


def _indented(text: str, by: int) -> list[str]:
    return [" " * by + line for line in text.rstrip().splitlines()]
