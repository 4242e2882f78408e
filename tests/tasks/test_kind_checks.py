"""Outside of `cnnrun.tasks`, code asks a task for its parts and never for its kind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cnnrun
from cnnrun.config.spec import union_members
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import TaskSpec
from cnnrun.contracts.task_parts import (
    Calibration,
    CellAssignment,
    Criterion,
    Learning,
    Matching,
    Measuring,
    Predicting,
    Showing,
)
from cnnrun.tasks import TaskUnion

PACKAGE = Path(cnnrun.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if PACKAGE / "tasks" not in path.parents)
ALLOWED: dict[str, list[str]] = {}
TASK_KINDS = {kind.kind for kind in union_members(TaskUnion)}
PARTS = (Learning, Measuring, Predicting, Showing, Calibration, Matching, CellAssignment, Criterion, Prediction)


def subclass_names(base: type) -> set[str]:
    """Names of the subclasses of a class, at any depth."""
    return {name for child in base.__subclasses__() for name in (child.__name__, *subclass_names(child))}


TASK_CLASSES = subclass_names(TaskSpec).union(*(subclass_names(part) for part in PARTS))


def strings(node: ast.expr) -> set[str]:
    """The strings in a literal or in a collection of literals."""
    nodes = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {item.value for item in nodes if isinstance(item, ast.Constant) and isinstance(item.value, str)}


def last_name(node: ast.expr) -> str:
    """The last name of `a.b.c`, or an empty text."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_task(node: ast.expr) -> bool:
    """Return True for `task`, `trained.task`, `task.spec` and parts such as `task.calibration`."""
    return bool(re.search(r"\btask(\.[a-z_]+)?$", ast.unparse(node)))


def comparison_problem(node: ast.Compare) -> str | None:
    operands = [node.left, *node.comparators]
    words = set().union(*map(strings, operands))
    kinds = [operand for operand in operands if isinstance(operand, ast.Attribute) and operand.attr == "kind"]
    if words & TASK_KINDS:
        return "compares with the word of a task"
    if any(is_task(operand.value) for operand in kinds) and len(kinds) < len(operands):
        return "compares the kind of a task"  # two tasks may be compared with each other
    if words & set(TargetKind) and any("kind" in last_name(operand) for operand in operands):
        return "compares with the word of a kind of targets"
    is_membership = any(isinstance(operator, ast.In | ast.NotIn) for operator in node.ops)
    if is_membership and last_name(node.comparators[0]) in ("results", "prediction", "outputs"):
        return "asks which keys a result has"
    return None


def call_problem(node: ast.Call) -> str | None:
    name = last_name(node.func)
    if name in ("isinstance", "issubclass"):
        classes = {last_name(part) for part in ast.walk(node.args[1]) if isinstance(part, ast.expr)}
        if classes & TASK_CLASSES:
            return "asks for the class of a task"
        if is_task(node.args[0]) and classes != {"Map"}:  # a section of the config
            return "asks for the class of a task"
    if name in ("hasattr", "getattr", "type") and is_task(node.args[0]):
        return "asks what a task is made of"
    return None


def match_problem(node: ast.Match) -> str | None:
    patterns = [part for case in node.cases for part in ast.walk(case.pattern)]
    values = set().union(*(strings(part.value) for part in patterns if isinstance(part, ast.MatchValue)))
    classes = {last_name(part.cls) for part in patterns if isinstance(part, ast.MatchClass)}
    return "matches the kind of a task" if values & TASK_KINDS or classes & TASK_CLASSES else None


def kind_checks(source: str) -> Iterator[str]:
    """Yield the problem of each place where the source asks for the kind of a task."""
    for node in ast.walk(ast.parse(source)):
        problem = None
        if isinstance(node, ast.Compare):
            problem = comparison_problem(node)
        elif isinstance(node, ast.Call):
            problem = call_problem(node)
        elif isinstance(node, ast.Match):
            problem = match_problem(node)
        elif isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & subclass_names(TaskSpec):
            problem = "imports a task"
        if problem:
            yield problem


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_outside_of_tasks_asks_for_the_kind_of_a_task(path):
    assert list(kind_checks(path.read_text())) == ALLOWED.get(str(path.relative_to(PACKAGE)), [])


@pytest.mark.parametrize(
    "line",
    [
        'task.kind == "detect"', 'trained.task.kind != "verify"', 'kind in ("classify", "multilabel")',
        "task.kind == kind", 'trained.task.spec.kind in kinds', 'if kind == "regress": pass',
        "isinstance(task, Detect)", "isinstance(trained.task.spec, Classify | Multilabel)",
        "isinstance(part, DetectShowing)",
        "isinstance(task, kind)", "isinstance(prediction, DetectPrediction)", "issubclass(kind, Verify)",
        'task.target_kind == "boxes"', 'target_kind in ("labels", "numbers")', '"boxes" in results',
        '"objects" not in prediction', 'hasattr(task, "cells")', "type(trained.task)", 'getattr(task.spec, "levels")',
        'match task.kind:\n    case "detect": pass', "match task:\n    case Detect(): pass",
        "from cnnrun.tasks.detection.task import Detect",
    ],
)  # fmt: skip
def test_a_planted_check_is_found(line):
    assert len(list(kind_checks(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "if task.calibration is None: pass", "one.task.kind != other.task.kind", "target_kind is TargetKind.BOXES",
        "task.target_kind not in kinds", 'node.kind == "conv"', "isinstance(section, Map)", '"boxes" in targets',
        'say(f"{task.kind} cannot learn")', "if predicting.has_objects: pass", "from cnnrun.tasks import TaskUnion",
    ],
)  # fmt: skip
def test_questions_about_parts_are_allowed(line):
    assert list(kind_checks(line)) == []
