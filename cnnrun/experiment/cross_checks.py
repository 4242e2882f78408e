"""Mistakes between sections of a config: settings that do not fit the task, unknown layer names, shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cnnrun.base.counts import format_count
from cnnrun.base.extras import missing_package
from cnnrun.config.messages import did_you_mean
from cnnrun.config.tree import KeyPath, Map, Position, Problem, find_position, path_text
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.settings import Data
from cnnrun.experiment.schema import Experiment
from cnnrun.model.builder import BuildError
from cnnrun.model.network import BuiltNetwork, build_network

Mistake = tuple[KeyPath, str]  # the setting, and the message for the user

_BYTES_PER_PARAMETER = 16  # a weight, its gradient and two optimizer moments, 4 bytes each

# The data has not been read yet; its classes and target values do not matter for these checks.
_PLACEHOLDER_CLASSES = tuple(map(str, range(10)))
_PLACEHOLDER_NUMBERS = (NumberStatistics("number"),)


def find_mistakes(experiment: Experiment, tree: Map, start: Position) -> list[Problem]:
    """Find mistakes between sections: settings that do not fit the task, the image or the network."""
    mistakes = _find_task_mistakes(experiment)
    if any(path[0] == "task" or path == ("data", "source") for path, _ in mistakes):
        pass  # further checks would only be guesses
    elif (shape := experiment.data.image_shape()) is None:
        kind = experiment.data.source.kind
        message = f"{kind!r} sets no image size: give size and channels"
        mistakes.append((("data", "image"), message))
    else:
        mistakes += [*_find_image_mistakes(experiment.data, shape[0]), *_find_network_mistakes(experiment, shape)]
    return [Problem(find_position(tree, path, start), path_text(tree, path), message) for path, message in mistakes]


def _find_image_mistakes(data: Data, channels: int) -> list[Mistake]:
    """Find settings of the image and its augmentation that need other channels or a missing package."""
    mistakes: list[Mistake] = []
    own_channels = data.source.image_shape[0] if data.source.image_shape else channels
    if channels != own_channels and not {channels, own_channels} <= {1, 3}:
        message = f"the images of {data.source.kind} have {format_count(own_channels, 'channel')}; remove the line"
        mistakes.append((("data", "image", "channels"), message))
    for setting in ("mean", "std"):
        values = getattr(data.image, setting)
        if values is not None and len(values) != channels:
            counts = f"{format_count(len(values), 'number')} for {format_count(channels, 'channel')}"
            mistakes.append((("data", "image", setting), f"{counts}; give one number per channel"))
    for setting in ("mixup", "cutmix"):
        missing = missing_package("scipy", "stats", setting)
        if missing and getattr(data.augment, setting):
            mistakes.append((("data", "augment", setting), missing))
    if channels != 3:
        images = "grey images" if channels == 1 else f"images of {format_count(channels, 'channel')}"
        for setting in ("saturation", "hue", "grayscale"):
            if getattr(data.augment, setting):
                message = f"{images} have no colour to change; remove the line"
                mistakes.append((("data", "augment", setting), message))
    return mistakes


def _find_network_mistakes(experiment: Experiment, shape: Shape) -> list[Mistake]:
    """Build the network without memory and check its shapes, the layers named elsewhere, and its size."""
    facts = DataFacts(_PLACEHOLDER_CLASSES, shape, numbers=_PLACEHOLDER_NUMBERS)
    try:
        built_network = build_network(experiment.model.layers, experiment.task.bind(facts))
    except BuildError as error:
        return [(("model", "layers", *problem.path[1:]), problem.message) for problem in error.problems]
    return [*_find_unknown_layers(experiment, built_network), *_find_memory_mistakes(built_network)]


def _find_task_mistakes(experiment: Experiment) -> list[Mistake]:
    """Find settings that the task cannot use, and layers that the task names but the model does not have."""
    task, data, train = experiment.task, experiment.data, experiment.train
    requirements, mistakes = task.requirements(), list[Mistake]()
    if train.batch < train.accumulate:
        message = f"a batch of {train.batch} cannot be split into {train.accumulate} micro-batches"
        mistakes.append((("train", "accumulate"), message))
    if data.source.target_kind is not task.target_kind:
        message = f"{data.source.kind} gives {data.source.target_kind}; {task.kind} learns {task.target_kind}"
        mistakes.append((("data", "source"), message))
    for setting in ("mixup", "cutmix"):
        if getattr(data.augment, setting) and not requirements.can_mix_targets:
            message = f"{task.kind} cannot learn from mixed images; remove the line"
            mistakes.append((("data", "augment", setting), message))
    for path, kinds in data.augment.target_kinds_needed().items():
        if task.target_kind not in kinds:
            message = f"needs {' or '.join(kinds)}, which {task.kind} does not have; remove the line"
            mistakes.append((("data", "augment", *path), message))
    if train.sampler.needs_labels and task.target_kind is not TargetKind.LABELS:
        message = f"{train.sampler.kind} needs one label per image; {task.kind} has {task.target_kind}"
        mistakes.append((("train", "sampler"), message))
    mistakes += _find_class_split_mistakes(experiment)
    if requirements.needs_class_batches and not train.sampler.images_per_class:
        message = f"this loss of {task.kind} needs several images of a class in a batch: use `sampler: identities`"
        mistakes.append((("train", "sampler"), message))
    for setting in requirements.invalid_transforms:
        if getattr(data.augment, setting) not in (None, 0, "none"):
            message = f"changes images but not their targets, so {task.kind} would learn wrong ones; remove the line"
            mistakes.append((("data", "augment", setting), message))
    names = [node.name for node in experiment.model.layers if node.name]
    for name in requirements.feature_layers:
        if name not in names:
            mistakes.append((("task", task.kind), f"no layer {name!r} in the model{did_you_mean(name, names)}"))
    return mistakes


def _find_class_split_mistakes(experiment: Experiment) -> list[Mistake]:
    """Check that val and test have the classes that the task is measured on: the trained ones, or new ones."""
    task, data = experiment.task, experiment.data
    is_open_set = task.requirements().has_unseen_classes
    if is_open_set and data.split.by == "image" and data.leakage != "keep":
        message = (
            f"{task.kind} is measured on classes that it was not trained on: set data.split.by: label, "
            "or data.leakage: keep to share classes between the splits"
        )
        return [(("data", "split"), message)]
    if not is_open_set and data.source.has_pairs:
        return [(("data", "source"), f"{task.kind} is not measured on pairs; remove the file of pairs")]
    if not is_open_set and data.split.by == "label":
        message = f"{task.kind} is measured on the classes that it is trained on; remove the line"
        return [(("data", "split", "by"), message)]
    return []


def _find_unknown_layers(experiment: Experiment, built_network: BuiltNetwork) -> list[Mistake]:
    """Find layers in `model.until`, `train.freeze` or an optimizer's groups that the network does not have."""
    mistakes: list[Mistake] = []
    train = experiment.train
    children = [name for name, _ in built_network.network.layers.named_children()]
    for path, name in ((("model", "until"), experiment.model.until), (("train", "freeze"), train.freeze)):
        if name is not None and name not in children:
            mistakes.append((path, f"no layer {name!r} in the model{did_you_mean(name, children)}"))
    always_frozen = train.always_frozen
    frozen = children[: children.index(always_frozen) + 1] if always_frozen in children else []
    frozen_prefixes = tuple(f"layers.{name}." for name in frozen)
    trainable = [name for name, _ in built_network.network.named_parameters() if not name.startswith(frozen_prefixes)]
    task = experiment.task.bind(DataFacts(_PLACEHOLDER_CLASSES, (1,), numbers=_PLACEHOLDER_NUMBERS))
    criterion = task.learning.build_criterion()
    trainable += [f"criterion.{name}" for name, _ in criterion.named_parameters()]
    for group in train.optimizer.unused_groups(trainable):
        index = train.optimizer.groups.index(group)
        group_path = ("groups", index, "params")
        hint = did_you_mean(group.params, _top_level_names(trainable))
        outside = " outside earlier groups" if index else ""
        message = f"{group.params!r} matches no trainable parameter{outside}{hint}"
        mistakes.append((("train", "optimizer", train.optimizer.kind, *group_path), message))
    return mistakes


def _top_level_names(names: Sequence[str]) -> list[str]:
    """The head and the top-level layers that these parameters belong to."""
    return list(dict.fromkeys(".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in names))


def _find_memory_mistakes(built_network: BuiltNetwork) -> list[Mistake]:
    """Check that the weights, gradients and moments fit into this machine's memory."""
    needed = built_network.parameter_count * _BYTES_PER_PARAMETER
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory:
        return []
    row = max(built_network.rows, key=lambda row: row.parameters)
    words = re.findall(r"\w+", row.path)[1:]
    path: KeyPath = ("model", "layers", *(int(word) if word.isdigit() else word for word in words))
    message = (
        f"{row.parameters:,} of {built_network.parameter_count:,} parameters: training needs {needed / 2**30:,.0f} "
        f"GiB, this machine has {memory / 2**30:,.0f} GiB"
    )
    return [(path, message)]
