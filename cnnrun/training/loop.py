"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from cnnrun.base.atomic_files import Folder, json_bytes, storage_errors
from cnnrun.base.device import is_out_of_memory, peak_memory_mib
from cnnrun.base.errors import (
    InterruptionError,
    NonFiniteError,
    OtherRankError,
    ResourceError,
    StorageError,
    UserError,
    first_line,
)
from cnnrun.base.progress import Advance, Clock, progress_bar, say
from cnnrun.base.signals import StopRequest, stop_on_signals
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.results import Measurement
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.training import checkpoints
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.learner import Job, Learner
from cnnrun.training.loss_monitor import LossMonitor
from cnnrun.training.metrics_log import MetricsLog, NoMetricsLog
from cnnrun.training.restore import open_checkpoints_folder, restore_training
from cnnrun.training.run_records import RESULT
from cnnrun.training.settings import check_batch_size, monitorable_metrics
from cnnrun.training.state import TrainingState
from cnnrun.training.step import (
    all_reduce_gradients,
    backward,
    double_micro_batches,
    finiteness_sums,
    undo_step,
    update_weights,
)

TENSORBOARD_EVERY_STEPS = 50  # steps between two points of TensorBoard's training curves

VAL_IMAGES_TO_DRAW = 6  # pictures of val that are shown with what is found in them


def fit(job: Job, saved: checkpoints.Checkpoint | None = None) -> dict[str, Any]:
    """Train to the end, from `saved` where given; returns what result.json says. Raises Interrupted, NonFiniteError."""
    check_batch_size(
        job.spec, len(job.dataset.splits["train"]), job.network, job.ranks.world_size, job.task.needs_class_batches()
    )
    with deterministic_kernels(job.device, job.spec.deterministic):
        return _train(job, saved)


def _train(job: Job, saved: checkpoints.Checkpoint | None) -> dict[str, Any]:
    spec, ranks = job.spec, job.ranks
    learner = Learner(job)
    folder = open_checkpoints_folder(job)
    state = restore_training(learner, saved, job, folder) if saved else TrainingState(accumulate=spec.accumulate)
    job = learner.precompute_frozen_features(job)
    examples = job.dataset.splits["train"]
    per_epoch = spec.steps_per_epoch(len(examples))
    batches = job.batches(examples, state.accumulate)
    total = spec.epochs * per_epoch
    losses, clock = LossMonitor(state, batches, job), Clock()

    with (
        closing(MetricsLog(job.run, state.step, state.metrics_offset) if job.run else NoMetricsLog()) as tracker,
        closing(batches),
        stop_on_signals() as stop,
        progress_bar("training", total, state.step) as advance,
    ):
        training = Training(job, learner, state, batches, losses, clock, tracker, per_epoch, stop, folder, state.step)
        if state.step > state.evaluated and state.step % per_epoch == 0:
            training.end_epoch()  # stopped between an epoch's last step and its numbers
        while state.step < total and not spec.should_stop_early(state.waited) and not training.should_end:
            factor = spec.schedule.factor(state.step, total)
            learner.criterion.set_progress(state.step / total)
            batch = training.compute_gradients()
            training.update_weights(factor)
            if state.step == 0:
                tracker.add_images(0, "train/pictures", batch.images[:64])
            state.step += 1
            clock.images += batch.global_size
            epoch_ends = state.step % per_epoch == 0
            if state.step % TENSORBOARD_EVERY_STEPS == 0 or epoch_ends:
                losses.read_pending(learner)
                tracker.add_scalars(
                    state.step, {"train/step_loss": losses.last_loss, "train/lr": spec.optimizer.lr * factor}
                )
            _advance(advance, state, losses, clock)
            (signal,) = ranks.all_reduce_max([stop.signal])
            if epoch_ends or signal or spec.should_save(state.step):
                with clock.exclude_time():
                    training.save()
                    if epoch_ends:
                        training.end_epoch()
                    ranks.barrier()
            if signal and state.step < total:
                raise InterruptionError(signal, f"stopped at step {state.step} of {total} and saved; --resume goes on")
    return _finish(job, state, clock)


