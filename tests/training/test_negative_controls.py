"""Negative controls of resuming: without any one part of a checkpoint or of what a resume derives, the result differs.

A training can also be resumed from any step: a checkpoint after each of 24 steps, a resume from each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import CheckpointError
from cnnrun.data import training_batches
from cnnrun.experiment import preparation
from cnnrun.experiment.schema import Experiment
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints, ema, loop
from cnnrun.training.learner import Learner
from cnnrun.training.schedules import OneCycle
from cnnrun.training.state import TrainingState
from tests.support.configs import tiny_experiment
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
CUT = 38  # in the third of three epochs of 17 steps, after an epoch that was not the best
RICH = [
    "train.epochs=3",
    "train.ema={decay: 0.9}",
    "train.accumulate=2",
    "data.augment={shift: 0.2, rotate: 8}",
    "train.early_stop={patience: 100, min_delta: 5}",
]
ADAM = "train.optimizer={adamw: 0.01}"
HALF = "train.precision=float16"


def rich_experiment(*overrides: str) -> Experiment:
    return tiny_experiment(*RICH, *overrides)


@pytest.fixture(autouse=True)
def _the_first_epoch_is_the_best(monkeypatch):
    """Make the first epoch the best, the loss scale change often and memory run out once, so that losing them shows."""
    real = Learner.evaluate

    def worse_each_time(self, split, batch, *rest):
        measured = real(self, split, batch, *rest)
        measured.metrics["accuracy"] = 0.9 - 0.1 * (self.setup.run.path / "metrics.jsonl").read_text().count("\n")
        return measured

    monkeypatch.setattr(Learner, "evaluate", worse_each_time)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0, growth_interval=6))
    # Memory runs out at step 5 for batches in two parts.
    backward = Learner.backward

    def short(self, batch, step):
        if step == 5 and len(batch.micro_sizes) == 2:
            raise MemoryError
        return backward(self, batch, step)

    monkeypatch.setattr(Learner, "backward", short)


def cut_short(root: Path, made: Experiment, steps: int) -> Path:
    with stop_at(steps - 1):
        train_run(made, root, CPU, resume=True)
    return root / "tiny" / "1"


@pytest.fixture(scope="module")
def uninterrupted_digest(tmp_path_factory):
    made: dict[tuple[str, ...], str] = {}

    def of(*overrides: str) -> str:
        if overrides not in made:
            root = tmp_path_factory.mktemp("whole")
            made[overrides] = digest(Path(train_run(rich_experiment(*overrides), root, CPU, resume=False)["run"]))
        return made[overrides]

    return of


@pytest.mark.parametrize("overrides", [(), (ADAM,), (HALF,)])
def test_a_run_resumed_with_its_whole_state_equals_the_uninterrupted_one(tmp_path, uninterrupted_digest, overrides):
    expected = uninterrupted_digest(*overrides)
    run = cut_short(tmp_path, rich_experiment(*overrides), CUT)
    train_run(rich_experiment(*overrides), tmp_path, CPU, resume=True)
    assert digest(run) == expected


Saved = checkpoints.Checkpoint
Spoil = Callable[[Learner, Saved], Saved]


def spoil_restore(spoil: Spoil) -> Callable[[pytest.MonkeyPatch], None]:
    """Spoil a checkpoint before it is restored."""

    def apply(patched: pytest.MonkeyPatch) -> None:
        real = loop.restore_training
        patched.setattr(
            loop, "restore_training", lambda learner, saved, *rest: real(learner, spoil(learner, saved), *rest)
        )

    return apply


def reset_tensors(part: str, *endings: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace the tensors by a new run's, or drop them if a new run has none."""

    def spoil(learner: Learner, saved: Saved) -> Saved:
        new = {name: value.clone() for name, value in learner.checkpoint_parts()[part].items()}
        kept = {}
        for name, value in saved.parts[part].items():
            chosen = name.endswith(endings) or name.startswith(endings)
            if not chosen:
                kept[name] = value
            elif name in new:
                kept[name] = new[name]
        return replace(saved, parts=saved.parts | {part: kept})

    return spoil_restore(spoil)


def reset_counter(name: str, value: object = 0) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(learner: Learner, saved: Saved) -> Saved:
        return replace(saved, state=saved.state | {"training": saved.state["training"] | {name: value}})

    return spoil_restore(spoil)


