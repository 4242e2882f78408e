"""The whole YAML file: its sections, how it is read and overridden, and every mistake in it with its place."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from cnnrun.base.errors import ConfigError, printable
from cnnrun.base.extras import missing_package
from cnnrun.config import blocks, yaml_reader, zoo
from cnnrun.config.spec import Kinds, Spec, did_you_mean, members, problems_of
from cnnrun.config.tree import Loc, Map, Mark, Problem, Seq, path_text, position
from cnnrun.contracts.layer import Facts, Number
from cnnrun.data.dataset import Data
from cnnrun.model.builder import BuildError
from cnnrun.model.network import Built, build
from cnnrun.model.structures import Model, Node
from cnnrun.tasks import Task
from cnnrun.training.settings import Train, monitored_numbers

_BYTES_PER_PARAMETER = 16  # weight, gradient and two of an optimizer's moments, 4 bytes each
_UNREAD_CLASSES = tuple(map(str, range(10)))  # stands in for the data's classes until the data is read
_UNREAD_NUMBERS = (Number("number"),)  # and for its numbers


class Experiment(Spec):
    """One config file. `task`, `data` and `model` must be there."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$", max_length=100)
    """The run folders' name; by default the file's."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the initial weights, the order, the augmentation and dropout."""
    task: Annotated[Task, Kinds()]
    data: Data
    model: Model
    train: Train = Train()

    def with_facts(self, facts: Facts) -> Experiment:
        """The same experiment with what was measured written into it, as a run's config.yaml has it."""
        image = self.data.image.model_copy(update={"mean": list(facts.mean), "std": list(facts.std)})
        return self.model_copy(update={"data": self.data.model_copy(update={"image": image})})

    def with_statistics_of(self, other: Experiment) -> Experiment:
        """The same experiment; where it leaves mean and deviation to be measured, with those of `other`."""
        mine, theirs = self.data.image, other.data.image
        image = mine.model_copy(update={"mean": mine.mean or theirs.mean, "std": mine.std or theirs.std})
        return self.model_copy(update={"data": self.data.model_copy(update={"image": image})})

    def with_weights_of(self, given: Facts | None) -> Experiment:
        """The same experiment; where it leaves mean and deviation to be measured, with those its weights learned by."""
        image = self.data.image
        if given is None or (image.mean and image.std) or len(given.mean) != (self.data.image_shape() or (0,))[0]:
            return self
        return self.with_facts(replace(given, mean=tuple(image.mean or given.mean), std=tuple(image.std or given.std)))

    def to_yaml(self) -> str:
        """The file with every default written out; reading it gives an equal experiment."""
        return yaml_reader.dump(self.model_dump(mode="json", by_alias=True, exclude_none=True))


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in the file at `path`. Raises ConfigError with every mistake found, in the file's order."""
    tree, problems = yaml_reader.read(path)
    if not tree.get("name"):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
        tree.put("name", name, Mark(str(path), 1, 1), Mark(str(path), 1, 1))
    return _checked(tree, problems, Mark(str(path), 1, 1), overrides)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment written in `text`; `where` names it in messages. Raises ConfigError."""
    tree, problems = yaml_reader.parse(text, where)
    return _checked(tree, problems, Mark(where, 1, 1), overrides)


def _checked(tree: Map, problems: list[Problem], start: Mark, overrides: Sequence[str]) -> Experiment:
    for override in overrides:
        zoo.opened(tree)
        problems += _override(tree, override)
    layers = [kind.kind for kind in members(Node)]
    problems += zoo.expand(tree, layers) + blocks.expand(tree, layers)
    experiment, found = _validated(tree, start)
    problems += found + _monitored(tree, start)
    if experiment and not any(problem.path.startswith(("model", "blocks", "data.image")) for problem in problems):
        problems += _meaning(experiment, tree, start)
    if problems or experiment is None:
        # A mistake in a block is found wherever the block is used; it is one mistake.
        once = {(problem.mark, problem.message): problem for problem in reversed(problems)}.values()
        ordered = sorted(once, key=lambda problem: (problem.mark.line, problem.mark.column))
        raise ConfigError(*(printable(str(problem)) for problem in ordered))
    return experiment


def _validated(tree: Map, start: Mark) -> tuple[Experiment | None, list[Problem]]:
    """The typed file and its mistakes. With mistakes in `train` alone it is given all the same, with that left out."""
    try:
        return Experiment.model_validate(tree), []
    except ValidationError as error:
        problems = problems_of(error, tree, (), start)
        bad = {str(item["loc"][0]) for item in error.errors(include_url=False) if item["loc"]}
    if bad & {"task", "data", "model"}:
        return None, problems
    rest = {key: value for key, value in tree.items() if key not in bad}
    return Experiment.model_validate(rest), problems


_TASK: TypeAdapter[Any] = TypeAdapter(Annotated[Task, Kinds()])


def _monitored(tree: Map, start: Mark) -> list[Problem]:
    """Whether the task gives the number that `train.monitor` names, whatever else is wrong with the file."""
    try:
        known = monitored_numbers(_TASK.validate_python(tree.get("task")))
        monitor = Train.model_validate(tree.get("train", {})).monitor
    except ValidationError:
        return []  # told already
    if monitor in known:
        return []
    path = ("train", "monitor")
    message = f"{monitor!r} is not measured{did_you_mean(monitor, known)}"
    return [Problem(position(tree, path, start), path_text(tree, path), message)]


def _meaning(experiment: Experiment, tree: Map, start: Mark) -> list[Problem]:
    """Mistakes between sections: what the task cannot learn from, sizes that the source does not have, shapes."""
    found = _of_the_task(experiment)
    problems = [Problem(position(tree, path, start), path_text(tree, path), message) for path, message in found]

    def report(path: Loc, message: str) -> None:
        problems.append(Problem(position(tree, path, start), path_text(tree, path), message))

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
        built = build(experiment.model.layers, experiment.task, Facts(_UNREAD_CLASSES, shape, numbers=_UNREAD_NUMBERS))
    except BuildError as error:
        for problem in error.problems:
            report(("model", "layers", *problem.path[1:]), problem.message)
        return problems
    problems += _misnamed(experiment, built, tree, start)
    return problems + _too_large(built, tree, start)


def _of_the_task(experiment: Experiment) -> list[tuple[Loc, str]]:
    """What other sections ask that the task cannot do, and layers that it names in vain: place and message each."""
    task, data, train = experiment.task, experiment.data, experiment.train
    found: list[tuple[Loc, str]] = []
    if train.batch < train.accumulate:
        found.append((("train", "accumulate"), f"cannot split a batch of {train.batch} into that many parts"))
    if data.source.targets != task.targets:
        text = f"{data.source.kind} gives {data.source.targets}; {task.kind} learns {task.targets}"
        found.append((("data", "source"), text))
    for setting in ("mixup", "cutmix"):
        if getattr(data.augment, setting) and not task.mixes:
            text = f"{task.kind} cannot learn from mixed pictures; remove the line"
            found.append((("data", "augment", setting), text))
    for setting, used in (("mosaic", data.augment.mosaic), ("crop.safe", data.augment.crop and data.augment.crop.safe)):
        if used and task.targets != "boxes":
            path = ("data", "augment", *setting.split("."))
            found.append((path, f"is for boxes; {task.kind} has none; remove it"))
    if train.sampler.needs_labels and task.targets != "labels":
        text = f"{train.sampler.kind} needs one label a picture; {task.kind} has {task.targets}"
        found.append((("train", "sampler"), text))
    found += _of_unseen_classes(experiment)
    if task.together() and not train.sampler.together:
        text = f"{task.kind} learns here from pictures of a class that come together: `sampler: identities`"
        found.append((("train", "sampler"), text))
    for setting in task.spoilt_by():
        if getattr(data.augment, setting) not in (None, 0, "none"):
            text = f"{task.kind} would learn what is no longer true of such pictures; remove the line"
            found.append((("data", "augment", setting), text))
    names = [node.name for node in experiment.model.layers if node.name]
    for name in task.taken():
        if name not in names:
            found.append((("task", task.kind), f"no layer {name!r} in the model{did_you_mean(name, names)}"))
    return found


def _of_unseen_classes(experiment: Experiment) -> list[tuple[Loc, str]]:
    """Whether val and test have the classes on which the task is measured: those that it learns, or others."""
    task, data = experiment.task, experiment.data
    if task.open_set and data.split.by == "picture" and data.leakage != "keep":
        text = f"{task.kind} is measured on classes that it never saw: `by: label` (if not so, data.leakage: keep)"
        return [(("data", "split"), text)]
    if not task.open_set and data.source.paired:
        return [(("data", "source"), f"{task.kind} is not measured on pairs; remove the file of them")]
    if not task.open_set and data.split.by == "label":
        return [(("data", "split", "by"), f"{task.kind} is measured on the classes that it learns; remove the line")]
    return []


def _misnamed(experiment: Experiment, built: Built, tree: Map, start: Mark) -> list[Problem]:
    """Layers named in `model.until`, `train.freeze` or an optimizer's groups that are not there."""
    problems, train = [], experiment.train

    def report(path: Loc, message: str) -> None:
        problems.append(Problem(position(tree, path, start), path_text(tree, path), message))

    children = [name for name, _ in built.network.layers.named_children()]
    for path, name in ((("model", "until"), experiment.model.until), (("train", "freeze"), train.freeze)):
        if name is not None and name not in children:
            report(path, f"no layer {name!r} in the model{did_you_mean(name, children)}")
    frozen = children[: children.index(train.freeze) + 1] if train.freeze in children else []
    held = tuple(f"layers.{name}." for name in frozen)
    learning = [name for name, _ in built.network.named_parameters() if not name.startswith(held)]
    criterion = experiment.task.criterion(Facts(_UNREAD_CLASSES, (1,), numbers=_UNREAD_NUMBERS))
    learning += [f"criterion.{name}" for name, _ in criterion.named_parameters()]
    for group in train.optimizer.unused(learning):
        at = ("train", "optimizer", train.optimizer.kind, "groups", train.optimizer.groups.index(group), "params")
        report(at, f"{group.params!r} gets no parameter that learns{did_you_mean(group.params, _parts(learning))}")
    return problems


