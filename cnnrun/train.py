"""The training loop."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from cnnrun import checkpoint
from cnnrun.batch import Batch
from cnnrun.batches import TrainingBatches
from cnnrun.decoding import Stuck
from cnnrun.device import out_of_memory, peak_memory_mib
from cnnrun.errors import DataError, Elsewhere, Interrupted, NonFiniteError, UserError
from cnnrun.learner import Job, Learner, check, monitored_numbers
from cnnrun.losses import Losses, State
from cnnrun.progress import Advance, Clock, bar, say
from cnnrun.runs import RESULT, write_json
from cnnrun.step import backward, health, shared, smaller, undo, update
from cnnrun.stopping import stopping
from cnnrun.taskspec import Measured
from cnnrun.tracker import Silent, Tracker

SHOW_EVERY = 50  # steps between two points of TensorBoard's training curves

DRAWN = 6  # pictures of val that are shown with what is found in them


def fit(job: Job, saved: checkpoint.Checkpoint | None = None) -> dict[str, Any]:
    """Train to the end, from `saved` where given; returns what result.json says. Raises Interrupted, NonFiniteError."""
    spec, ranks = job.spec, job.ranks
    check(spec, len(job.dataset.splits["train"]), job.network, ranks.size, job.task.together())
    learner = Learner(job)
    state = _restored(learner, saved, job) if saved else State(accumulate=spec.accumulate)
    job = learner.reuse_frozen(job)
    examples = job.dataset.splits["train"]
    per_epoch = spec.steps_per_epoch(len(examples))
    batches = job.batches(examples, state.accumulate)
    total = spec.epochs * per_epoch
    losses, clock = Losses(state, batches, job), Clock()

    with (
        closing(Tracker(job.run, state.step, state.metrics_offset) if ranks.first else Silent()) as tracker,
        closing(batches),
        stopping() as stop,
        bar("training", total, state.step) as advance,
    ):
        chosen = saved.state["facts"].get("chosen", {}) if saved else {}
        training = Training(job, learner, state, batches, losses, clock, tracker, per_epoch, chosen)
        if state.step > state.evaluated and state.step % per_epoch == 0:
            training.save(improved=training.end_epoch())  # stopped between an epoch's last step and its numbers
        while state.step < total and not spec.stops_early(state.waited) and not training.ended:
            factor = spec.schedule.factor(state.step, total)
            learner.criterion.advance(state.step / total)
            batch, loss = training.gradients()
            losses.add(health(learner, loss), learner)  # on a CPU, what is not finite stops here, before the weights
            update(learner, job, state.step, factor)
            if state.step == 0:
                tracker.show_pictures(0, "train/pictures", batch.pictures[:64])
            state.step += 1
            clock.images += batch.whole
            epoch_ends = state.step % per_epoch == 0
            if state.step % SHOW_EVERY == 0 or epoch_ends:
                losses.read(learner)
                tracker.show(state.step, {"train/step_loss": losses.last, "train/lr": spec.optimizer.lr * factor})
            _advance(advance, state, losses, clock)
            (signal,) = ranks.agree([stop.signal])
            if epoch_ends or signal or spec.saves_at(state.step):
                with clock.aside():
                    losses.read(learner)
                    training.save(improved=epoch_ends and training.end_epoch())
                    ranks.wait()
            if signal and state.step < total:
                raise Interrupted(signal, f"stopped at step {state.step} of {total} and saved; --resume goes on")
    return _finish(job, state, clock)


@dataclass
class Training:
    """A training under way: what it works on, where it is, and what `fit` does at a step and at an epoch's end."""

    job: Job
    learner: Learner
    state: State
    batches: TrainingBatches
    losses: Losses
    clock: Clock
    tracker: Tracker
    per_epoch: int
    chosen: dict[str, float] = field(default_factory=dict)  # by the last epoch's val: thresholds and the like
    ended: bool = False  # before its time, by the one who asked for it

    def gradients(self) -> tuple[Batch, Tensor]:
        """The step's gradients, over all ranks; returns its batch and its loss.

        Where memory runs out the step begins again, and all that follow go on, in micro-batches half as large. Where
        the batch cannot be read, what was reached is saved before the run ends.
        """
        job, learner, step = self.job, self.learner, self.state.step
        before = [value.clone() for value in learner.buffers]
        while True:
            batch = loss = unread = None
            try:
                with self.clock.waiting():
                    batch = self.batches.at(step)
                loss = backward(learner, job, batch, step)
            except (DataError, Stuck) as error:
                unread = error
            failed, short = job.ranks.agree([unread is not None, loss is None])
            if batch and loss is not None and not short:
                return batch, shared(learner, job, loss)
            del batch
            undo(learner, before, job.device)
            if failed:
                self.save()
                raise unread or Elsewhere()
            self._halve(f"at step {step}")

    def end_epoch(self) -> bool:
        """Evaluate, write down, say; returns whether the monitored number is the best so far."""
        job, state = self.job, self.state
        measured = self._measured()
        state.evaluated, self.chosen = state.step, measured.chosen
        epoch = state.step // self.per_epoch
        numbers = {"train/loss": state.loss_sum / max(1, state.loss_count)}
        numbers |= {f"val/{name}": value for name, value in measured.numbers.items()}
        state.loss_sum, state.loss_count = 0.0, 0
        self.tracker.record(state.step, {"epoch": epoch, **numbers})
        self._show(measured)
        value = numbers[job.spec.monitor]
        if not math.isfinite(value):
            raise NonFiniteError(f"{job.spec.monitor} became {value} after epoch {epoch}; the last checkpoint stands")
        improved = self._improves(value)
        self.ended = job.enough is not None and job.enough(epoch, value)
        shown = [name for name in dict.fromkeys(["train/loss", "val/loss", job.spec.monitor]) if name in numbers]
        text = "  ".join(f"{name} {numbers[name]:.4f}" for name in shown)
        clock = self.clock
        say(f"epoch {epoch:3d}/{job.spec.epochs}  {text}{'  best' if improved else ''}  {clock.seconds:.0f} s  {clock}")
        return improved

    def save(self, *, improved: bool = False) -> None:
        """A checkpoint of everything. Raises NonFiniteError rather than save weights that are not finite."""
        job, state = self.job, self.state
        self.losses.read(self.learner)
        state.metrics_offset = self.tracker.offset()
        parts = self.learner.parts()
        self.losses.refuse(parts)
        if not job.ranks.first:
            return
        scaler = self.learner.scaler.state_dict()
        chosen = self.chosen if state.evaluated == state.step else {}  # for these weights, not for others
        saved = {"training": asdict(state), "scaler": scaler, "facts": replace(job.facts, chosen=chosen).to_json()}
        folder = job.run / "checkpoints"
        checkpoint.save(folder, state.step, parts, saved)
        if improved:
            checkpoint.point(folder, "best", f"step-{state.step:08d}")
        checkpoint.prune(folder, job.spec.keep)

    def _measured(self) -> Measured:
        """The numbers on val; where that fails, the epoch is saved first. Smaller batches where memory runs out."""
        job, state = self.job, self.state
        while True:
            try:
                return self.learner.evaluate(job, "val", max(1, job.spec.batch // state.accumulate))
            except UserError:
                self.save()
                raise
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or job.ranks.size > 1:
                    self.save()
                    raise
            self._halve(f"while evaluating after step {state.step}")

    def _halve(self, when: str) -> None:
        state = self.state
        state.accumulate = smaller(self.job, state.accumulate)
        say(f"memory ran out {when}: from here on in {state.accumulate} micro-batches, the batch as it is")
        self.batches.cut(state.accumulate)

    def _show(self, measured: Measured) -> None:
        """What goes to TensorBoard alone."""
        times = {
            "time/images_per_second": self.clock.images_per_second,
            "time/data_wait_share": self.clock.data_wait_share,
            "time/seconds": self.clock.seconds,
        }
        self.tracker.show(self.state.step, times)
        if self.job.ranks.first and (drawn := self.learner.shown(self.job, "val", DRAWN)) is not None:
            self.tracker.show_drawing(self.state.step, "val/found", drawn)
        for name, matrix in measured.matrices.items():
            self.tracker.show_matrix(self.state.step, f"val/{name}", matrix, self.job.facts.classes)

    def _improves(self, value: float) -> bool:
        """Whether `value` is the best so far; keeps the count of evaluations without improvement."""
        job, state = self.job, self.state
        way = 1 if monitored_numbers(job.task)[job.spec.monitor] == "max" else -1
        margin = job.spec.early_stop.min_delta if job.spec.early_stop else 0.0
        if state.mark is None or (value - state.mark) * way > margin:
            state.mark, state.waited = value, 0
        else:
            state.waited += 1
        improves = state.best is None or (value - state.best) * way > 0
        if improves:
            state.best, state.best_step = value, state.step
        return improves


def _restored(learner: Learner, saved: checkpoint.Checkpoint, job: Job) -> State:
    """Put everything back as it was saved; mend what a kill between saving and pointing left undone."""
    learner.restore(saved)
    state, folder = State(**saved.state["training"]), job.run / "checkpoints"
    if job.ranks.first:
        checkpoint.settle(folder, saved.path, None if state.best is None else state.best_step)
    return state


def _advance(advance: Advance, state: State, losses: Losses, clock: Clock) -> None:
    best = "" if state.best is None else f"  best {state.best:.4f}"
    if state.step % 5 == 0:
        advance(5, f"loss {losses.last:.4f}{best}  {clock}")


def _finish(job: Job, state: State, clock: Clock) -> dict[str, Any]:
    result = {
        "steps": state.step,
        "best_step": state.best_step,
        "best": {job.spec.monitor: state.best},
        "seconds": round(clock.seconds, 2),
        "images_per_second": round(clock.images_per_second, 1),
        "data_wait_share": round(clock.data_wait_share, 4),
        "peak_memory_mib": peak_memory_mib(job.device),
    }
    if job.ranks.first:
        write_json(job.run / RESULT, result)
    return result