def reset_scaler(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(learner: Learner, saved: Saved) -> Saved:
        new = learner.scaler.state_dict()[name]
        return replace(saved, state=saved.state | {"scaler": saved.state["scaler"] | {name: new}})

    return spoil_restore(spoil)


def classes_reversed(patched: pytest.MonkeyPatch) -> None:
    real = preparation.prepare_dataset

    def other(made):
        data = real(made)
        facts = replace(data.facts, classes=data.facts.classes[::-1], fingerprint="of other classes")
        return replace(data, facts=facts)

    patched.setattr(preparation, "prepare_dataset", other)


def schedule_from_zero(patched: pytest.MonkeyPatch) -> None:
    real = OneCycle.factor
    patched.setattr(OneCycle, "factor", lambda self, step, total: real(self, step - CUT, total))


def order_of_another_epoch(patched: pytest.MonkeyPatch) -> None:
    real = training_batches.uniform_order

    def other(count):
        order = real(count)
        return lambda seed, epoch: order(seed, epoch - 1)

    patched.setattr(training_batches, "uniform_order", other)


def draws_of_another_epoch(patched: pytest.MonkeyPatch) -> None:
    real = training_batches.Draws
    patched.setattr(training_batches, "Draws", lambda seed, epoch, *rest: real(seed, epoch - 1, *rest))


def generator_as_it_is(patched: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    patched.setattr("cnnrun.training.learner.seed_step", lambda *arguments: None)


def average_from_zero(patched: pytest.MonkeyPatch) -> None:
    real = ema.Ema.update
    patched.setattr(ema.Ema, "update", lambda self, step: real(self, step - CUT))


def epoch_from_its_start(patched: pytest.MonkeyPatch) -> None:
    real = training_batches.TrainingBatches.at
    patched.setattr(training_batches.TrainingBatches, "at", lambda self, step: real(self, step - CUT % 17))


def part_of_the_gradients(patched: pytest.MonkeyPatch) -> None:
    """Lose the gradients of the first micro-batch, as after a save between two micro-batches."""
    real = Learner.backward

    def later_ones(self, batch, step):
        loss = real(self, batch, step)
        if step == CUT:
            first = replace(batch.micro_batches()[0], global_size=batch.global_size)
            with torch.enable_grad():
                losses = self.criterion(self.forward(first.images.float()), first.targets)
                (-sum(losses.values()) * (len(first) / batch.global_size)).backward()
        return loss

    patched.setattr(Learner, "backward", later_ones)


CONTROLS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "weights": (reset_tensors("model", "weight", "bias"), ()),
    "batch norm's statistics": (reset_tensors("model", "running_mean", "running_var"), ()),
    "batch norm's counter": (reset_tensors("model", "num_batches_tracked"), ()),
    "momentum": (reset_tensors("optimizer", "momentum_buffer"), ()),
    "adam's first moment": (reset_tensors("optimizer", "exp_avg:"), (ADAM,)),
    "adam's second moment": (reset_tensors("optimizer", "exp_avg_sq"), (ADAM,)),
    "adam's counter": (reset_tensors("optimizer", "step"), (ADAM,)),
    "moving average": (reset_tensors("ema", ""), ()),
    "moving average's counter": (average_from_zero, ()),
    "loss scale": (reset_scaler("scale"), (HALF,)),
    "loss scale's counter": (reset_scaler("_growth_tracker"), (HALF,)),
    "step": (reset_counter("step"), ()),
    "schedule's position": (schedule_from_zero, ()),
    "epoch": (order_of_another_epoch, ()),
    "place in the epoch": (epoch_from_its_start, ()),
    "augmentation's numbers": (draws_of_another_epoch, ()),
    "dropout's generator": (generator_as_it_is, ()),
    "best": (reset_counter("best", None), ()),
    "best step": (reset_counter("best_step"), ()),
    "early stop's counter": (reset_counter("waited"), ()),
    "early stop's mark": (reset_counter("mark", None), ()),
    "sum of losses": (reset_counter("loss_sum", 0.0), ()),
    "count of losses": (reset_counter("loss_count"), ()),
    "metrics' offset": (reset_counter("metrics_offset"), ()),
    "micro-batches": (reset_counter("accumulate", 2), ()),
    "part of the gradients": (part_of_the_gradients, ()),
    "class map": (classes_reversed, ()),
    "evaluated": (reset_counter("evaluated"), ()),
}


def test_every_field_of_the_training_state_has_a_control():
    named = {cell.cell_contents for spoil, _ in CONTROLS.values() for cell in _cells(spoil)}
    assert TrainingState().to_json().keys() <= named
    assert len(CONTROLS) >= 16


def _cells(function):
    for cell in getattr(function, "__closure__", None) or ():
        if callable(cell.cell_contents):
            yield from _cells(cell.cell_contents)
        else:
            yield cell


@pytest.mark.parametrize("dropped", CONTROLS)
def test_a_resume_without_one_part_of_the_state_gives_another_result(tmp_path, uninterrupted_digest, dropped):
    spoil, overrides = CONTROLS[dropped]
    expected = uninterrupted_digest(*overrides)
    run = cut_short(tmp_path, rich_experiment(*overrides), CUT)
    if dropped == "evaluated":  # leave the checkpoint of an epoch's end, which has been evaluated
        shutil.rmtree(run / "checkpoints" / f"step-{CUT:08d}")
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched)
        try:
            train_run(rich_experiment(*overrides), tmp_path, CPU, resume=True)
        except (CheckpointError, KeyError):
            return  # the spoilt state was refused before any step
    assert digest(run) != expected


def test_training_can_be_resumed_from_every_step(tmp_path):
    """24 of 24."""
    made = rich_experiment("train.epochs=2", "train.batch=92", "train.save_every=1", "train.keep=1000")
    run = Path(train_run(made, tmp_path, CPU, resume=False)["run"])
    expected = digest(run)
    found = checkpoints.list_checkpoints(run / "checkpoints")
    assert [int(path.name[5:]) for path in found] == list(range(1, 25))
    for place, path in enumerate(found):
        root = tmp_path / f"from {path.name}"
        there = root / "tiny" / "1"
        shutil.copytree(run, there)
        (there / "result.json").unlink()
        (there / "checkpoints" / "latest").write_text(path.name)
        for later in found[place + 1 :]:
            shutil.rmtree(there / "checkpoints" / later.name)
        train_run(made, root, CPU, resume=True)
        assert digest(there) == expected, path.name
