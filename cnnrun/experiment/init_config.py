"""Write a config for new data: `cnnrun init` looks at the data and chooses every setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrun.base.atomic_files import write_text
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.progress import progress_bar, say
from cnnrun.config import yaml_reader
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.audit import UNUSABLE, audit_dataset
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
from cnnrun.training.precision import estimate_images_per_second
from cnnrun.training.step_time import StepSize

_SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
_SMALL_SIDE = 40  # pixels; images whose shorter side is at most this are not scaled down
_MAX_HEADERS = 400  # headers whose median is the image size
_WANTED_STEPS, _MIN_EPOCHS, _MAX_EPOCHS = 3000, 20, 150
_MIN_IMAGES_FOR_TEST = 40  # with fewer, a test split would be too small to report
_MAX_CLASS_RATIO = 3  # classes get weights if the largest has more than this many times the smallest's images
_MIN_GREY_SHARE = 0.95  # the network gets one channel if more of the headers than this are grey
_MAX_BATCH, _WANTED_STEPS_PER_EPOCH = 128, 12
_TRAIN_SHARE = 0.7  # approximate share of the images that remains for training
_VAL_SHARE, _TEST_SHARE, _VAL_SHARE_BESIDE_TEST = 0.15, 0.15, 0.1
_STEP_TIME_SHARE = 0.8  # share of the training time that is spent on steps, not on evaluation and saving
_MIN_VAL_FOR_ACCURACY = 400  # on fewer images the loss tells checkpoints apart better than the accuracy


def write_config(data: str, task: str, out: Path | None, minutes: float) -> dict[str, Any]:
    """Write a config for the data; return the chosen settings and the audit. Raises ConfigError or DataError.

    The number of epochs is chosen for a training of `minutes`.
    """
    if task != "classify":
        raise ConfigError(f"--task {escape(task)}: init supports only classify; write the config by hand")
    source, name = guess_source(data)
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"{escape(str(path))}: already exists; choose another --out")
    overview = _survey_source(source)
    choice = _choose_settings(overview, minutes)
    dataset, findings = _audit_source(overview, choice)
    text = _format_config(overview, choice, dataset, findings, minutes, path)
    experiment = parse_config(text, str(path))
    built_network = build_checked_network(experiment, dataset.facts)  # the config must pass `cnnrun check`
    write_text(path, text)
    step_seconds = choice.epochs * len(dataset.splits["train"]) / choice.images_per_second
    return {
        "path": str(path),
        "size": list(choice.size),
        "channels": overview.channels,
        "parameters": built_network.parameter_count,
        "epochs": choice.epochs,
        "batch": choice.batch,
        "images_per_second": round(choice.images_per_second),
        "minutes": round(step_seconds / _STEP_TIME_SHARE / 60, 1),
        **findings,
    }


def _audit_source(overview: SourceOverview, choice: ChosenSettings) -> tuple[Dataset, dict[str, Any]]:
    """Decode the source with the chosen settings; returns its usable images, and the audit of all its images."""
    settings = Data.model_validate(
        {
            "source": overview.source,
            "bad_files": "skip",
            "leakage": "skip",
            "split": choice.split,
            "image": choice.image_section(overview),
        }
    )
    dataset = build_dataset(settings, index_source(settings), progress_bar)
    lenient = settings.model_copy(update={"leakage": "keep"})
    strict = settings.model_copy(update={"leakage": "error", "bad_files": "error"})
    return dataset, audit_dataset(strict, build_dataset(lenient, index_source(settings), progress_bar), progress_bar)


@dataclass(frozen=True)
class SourceOverview:
    """A source, the count, median (height, width) and channels of its training images, and the names of its splits.

    `has_own_size` is true if the source itself sets the image size.
    """

    source: Any  # as in the config
    images: int
    median: HeightWidth
    channels: int
    has_own_size: bool
    splits: frozenset[str]


def _survey_source(source: Any) -> SourceOverview:
    """Read the headers of some training images. Raises DataError if none can be read."""
    data = Data.model_validate({"source": source, "split": {"val": 0.0, "test": 0.0}})
    source_index = index_source(data)
    split = source_index.contents.splits["train"]
    splits = frozenset(source_index.contents.splits)
    if isinstance(split.images, np.ndarray):
        height, width, channels = split.images.shape[1:]
        return SourceOverview(
            source, len(split), (height, width), channels, data.source.image_shape is not None, splits
        )
    sizes, grey_count = [], 0
    for index in np.linspace(0, len(split) - 1, min(_MAX_HEADERS, len(split))).astype(int).tolist():
        item = split.images[index]
        try:
            with image_errors(split.sample_name(index)):
                assert not isinstance(item, np.ndarray)
                size, is_grey = read_image_header(read_image_bytes(item))
        except DataError:
            continue  # the audit reports it with all other damaged files
        sizes.append(size)
        grey_count += is_grey
    if not sizes:
        raise DataError(f"{escape(split.sample_name(0))}: cannot be read, nor can any other image of the split")
    height, width = np.median(np.array(sizes), 0).astype(int).tolist()
    channels = 1 if grey_count > _MIN_GREY_SHARE * len(sizes) else 3
    return SourceOverview(source, len(split), (height, width), channels, False, splits)


@dataclass(frozen=True)
class ChosenSettings:
    """The chosen settings, and the measured training speed in images per second."""

    size: HeightWidth
    epochs: int
    batch: int
    images_per_second: float
    layers: str
    split: dict[str, float]

    def image_section(self, overview: SourceOverview) -> dict[str, Any]:
        """The `image` section of the config; empty if the source sets the size."""
        return {} if overview.has_own_size else {"size": list(self.size), "channels": overview.channels}


def _choose_settings(overview: SourceOverview, minutes: float) -> ChosenSettings:
    """Choose the largest image size that allows _MIN_EPOCHS epochs in `minutes`, with its epochs, batch and layers."""
    count = overview.images
    batch = max(2, min(_MAX_BATCH, 2 ** int(math.log2(max(1, _TRAIN_SHARE * count / _WANTED_STEPS_PER_EPOCH)))))
    wanted_epochs = max(_MIN_EPOCHS, min(_MAX_EPOCHS, math.ceil(_WANTED_STEPS / max(1, count // batch))))
    has_test = "test" in overview.splits
    split = {} if "val" in overview.splits else {"val": _VAL_SHARE_BESIDE_TEST if has_test else _VAL_SHARE}
    split |= {} if has_test or count < _MIN_IMAGES_FOR_TEST else {"test": _TEST_SHARE}
    sides = [side for side in _possible_sides(overview) if side >= 32] or _possible_sides(overview)
    for side in reversed(sides):
        size = _choose_size(overview, side)
        layers = _choose_layers(min(size))
        speed = _measure_images_per_second(layers, (overview.channels, *size), batch)
        possible_epochs = int(_STEP_TIME_SHARE * 60 * minutes * speed / count)
        if possible_epochs >= _MIN_EPOCHS or side == sides[0]:
            epochs = max(2, min(wanted_epochs, possible_epochs))
            return ChosenSettings(size, epochs, batch, speed, layers, split)
    raise AssertionError("unreachable: the smallest side is always accepted")


def _possible_sides(overview: SourceOverview) -> list[int]:
    shorter = min(overview.median)
    if overview.has_own_size or shorter <= _SMALL_SIDE:
        return [shorter]
    return [side for side in _SIDES if side <= max(shorter, _SIDES[0])]


def _choose_size(overview: SourceOverview, side: int) -> HeightWidth:
    """Choose (height, width) with this shorter side; the longer side is in proportion if images are far from square."""
    height, width = overview.median
    if overview.has_own_size or min(overview.median) <= _SMALL_SIDE:
        return (
            (height, width) if overview.has_own_size else (max(8, round(height / 4) * 4), max(8, round(width / 4) * 4))
        )
    longer = round(side * max(height, width) / min(height, width) / 8) * 8
    longer = side if longer <= 1.25 * side else min(longer, 2 * side)
    return (side, longer) if height <= width else (longer, side)


_CONV = "  - conv: {{out_channels: {0}, norm: batch, activation: relu}}\n"
_TWO_CONVS = "  - repeat: {{times: 2, layers: [conv: {{out_channels: {0}, norm: batch, activation: relu}}]}}\n"
_STAGE = """  - residual:
      norm: batch
      activation: relu
      layers:
        - conv: {{out_channels: {0}, stride: 2, norm: batch, activation: relu}}
        - conv: {{out_channels: {0}, norm: batch}}