@dataclass
class Training:
    """A training under way: what it works on, where it is, and what `fit` does at a step and at an epoch's end."""

    job: Job
    learner: Learner
    state: TrainingState
    batches: TrainingBatches
    loss_monitor: LossMonitor
    clock: Clock
    metrics_log: MetricsLog
    steps_per_epoch: int
    stop: StopRequest
    checkpoints_folder: Folder | None  # of the checkpoints, on the rank that writes
    saved_step: int  # the last one of which there is a checkpoint, 0 where there is none
    should_end: bool = False  # before its time, by the one who asked for it

    def compute_gradients(self) -> Batch:
        """Compute the step's gradients, over all ranks; returns its batch.

        Where memory runs out the step begins again, and all that follow go on, in micro-batches half as large. Where
        that cannot be, or the step fails otherwise, what was reached is saved before the run ends.
        """
        job, learner, step = self.job, self.learner, self.state.step
        before = [value.clone() for value in learner.buffers]
        while True:
            batch = loss = numbers = failure = short = None
            try:
                with self.clock.record_wait():
                    batch = self.batches.at(step)
                loss = backward(learner, job, batch, step)
                numbers = finiteness_sums(learner, loss) if job.ranks.world_size == 1 else None
            except Exception as error:
                if job.ranks.world_size > 1 and self._others_wait(error):
                    raise
                short = first_line(error) if is_out_of_memory(error) else None
                failure = None if short else error
            failed, lacks = job.ranks.all_reduce_max([failure is not None, short is not None])
            if batch and loss is not None and not failed and not lacks:
                loss = all_reduce_gradients(learner, job, loss)
                # On a CPU, what is not finite stops here, before the weights change.
                self.loss_monitor.add(finiteness_sums(learner, loss) if numbers is None else numbers, learner)
                return batch
            del batch, loss
            undo_step(learner, before, job.device)
            if failed:
                self._save_reached()
                raise failure or OtherRankError()
            self._halve(f"at step {step}", short or "memory ran out on another rank")

    def _others_wait(self, error: Exception) -> bool:
        """Return whether the other ranks are in the middle of the network, where nothing can be agreed on."""
        return self.job.spec.sync_batch_norm or not (isinstance(error, UserError) or is_out_of_memory(error))

    def update_weights(self, factor: float) -> None:
        """Let the optimizer step with the gradients at hand. Raises ResourceError where memory runs out in it."""
        try:
            update_weights(self.learner, self.job, self.state.step, factor)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Some weights may have changed and some not: this is no state to save.
            line = f"memory ran out in the optimizer's step {self.state.step}: {first_line(error)}"
            raise ResourceError(f"{line}; the last checkpoint stands, --resume goes on from it") from None

    def end_epoch(self) -> None:
        """Measure val, write it down, keep it beside the checkpoint of these weights, point `best`, then show it.

        The weights are saved already: whatever ends the run in here costs no step.
        """
        job, state = self.job, self.state
        measured = self._measured()
        state.evaluated = state.step
        epoch = state.step // self.steps_per_epoch
        numbers = {"train/loss": state.loss_sum / max(1, state.loss_count)}
        numbers |= {f"val/{name}": value for name, value in measured.metrics.items() if value is not None}
        state.loss_sum, state.loss_count = 0.0, 0
        self.metrics_log.record(state.step, {"epoch": epoch, **numbers})
        value = numbers[job.spec.monitor]
        if not math.isfinite(value):
            raise NonFiniteError(f"{job.spec.monitor} became {value} after epoch {epoch}; the last checkpoint stands")
        improved = self._improves(value)
        self.should_end = job.should_stop is not None and job.should_stop(epoch, value)
        self._keep_evaluation(measured.choices, improved)
        shown = [name for name in dict.fromkeys(["train/loss", "val/loss", job.spec.monitor]) if name in numbers]
        text = "  ".join(f"{name} {numbers[name]:.4f}" for name in shown)
        clock = self.clock
        say(f"epoch {epoch:3d}/{job.spec.epochs}  {text}{'  best' if improved else ''}  {clock.seconds:.0f} s  {clock}")
        self._show(measured)

    def save(self) -> None:
        """Write a checkpoint of everything. Raises NonFiniteError rather than save weights that are not finite.

        Raises StorageError where the run is no longer where it was, once what was reached is saved in it.
        """
        job, state = self.job, self.state
        self.loss_monitor.read_pending(self.learner)
        parts = self.learner.checkpoint_parts()
        self.loss_monitor.refuse_nonfinite(parts)
        if not self.checkpoints_folder:
            return
        state.metrics_offset = self.metrics_log.sync()
        saved = {"scaler": self.learner.scaler.state_dict(), **self._saved({})}
        with self._in_place():
            checkpoints.save(self.checkpoints_folder, state.step, parts, saved)
            checkpoints.prune(self.checkpoints_folder, job.spec.keep)
        self.saved_step = state.step

    def _keep_evaluation(self, chosen: dict[str, float], improved: bool) -> None:
        """Keep what val said of the weights last saved: thresholds and the like, and whether they are the best."""
        if not self.checkpoints_folder:
            return
        self.state.metrics_offset = self.metrics_log.sync()
        with self._in_place():
            checkpoints.add_evaluation(self.checkpoints_folder, self.state.step, self._saved(chosen))
            if improved:
                checkpoints.set_pointer(self.checkpoints_folder, "best", f"step-{self.state.step:08d}")
            checkpoints.prune(self.checkpoints_folder, self.job.spec.keep)

    def _saved(self, chosen: dict[str, float]) -> dict[str, Any]:
        return {"training": asdict(self.state), "facts": replace(self.job.facts, chosen=chosen).to_json()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Raise StorageError where the run's folder was moved or deleted, after what is inside was written to it."""
        assert self.job.run
        assert self.checkpoints_folder
        folders = (self.job.run, self.checkpoints_folder)
        moved = not all(folder.is_in_place() for folder in folders)
        line = f"{self.job.run.path}: the folder was moved or deleted while the run was training"
        try:
            yield
        except StorageError:
            if moved:
                raise StorageError(f"{line}; nothing more can be saved") from None
            raise
        if moved:
            where = "where it is now; put it back, and --resume goes on"
            raise StorageError(f"{line}; step {self.state.step} is saved in it, {where}")

    def _save_reached(self) -> None:
        """A checkpoint of the steps so far, before the run ends early, unless they are saved already.

        Where that fails too it is said, and what ends the run is what failed first.
        """
        if self.state.step == self.saved_step:
            return
        try:
            self.save()
        except UserError as error:
            for line in error.lines:
                say(line)

    def _measured(self) -> Measurement:
        """The numbers on val, in smaller batches where memory runs out. Raises Interrupted within a batch."""
        job, state = self.job, self.state
        while True:
            try:
                return self.learner.evaluate(job, "val", max(1, job.spec.batch // state.accumulate), self._heed_signals)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error) or job.ranks.world_size > 1:
                    raise
                reason = first_line(error)
            self._halve(f"while evaluating after step {state.step}", reason)

    def _heed_signals(self) -> None:
        """Leave a validation that was asked to stop: the weights are saved, and a resumed run begins it anew."""
        (signal,) = self.job.ranks.all_reduce_max([self.stop.signal])
        if signal:
            line = f"stopped while val was measured after step {self.state.step}, which is saved; --resume goes on"
            raise InterruptionError(signal, line)

    def _halve(self, when: str, reason: str) -> None:
        state = self.state
        try:
            state.accumulate = double_micro_batches(self.job, state.accumulate, reason)
        except ResourceError:
            self._save_reached()
            raise
        say(f"memory ran out {when}: from here on in {state.accumulate} micro-batches, the batch as it is")
        self.batches.set_micro_batches(state.accumulate)

    def _show(self, measured: Measurement) -> None:
        """What goes to TensorBoard alone."""
        times = {
            "time/images_per_second": self.clock.images_per_second,
            "time/data_wait_share": self.clock.data_wait_share,
            "time/seconds": self.clock.seconds,
        }
        self.metrics_log.add_scalars(self.state.step, times)
        self.metrics_log.add_drawing(
            self.state.step, "val/found", lambda: self.learner.draw_samples(self.job, "val", VAL_IMAGES_TO_DRAW)
        )
        for name, matrix in measured.matrices.items():
            self.metrics_log.add_confusion_matrix(self.state.step, f"val/{name}", matrix, self.job.facts.classes)

    def _improves(self, value: float) -> bool:
        """Whether `value` is the best so far; keeps the count of evaluations without improvement."""
        job, state = self.job, self.state
        way = 1 if monitorable_metrics(job.task)[job.spec.monitor] == "max" else -1
        margin = job.spec.early_stop.min_delta if job.spec.early_stop else 0.0
        if state.mark is None or (value - state.mark) * way > margin:
            state.mark, state.waited = value, 0
        else:
            state.waited += 1
        improves = state.best is None or (value - state.best) * way > 0
        if improves:
            state.best, state.best_step = value, state.step
        return improves


def _advance(advance: Advance, state: TrainingState, losses: LossMonitor, clock: Clock) -> None:
    best = "" if state.best is None else f"  best {state.best:.4f}"
    if state.step % 5 == 0:
        advance(5, f"loss {losses.last_loss:.4f}{best}  {clock}")


def _finish(job: Job, state: TrainingState, clock: Clock) -> dict[str, Any]:
    result = {
        "steps": state.step,
        "best_step": state.best_step,
        "best": {job.spec.monitor: state.best},
        "seconds": round(clock.seconds, 2),
        "images_per_second": round(clock.images_per_second, 1),
        "data_wait_share": round(clock.data_wait_share, 4),
        "peak_memory_mib": peak_memory_mib(job.device),
    }
    if job.run:
        with storage_errors(job.run.path / RESULT, 1024):
            job.run.replace(RESULT, json_bytes(result))
    return result
