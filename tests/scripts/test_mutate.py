"""Every fault of `scripts/mutate` can be planted in one place, compiles, and names tests that exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache

import pytest

from tests.support.mutations import MUTATIONS, ROOT, changed_source

# fmt: off
CORE = {
    "training.setup", "training.loss_monitor", "training.nonfinite", "training.learner", "training.schedules",
    "training.optimizers", "training.ema",
    "data.training_batches", "base.randomness", "data.augment.settings", "data.augment.geometry",
    "data.augment.colour", "data.augment.random_slots", "data.augment.mixing", "base.boxes",
    "tasks.detection.average_precision", "tasks.classification_metrics", "tasks.detection.assignment",
    "tasks.detection.head", "tasks.embedding.losses", "tasks.embedding.pair_metrics", "training.checkpoints",
    "experiment.resume", "model.builder", "config.blocks", "model.structures", "export.parity", "export.writer",
    "tasks.temperature",
    "tasks.intervals", "data.hold_out", "data.epoch_order", "data.prepare", "data.duplicates", "training.evaluation",
    "data.box_placement", "model.receptive_field", "tasks.classification", "tasks.multilabel", "tasks.regression.task",
    "tasks.detection.task", "tasks.embedding.task",
}
# fmt: on


@cache
def function_names(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_core_module_has_mutations():
    assert len(MUTATIONS) >= 80
    assert len({each.name for each in MUTATIONS}) == len(MUTATIONS)
    assert {each.module.removeprefix("cnnrun.") for each in MUTATIONS} >= CORE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_a_mutation_fits_one_place_and_has_tests(mutation):
    assert mutation.problem() is None
    assert mutation.old != mutation.new
    compile(changed_source(mutation), mutation.module, "exec")
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert not name or name.partition("[")[0] in function_names(file), test


@pytest.mark.slow
def test_a_planted_fault_is_noticed_and_removed_again():
    before = {path: path.read_bytes() for path in (ROOT / "cnnrun").rglob("*.py")}
    command = [sys.executable, str(ROOT / "scripts" / "mutate"), "--only", "a milestone counts a step late"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 noticed (100.0%)" in done.stdout
    assert {path: path.read_bytes() for path in (ROOT / "cnnrun").rglob("*.py")} == before