"""


def _choose_layers(side: int) -> str:
    """The YAML of the layers: pairs of convolutions for small images, residual stages for larger ones."""
    if side <= _SMALL_SIDE:
        text = _CONV.format(32) + _CONV.format(32)
        for width in (64, 128)[: max(1, round(math.log2(side / 8)))]:
            text += "  - max_pool: 2\n" + _TWO_CONVS.format(width)
    else:
        text = "  - conv: {out_channels: 32, stride: 2, norm: batch, activation: relu}\n"
        for width in (64, 128, 256, 256)[: max(2, round(math.log2(side / 12)))]:
            text += _STAGE.format(width)
    return text + "  - global_avg_pool\n  - dropout: 0.2\n"


def _measure_images_per_second(layers: str, shape: tuple[int, int, int], batch: int) -> float:
    """Measure training steps on this machine, whatever else it does; returns images per second."""
    say(f"measuring a training step at {shape[1]}x{shape[2]}")
    text = f"task: classify\ndata: {{source: digits}}\nmodel:\n{layers}"
    experiment: Experiment = parse_config(text, "init")
    facts = DataFacts(tuple(map(str, range(10))), shape)
    network = materialize(build_network(experiment.model.layers, experiment.task.bind(facts)).network, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    return estimate_images_per_second(network, StepSize(batch, shape, device))


def _format_config(
    overview: SourceOverview,
    choice: ChosenSettings,
    dataset: Dataset,
    findings: dict[str, Any],
    minutes: float,
    path: Path,
) -> str:
    """Format the config, with a comment for each choice."""
    counts = [count for count in dataset.facts.class_counts if count]
    is_imbalanced = max(counts) / min(counts) > _MAX_CLASS_RATIO
    images, classes = sum(findings["pictures"].values()), len(dataset.facts.classes)
    lines = [
        f"# Written by `cnnrun init`: {format_count(images, 'image')}, "
        f"{format_count(classes, 'class', 'classes')} of {min(counts):,} to {max(counts):,} training images.",
        f"# Train: cnnrun train {path}    Look at the data: cnnrun data check {path}, cnnrun data show {path}",
        f"# A training step was measured at {choice.images_per_second:,.0f} images/s here; "
        f"the epochs fit {minutes:g} minutes.",
        "task: {classify: {class_weights: balanced}}    # rare classes count as much as frequent ones"
        if is_imbalanced
        else "task: classify",
        *_data_section(overview, choice, findings),
        f"model:    # summary: cnnrun summary {path}",
        choice.layers.rstrip(),
        *_train_section(choice, is_imbalanced, dataset),
    ]
    return "\n".join(lines) + "\n"


def _data_section(overview: SourceOverview, choice: ChosenSettings, findings: dict[str, Any]) -> list[str]:
    """Lines of the section `data`; files and images that the audit reports as errors are skipped."""
    errors = {finding["what"]: finding for finding in findings["findings"] if finding["level"] == "error"}
    damaged = errors.pop(UNUSABLE, None)
    leaks = list(errors.values())  # `_audit_source` makes only unusable images and leaks errors
    lines = ["data:", *_indent_lines(yaml_reader.dump_yaml({"source": overview.source}), 2)]
    if image := choice.image_section(overview):
        height, width = overview.median
        lines.append(f"  image: {yaml_reader.dump_flow(image)}    # the median image has {width}x{height} pixels")
    lines += [f"  # {_flip_note(overview)}", f"  augment: {yaml_reader.dump_flow(_augment_section(overview))}"]
    if choice.split:
        purpose = "held out of train: val selects the checkpoint, test is for the final metrics"
        lines.append(f"  split: {yaml_reader.dump_flow(choice.split)}    # {purpose}")
    if damaged:
        lines.append(f"  bad_files: skip    # {damaged['count']:,} {UNUSABLE}; `cnnrun data check` names them")
    if leaks:
        lines.append(f"  leakage: skip    # {leaks[0]['count']:,}: {leaks[0]['what']}; training leaves them out")
    return lines


def _train_section(choice: ChosenSettings, is_imbalanced: bool, dataset: Dataset) -> list[str]:
    is_val_small = len(dataset.splits["val"]) < _MIN_VAL_FOR_ACCURACY
    monitor = "val/f1" if is_imbalanced else "val/loss" if is_val_small else "val/accuracy"
    learning_rate = float(f"{0.1 * math.sqrt(choice.batch / 128):.1g}")
    return [
        "train:",
        f"  epochs: {choice.epochs}",
        f"  batch: {choice.batch}",
        f"  optimizer: {{sgd: {{lr: {learning_rate}, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}}}}",
        "  schedule: {one_cycle: {warmup: 0.2}}",
        f"  monitor: {monitor}    # selects the best checkpoint",
    ]


def _augment_section(overview: SourceOverview) -> dict[str, Any]:
    if overview.channels == 1 or min(overview.median) <= _SMALL_SIDE:
        return {"shift": 0.1} if overview.channels == 3 else {"shift": 0.08, "rotate": 8, "scale": 0.1}
    return {"flip": "horizontal", "crop": {"scale": [0.5, 1.0]}, "brightness": 0.2, "contrast": 0.2}


def _flip_note(overview: SourceOverview) -> str:
    if "flip" in _augment_section(overview):
        return "Remove the flip where left and right differ."
    return "Add `flip: horizontal` where left and right are alike."


def _indent_lines(text: str, width: int) -> list[str]:
    return [" " * width + line for line in text.rstrip().splitlines()]
