"""Read a config with its overrides, and report every mistake in it with its position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from cnnrun.base.errors import ConfigError, escape
from cnnrun.base.progress import say
from cnnrun.config import blocks, yaml_reader, zoo
from cnnrun.config.messages import did_you_mean, validation_problems
from cnnrun.config.spec import Kinds, union_members
from cnnrun.config.tree import Map, Position, Problem, Seq, find_position, path_text
from cnnrun.experiment.cross_checks import find_mistakes
from cnnrun.experiment.schema import Experiment
from cnnrun.model.structures import Node
from cnnrun.tasks import TaskUnion
from cnnrun.training.settings import Train, monitorable_metrics


def read_config(path: Path, overrides: Sequence[str] = (), warn: bool = True) -> Experiment:
    """Read and check the config at `path`. Raises ConfigError that lists every mistake in the order of the file.

    A line is logged for each key under an old name, unless `warn` is false.
    """
    tree, problems = yaml_reader.read_yaml(path)
    if not tree.get("name"):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
        tree.put("name", name, Position(str(path), 1, 1), Position(str(path), 1, 1))
    return _check_tree(tree, problems, Position(str(path), 1, 1), overrides, warn)


def parse_config(text: str, where: str, overrides: Sequence[str] = ()) -> Experiment:
    """Parse and check the config in `text`; `where` names it in messages. Raises ConfigError."""
    tree, problems = yaml_reader.parse_yaml(text, where)
    return _check_tree(tree, problems, Position(where, 1, 1), overrides)


def _check_tree(
    tree: Map, problems: list[Problem], start: Position, overrides: Sequence[str], warn: bool = True
) -> Experiment:
    for override in overrides:
        zoo.expand_shorthand(tree)
        problems += _apply_override(tree, override)
    layers = [kind.kind for kind in union_members(Node)]
    problems += zoo.expand_model(tree, layers) + blocks.expand_blocks(tree, layers)
    warnings: list[str] = []
    experiment, validation_errors = _validate(tree, start, warnings)
    problems += validation_errors + _find_monitor_mistakes(tree, start)
    if experiment and not any(problem.path.startswith(("model", "blocks", "data.image")) for problem in problems):
        problems += find_mistakes(experiment, tree, start)
    if problems or experiment is None:
        # A mistake in a block is found at each use of the block; report it once.
        unique = {(problem.position, problem.message): problem for problem in reversed(problems)}.values()
        ordered = sorted(unique, key=lambda problem: (problem.position.line, problem.position.column))
        raise ConfigError(*(escape(str(problem)) for problem in ordered))
    for warning in warnings if warn else ():
        say(escape(warning))
    return experiment


def _validate(tree: Map, start: Position, warnings: list[str]) -> tuple[Experiment | None, list[Problem]]:
    """Return the validated experiment without its invalid optional sections, or None, and the mistakes.

    Appends to `warnings` a line for each old name.
    """
    try:
        return Experiment.model_validate(tree, context={"warnings": warnings}), []
    except ValidationError as error:
        problems = validation_problems(error, tree, (), start)
        bad_sections = {str(item["loc"][0]) for item in error.errors(include_url=False) if item["loc"]}
    if bad_sections & {"task", "data", "model"}:
        return None, problems
    valid = {key: value for key, value in tree.items() if key not in bad_sections}
    return Experiment.model_validate(valid), problems


_TASK: TypeAdapter[Any] = TypeAdapter(Annotated[TaskUnion, Kinds()])


def _find_monitor_mistakes(tree: Map, start: Position) -> list[Problem]:
    """Check that the task measures the metric in `train.monitor`, whatever else is wrong with the config."""
    try:
        metrics = monitorable_metrics(_TASK.validate_python(tree.get("task")))
        monitor = Train.model_validate(tree.get("train", {})).monitor
    except ValidationError:
        return []  # already reported
    if monitor in metrics:
        return []
    path = ("train", "monitor")
    message = f"{monitor!r} is not measured{did_you_mean(monitor, metrics)}"
    return [Problem(find_position(tree, path, start), path_text(tree, path), message)]


def _apply_override(tree: Map, text: str) -> list[Problem]:
    """Set the value of `key.path=value` in the tree; its position in messages is the argument."""
    position = Position(f"argument '{text}'")
    path, equals, value_text = text.partition("=")
    keys: list[str | int] = [
        int(key) if re.fullmatch("[0-9]{1,9}", key) else key for key in re.findall(r"[^.\[\]]+", path)
    ]
    if not equals or not keys:
        return [Problem(position, "", "write an override as key.path=value, such as train.epochs=3")]
    value, _, problems = yaml_reader.parse_value(value_text, "", position)
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node, message = _step_into(node, key, position)
        if message:
            return [Problem(position, path_text(tree, tuple(keys[: depth + 1])), message)]
    last = keys[-1]
    if isinstance(node, Map) and isinstance(last, str):
        node.put(last, value, position, position)
    elif isinstance(node, Seq) and isinstance(last, int) and last < len(node):
        node[last], node.positions[last] = value, position
    else:
        return [Problem(position, path_text(tree, tuple(keys)), "no such setting")]
    return [Problem(position, path, problem.message) for problem in problems]


def _step_into(node: Any, key: str | int, position: Position) -> tuple[Any, str | None]:
    """Return the child of `node` at `key`, or a message. A missing child is added; a bare kind becomes a mapping."""
    if isinstance(node, Seq) and isinstance(key, int) and key < len(node):
        if isinstance(node[key], str):
            node[key] = _expand_kind(node[key], position)
        return node[key], None
    if isinstance(node, Map) and isinstance(key, str):
        child = node.get(key)
        if child is None:
            node.put(key, Map(), position, position)
        elif isinstance(child, str):
            node[key] = _expand_kind(child, position)
        return node[key], None
    return None, "no such setting"


def _expand_kind(kind: str, position: Position) -> Map:
    node = Map()
    node.put(kind, Map(), position, position)
    return node
