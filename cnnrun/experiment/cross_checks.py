"""Mistakes between sections of a config: what the task cannot learn from, names that lead nowhere, shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cnnrun.base.extras import missing_package
from cnnrun.config.messages import did_you_mean
from cnnrun.config.tree import KeyPath, Map, Position, Problem, find_position, path_text
from cnnrun.contracts.facts import Facts, NumberStatistics
from cnnrun.experiment.schema import Experiment
from cnnrun.model.builder import BuildError
from cnnrun.model.network import BuiltNetwork, build_network

_BYTES_PER_PARAMETER = 16  # weight, gradient and two of an optimizer's moments, 4 bytes each


_UNREAD_CLASSES = tuple(map(str, range(10)))  # stands in for the data's classes until the data is read


_UNREAD_NUMBERS = (NumberStatistics("number"),)  # and for its numbers


def find_mistakes(experiment: Experiment, tree: Map, start: Position) -> list[Problem]:
    """Mistakes between sections: what the task cannot learn from, sizes that the source does not have, shapes."""
    found = _of_the_task(experiment)
    problems = [Problem(find_position(tree, path, start), path_text(tree, path), message) for path, message in found]

    def report(path: KeyPath, message: str) -> None:
        problems.append(Problem(find_position(tree, path, start), path_text(tree, path), message))

    if any(path[0] == "task" or path == ("data", "source") for path, _ in found):
        return problems  # what follows would be guesses
    source, shape = experiment.data.source, experiment.data.image_shape()
    if shape is None:
        report(("data", "image"), f"the pictures of {source.kind!r} have no size of their own: give size and channels")
        return problems
    for setting in ("mean", "std"):
        given = getattr(experiment.data.image, setting)
        if given is not None and len(given) != shape[0]:
            report(("data", "image", setting), f"{len(given)} numbers for {shape[0]} channel(s)")
    for setting in ("mixup", "cutmix"):
        missing = missing_package("scipy", "stats", setting)
        if missing and getattr(experiment.data.augment, setting):
            report(("data", "augment", setting), missing)
    if shape[0] == 1:
        for setting in ("saturation", "hue", "grayscale"):
            if getattr(experiment.data.augment, setting):
                report(("data", "augment", setting), "grey pictures have no colour to change; remove the line")
    try:
        built = build_network(
            experiment.model.layers, experiment.task, Facts(_UNREAD_CLASSES, shape, numbers=_UNREAD_NUMBERS)
        )
    except BuildError as error:
        for problem in error.problems:
            report(("model", "layers", *problem.path[1:]), problem.message)
        return problems
    problems += _misnamed(experiment, built, tree, start)
    return problems + _too_large(built, tree, start)


def _of_the_task(experiment: Experiment) -> list[tuple[KeyPath, str]]:
    """What other sections ask that the task cannot do, and layers that it names in vain: place and message each."""
    task, data, train = experiment.task, experiment.data, experiment.train
    found: list[tuple[KeyPath, str]] = []
    if train.batch < train.accumulate:
        found.append((("train", "accumulate"), f"cannot split a batch of {train.batch} into that many parts"))
    if data.source.target_kind != task.target_kind:
        text = f"{data.source.kind} gives {data.source.target_kind}; {task.kind} learns {task.target_kind}"
        found.append((("data", "source"), text))
    for setting in ("mixup", "cutmix"):
        if getattr(data.augment, setting) and not task.can_blend:
            text = f"{task.kind} cannot learn from mixed pictures; remove the line"
            found.append((("data", "augment", setting), text))
    for setting, used in (("mosaic", data.augment.mosaic), ("crop.safe", data.augment.crop and data.augment.crop.safe)):
        if used and task.target_kind != "boxes":
            path = ("data", "augment", *setting.split("."))
            found.append((path, f"is for boxes; {task.kind} has none; remove it"))
    if train.sampler.needs_labels and task.target_kind != "labels":
        text = f"{train.sampler.kind} needs one label a picture; {task.kind} has {task.target_kind}"
        found.append((("train", "sampler"), text))
    found += _of_unseen_classes(experiment)
    if task.needs_class_batches() and not train.sampler.images_per_class:
        text = f"{task.kind} learns here from pictures of a class that come together: `sampler: identities`"
        found.append((("train", "sampler"), text))
    for setting in task.harmful_augmentations():
        if getattr(data.augment, setting) not in (None, 0, "none"):
            text = f"{task.kind} would learn what is no longer true of such pictures; remove the line"
            found.append((("data", "augment", setting), text))
    names = [node.name for node in experiment.model.layers if node.name]
    for name in task.feature_layers():
        if name not in names:
            found.append((("task", task.kind), f"no layer {name!r} in the model{did_you_mean(name, names)}"))
    return found


def _of_unseen_classes(experiment: Experiment) -> list[tuple[KeyPath, str]]:
    """Whether val and test have the classes on which the task is measured: those that it learns, or others."""
    task, data = experiment.task, experiment.data
    if task.is_open_set and data.split.by == "picture" and data.leakage != "keep":
        text = f"{task.kind} is measured on classes that it never saw: `by: label` (if not so, data.leakage: keep)"
        return [(("data", "split"), text)]
    if not task.is_open_set and data.source.has_pairs:
        return [(("data", "source"), f"{task.kind} is not measured on pairs; remove the file of them")]
    if not task.is_open_set and data.split.by == "label":
        return [(("data", "split", "by"), f"{task.kind} is measured on the classes that it learns; remove the line")]
    return []


def _misnamed(experiment: Experiment, built: BuiltNetwork, tree: Map, start: Position) -> list[Problem]:
    """Layers named in `model.until`, `train.freeze` or an optimizer's groups that are not there."""
    problems, train = [], experiment.train

    def report(path: KeyPath, message: str) -> None:
        problems.append(Problem(find_position(tree, path, start), path_text(tree, path), message))

    children = [name for name, _ in built.network.layers.named_children()]
    for path, name in ((("model", "until"), experiment.model.until), (("train", "freeze"), train.freeze)):
        if name is not None and name not in children:
            report(path, f"no layer {name!r} in the model{did_you_mean(name, children)}")
    frozen = children[: children.index(train.freeze) + 1] if train.freeze in children else []
    held = tuple(f"layers.{name}." for name in frozen)
    learning = [name for name, _ in built.network.named_parameters() if not name.startswith(held)]
    criterion = experiment.task.criterion(Facts(_UNREAD_CLASSES, (1,), numbers=_UNREAD_NUMBERS))
    learning += [f"criterion.{name}" for name, _ in criterion.named_parameters()]
    for group in train.optimizer.unused_groups(learning):
        at = ("train", "optimizer", train.optimizer.kind, "groups", train.optimizer.groups.index(group), "params")
        report(at, f"{group.params!r} gets no parameter that learns{did_you_mean(group.params, _parts(learning))}")
    return problems


def _parts(names: Sequence[str]) -> list[str]:
    """The head and the top-level layers that parameters of these names belong to."""
    return list(dict.fromkeys(".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in names))


def _too_large(built: BuiltNetwork, tree: Map, start: Position) -> list[Problem]:
    needed = built.parameter_count * _BYTES_PER_PARAMETER
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory:
        return []
    row = max(built.rows, key=lambda row: row.parameters)
    words = re.findall(r"\w+", row.path)[1:]
    path: KeyPath = ("model", "layers", *(int(word) if word.isdigit() else word for word in words))
    text = (
        f"{row.parameters:,} of {built.parameter_count:,} parameters: training needs {needed / 2**30:,.0f} GiB, "
        f"this machine has {memory / 2**30:,.0f}"
    )
    return [Problem(find_position(tree, path, start), path_text(tree, path), text)]