def _parts(names: Sequence[str]) -> list[str]:
    """The head and the top-level layers that parameters of these names belong to."""
    return list(dict.fromkeys(".".join(name.split(".")[: 1 if name.startswith("head") else 2]) for name in names))


def _too_large(built: Built, tree: Map, start: Mark) -> list[Problem]:
    needed = built.parameters * _BYTES_PER_PARAMETER
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory:
        return []
    row = max(built.rows, key=lambda row: row.parameters)
    words = re.findall(r"\w+", row.path)[1:]
    path: Loc = ("model", "layers", *(int(word) if word.isdigit() else word for word in words))
    text = (
        f"{row.parameters:,} of {built.parameters:,} parameters: training needs {needed / 2**30:,.0f} GiB, "
        f"this machine has {memory / 2**30:,.0f}"
    )
    return [Problem(position(tree, path, start), path_text(tree, path), text)]


def _override(tree: Map, text: str) -> list[Problem]:
    """Put the value of `key.path=value` into the tree, marked with the argument it came from."""
    mark = Mark(f"argument '{text}'")
    path, equals, written = text.partition("=")
    keys: list[str | int] = [
        int(key) if re.fullmatch("[0-9]{1,9}", key) else key for key in re.findall(r"[^.\[\]]+", path)
    ]
    if not equals or not keys:
        return [Problem(mark, "", "an override is written key.path=value, such as train.epochs=3")]
    value, _, problems = yaml_reader.parse_value(written, "", mark)
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node, trouble = _step_into(node, key, mark)
        if trouble:
            return [Problem(mark, path_text(tree, tuple(keys[: depth + 1])), trouble)]
    last = keys[-1]
    if isinstance(node, Map) and isinstance(last, str):
        node.put(last, value, mark, mark)
    elif isinstance(node, Seq) and isinstance(last, int) and last < len(node):
        node[last], node.marks[last] = value, mark
    else:
        return [Problem(mark, path_text(tree, tuple(keys)), "there is no such place in the file")]
    return [Problem(mark, path, problem.message) for problem in problems]


def _step_into(node: Any, key: str | int, mark: Mark) -> tuple[Any, str | None]:
    """The child of `node` at `key`, made where it is missing; a bare kind becomes a mapping that can take settings."""
    if isinstance(node, Seq) and isinstance(key, int) and key < len(node):
        if isinstance(node[key], str):
            node[key] = _opened(node[key], mark)
        return node[key], None
    if isinstance(node, Map) and isinstance(key, str):
        child = node.get(key)
        if child is None:
            node.put(key, Map(), mark, mark)
        elif isinstance(child, str):
            node[key] = _opened(child, mark)
        return node[key], None
    return None, "there is no such place in the file"


def _opened(kind: str, mark: Mark) -> Map:
    made = Map()
    made.put(kind, Map(), mark, mark)
    return made
