"""Reading a config: the file, overrides, and every mistake in it with its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from cnnrun.base.errors import ConfigError, escape
from cnnrun.config import blocks, yaml_reader, zoo
from cnnrun.config.messages import did_you_mean, validation_problems
from cnnrun.config.spec import Kinds, union_members
from cnnrun.config.tree import Map, Position, Problem, Seq, find_position, path_text
from cnnrun.experiment.cross_checks import find_mistakes
from cnnrun.experiment.schema import Experiment
from cnnrun.model.structures import Node
from cnnrun.tasks import Task
from cnnrun.training.settings import Train, monitorable_metrics


def read_config(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in the file at `path`. Raises ConfigError with every mistake found, in the file's order."""
    tree, problems = yaml_reader.read_yaml(path)
    if not tree.get("name"):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
        tree.put("name", name, Position(str(path), 1, 1), Position(str(path), 1, 1))
    return _checked(tree, problems, Position(str(path), 1, 1), overrides)


def parse_config(text: str, where: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment written in `text`; `where` names it in messages. Raises ConfigError."""
    tree, problems = yaml_reader.parse_yaml(text, where)
    return _checked(tree, problems, Position(where, 1, 1), overrides)


def _checked(tree: Map, problems: list[Problem], start: Position, overrides: Sequence[str]) -> Experiment:
    for override in overrides:
        zoo.expand_shorthand(tree)
        problems += _override(tree, override)
    layers = [kind.kind for kind in union_members(Node)]
    problems += zoo.expand_model(tree, layers) + blocks.expand_blocks(tree, layers)
    experiment, found = _validated(tree, start)
    problems += found + _monitored(tree, start)
    if experiment and not any(problem.path.startswith(("model", "blocks", "data.image")) for problem in problems):
        problems += find_mistakes(experiment, tree, start)
    if problems or experiment is None:
        # A mistake in a block is found wherever the block is used; it is one mistake.
        once = {(problem.position, problem.message): problem for problem in reversed(problems)}.values()
        ordered = sorted(once, key=lambda problem: (problem.position.line, problem.position.column))
        raise ConfigError(*(escape(str(problem)) for problem in ordered))
    return experiment


def _validated(tree: Map, start: Position) -> tuple[Experiment | None, list[Problem]]:
    """The typed file and its mistakes. With mistakes in `train` alone it is given all the same, with that left out."""
    try:
        return Experiment.model_validate(tree), []
    except ValidationError as error:
        problems = validation_problems(error, tree, (), start)
        bad = {str(item["loc"][0]) for item in error.errors(include_url=False) if item["loc"]}
    if bad & {"task", "data", "model"}:
        return None, problems
    rest = {key: value for key, value in tree.items() if key not in bad}
    return Experiment.model_validate(rest), problems


_TASK: TypeAdapter[Any] = TypeAdapter(Annotated[Task, Kinds()])


def _monitored(tree: Map, start: Position) -> list[Problem]:
    """Whether the task gives the number that `train.monitor` names, whatever else is wrong with the file."""
    try:
        known = monitorable_metrics(_TASK.validate_python(tree.get("task")))
        monitor = Train.model_validate(tree.get("train", {})).monitor
    except ValidationError:
        return []  # told already
    if monitor in known:
        return []
    path = ("train", "monitor")
    message = f"{monitor!r} is not measured{did_you_mean(monitor, known)}"
    return [Problem(find_position(tree, path, start), path_text(tree, path), message)]


def _override(tree: Map, text: str) -> list[Problem]:
    """Put the value of `key.path=value` into the tree, marked with the argument it came from."""
    mark = Position(f"argument '{text}'")
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
        node[last], node.positions[last] = value, mark
    else:
        return [Problem(mark, path_text(tree, tuple(keys)), "there is no such place in the file")]
    return [Problem(mark, path, problem.message) for problem in problems]


def _step_into(node: Any, key: str | int, mark: Position) -> tuple[Any, str | None]:
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


def _opened(kind: str, mark: Position) -> Map:
    made = Map()
    made.put(kind, Map(), mark, mark)
    return made
