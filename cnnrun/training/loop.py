"""The training loop: steps, epochs, checkpoints and evaluation, until the last step or a signal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
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
from cnnrun.contracts.choices import Choices
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

VAL_IMAGES_TO_DRAW = 6  # images of val that are drawn with their predictions


def fit(job: Job, checkpoint: checkpoints.Checkpoint | None = None) -> dict[str, Any]:
    """Train to the end, from `checkpoint` if there is one; returns the contents of result.json.

    Raises InterruptionError after a signal, NonFiniteError if a loss or weight is not finite.
    """
    check_batch_size(
        job.spec,
        len(job.dataset.splits["train"]),
        job.network,
        job.ranks.world_size,
        job.task.requirements.class_batches,
    )
    with deterministic_kernels(job.device, job.spec.deterministic):
        return _train(job, checkpoint)


def _train(job: Job, checkpoint: checkpoints.Checkpoint | None) -> dict[str, Any]:
    spec, ranks = job.spec, job.ranks
    learner = Learner(job)
    folder = open_checkpoints_folder(job)
    state = TrainingState(accumulate=spec.accumulate)
    if checkpoint:
        state = restore_training(learner, checkpoint, job, folder)
    job = learner.precompute_frozen_features(job)
    examples = job.dataset.splits["train"]
    steps_per_epoch = spec.steps_per_epoch(len(examples))
    batches = job.batches(examples, state.accumulate)
    total_steps = spec.epochs * steps_per_epoch
    losses, clock = LossMonitor(state, batches, job), Clock()

    with (
        closing(MetricsLog(job.run, state.step, state.metrics_offset) if job.run else NoMetricsLog()) as metrics_log,
        closing(batches),
        stop_on_signals() as stop,
        progress_bar("training", total_steps, state.step) as advance,
    ):
        training = Training(
            job, learner, state, batches, losses, clock, metrics_log, steps_per_epoch, stop, folder, state.step
        )
        if state.step > state.evaluated and state.step % steps_per_epoch == 0:
            training.end_epoch()  # the earlier process stopped before it measured this epoch
        while state.step < total_steps and not spec.should_stop_early(state.waited) and not training.should_end:
            factor = spec.schedule.factor(state.step, total_steps)
            learner.criterion.set_progress(state.step / total_steps)
            batch = training.compute_gradients()
            training.update_weights(factor)
            if state.step == 0:
                metrics_log.add_images(0, "train/pictures", batch.images[:64])
            state.step += 1
            clock.images += batch.global_size
            epoch_ends = state.step % steps_per_epoch == 0
            if state.step % TENSORBOARD_EVERY_STEPS == 0 or epoch_ends:
                losses.read_pending(learner)
                metrics_log.add_scalars(
                    state.step, {"train/step_loss": losses.last_loss, "train/lr": spec.optimizer.lr * factor}
                )
            _show_progress(advance, state, losses, clock)
            (signal,) = ranks.all_reduce_max([stop.signal])
            if epoch_ends or signal or spec.should_save(state.step):
                with clock.exclude_time():
                    training.save()
                    if epoch_ends:
                        training.end_epoch()
                    ranks.barrier()
            if signal and state.step < total_steps:
                line = f"stopped at step {state.step} of {total_steps} and saved; continue with --resume"
                raise InterruptionError(signal, line)
    return _write_result(job, state, clock)


@dataclass
class Training:
    """A training in progress: its job and state, and the work of a step and of an epoch's end."""

    job: Job
    learner: Learner
    state: TrainingState
    batches: TrainingBatches
    loss_monitor: LossMonitor
    clock: Clock
    metrics_log: MetricsLog
    steps_per_epoch: int
    stop: StopRequest
    checkpoints_folder: Folder | None  # None on ranks that write nothing
    saved_step: int  # step of the newest checkpoint, 0 if there is none
    should_end: bool = False  # set if `job.should_stop` ended the training early

    def compute_gradients(self) -> Batch:
        """Compute the step's gradients over all ranks; returns the step's batch.

        If memory runs out, the step starts again, and this and all later steps use micro-batches half as large. If
        they cannot be smaller, or the step fails otherwise, a checkpoint is saved before the run ends.
        """
        job, learner, step = self.job, self.learner, self.state.step
        buffers = [value.clone() for value in learner.buffers]
        while True:
            batch = loss = sums = failure = memory_error = None
            try:
                with self.clock.record_wait():
                    batch = self.batches.at(step)
                loss = backward(learner, job, batch, step)
                sums = finiteness_sums(learner, loss) if job.ranks.world_size == 1 else None
            except Exception as error:
                if job.ranks.world_size > 1 and self._may_block_ranks(error):
                    raise
                memory_error = first_line(error) if is_out_of_memory(error) else None
                failure = None if memory_error else error
            failed, out_of_memory = job.ranks.all_reduce_max([failure is not None, memory_error is not None])
            if batch and loss is not None and not failed and not out_of_memory:
                loss = all_reduce_gradients(learner, job, loss)
                # On a CPU a value that is not finite raises an error here, before the weights change.
                self.loss_monitor.add(finiteness_sums(learner, loss) if sums is None else sums, learner)
                return batch
            del batch, loss
            undo_step(learner, buffers, job.device)
            if failed:
                self._save_before_failure()
                raise failure or OtherRankError()
            self._halve_micro_batches(f"at step {step}", memory_error or "memory ran out on another rank")

    def _may_block_ranks(self, error: Exception) -> bool:
        """Return whether other ranks may be waiting inside the network, where they cannot agree on an error."""
        return self.job.spec.sync_batch_norm or not (isinstance(error, UserError) or is_out_of_memory(error))

    def update_weights(self, factor: float) -> None:
        """Update the weights with the current gradients. Raises ResourceError if memory runs out meanwhile."""
        try:
            update_weights(self.learner, self.job, self.state.step, factor)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Some weights may have changed and others not: this state must not be saved.
            line = f"memory ran out in the optimizer's step {self.state.step}: {first_line(error)}"
            raise ResourceError(f"{line}; continue from the last checkpoint with --resume") from None

    def end_epoch(self) -> None:
        """Measure val, log it, add it to the checkpoint of these weights, update `best`, and show it.

        The weights are saved already, so an error here loses no step.
        """
        job, state = self.job, self.state
        measurement = self._measure_val()
        state.evaluated = state.step
        epoch = state.step // self.steps_per_epoch
        metrics = {"train/loss": state.loss_sum / max(1, state.loss_count)}
        metrics |= {f"val/{name}": value for name, value in measurement.metrics.items() if value is not None}
        state.loss_sum, state.loss_count = 0.0, 0
        self.metrics_log.record(state.step, {"epoch": epoch, **metrics})
        value = metrics[job.spec.monitor]
        if not math.isfinite(value):
            raise NonFiniteError(f"{job.spec.monitor} became {value} after epoch {epoch}; the last checkpoint is kept")
        improved = self._record_improvement(value)
        self.should_end = job.should_stop is not None and job.should_stop(epoch, value)
        self._save_evaluation(measurement.choices, improved)
        names = [name for name in dict.fromkeys(["train/loss", "val/loss", job.spec.monitor]) if name in metrics]
        text = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
        clock = self.clock
        say(f"epoch {epoch:3d}/{job.spec.epochs}  {text}{'  best' if improved else ''}  {clock.seconds:.0f} s  {clock}")
        self._add_to_tensorboard(measurement)

    def save(self) -> None:
        """Write a checkpoint. Raises NonFiniteError, and writes nothing, if a weight is not finite.

        Raises StorageError if the run's folder was moved; the checkpoint is still written into the moved folder.
        """
        job, state = self.job, self.state
        self.loss_monitor.read_pending(self.learner)
        parts = self.learner.checkpoint_parts()
        self.loss_monitor.refuse_nonfinite(parts)
        if not self.checkpoints_folder:
            return
        state.metrics_offset = self.metrics_log.sync()
        state_json = {"scaler": self.learner.scaler.state_dict(), **self._state_json(Choices())}
        with self._detect_moved_folder():
            checkpoints.save(self.checkpoints_folder, state.step, parts, state_json)
            checkpoints.prune(self.checkpoints_folder, job.spec.keep)
        self.saved_step = state.step

    def _save_evaluation(self, choices: Choices, improved: bool) -> None:
        """Add the results on val, such as chosen thresholds, to the newest checkpoint; update `best` if it improved."""
        if not self.checkpoints_folder:
            return
        self.state.metrics_offset = self.metrics_log.sync()
        with self._detect_moved_folder():
            checkpoints.add_evaluation(self.checkpoints_folder, self.state.step, self._state_json(choices))
            if improved:
                checkpoints.set_pointer(self.checkpoints_folder, "best", f"step-{self.state.step:08d}")
            checkpoints.prune(self.checkpoints_folder, self.job.spec.keep)

    def _state_json(self, choices: Choices) -> dict[str, Any]:
        return {"training": asdict(self.state), "facts": self.job.facts.to_json(), "choices": choices.to_json()}

    @contextmanager
    def _detect_moved_folder(self) -> Iterator[None]:
        """Raise StorageError, after the writes inside this context, if the run's folder was moved or deleted."""
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
            advice = "where it is now; move it back and continue with --resume"
            raise StorageError(f"{line}; step {self.state.step} is saved in it, {advice}")

    def _save_before_failure(self) -> None:
        """Save a checkpoint before an error ends the run, unless this step is saved already.

        If saving fails too, that is printed, and the first error still ends the run.
        """
        if self.state.step == self.saved_step:
            return
        try:
            self.save()
        except UserError as error:
            for line in error.lines:
                say(line)

    def _measure_val(self) -> Measurement:
        """Measure val, in smaller batches if memory runs out. Raises InterruptionError if a signal arrives."""
        job, state = self.job, self.state
        while True:
            try:
                return self.learner.evaluate(job, "val", max(1, job.spec.batch // state.accumulate), self._check_signal)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error) or job.ranks.world_size > 1:
                    raise
                reason = first_line(error)
            self._halve_micro_batches(f"while evaluating after step {state.step}", reason)

    def _check_signal(self) -> None:
        """Raise InterruptionError after a signal. The weights are saved, and a resumed run measures val again."""
        (signal,) = self.job.ranks.all_reduce_max([self.stop.signal])
        if signal:
            line = f"stopped while measuring val after step {self.state.step}, which is saved; continue with --resume"
            raise InterruptionError(signal, line)

    def _halve_micro_batches(self, when: str, reason: str) -> None:
        """Split batches into twice as many micro-batches; `when` and `reason` say what failed."""
        state = self.state
        try:
            state.accumulate = double_micro_batches(self.job, state.accumulate, reason)
        except ResourceError:
            self._save_before_failure()
            raise
        say(f"memory ran out {when}: continuing with {state.accumulate} micro-batches in each batch of the same size")
        self.batches.set_micro_batches(state.accumulate)

    def _add_to_tensorboard(self, measurement: Measurement) -> None:
        """Add times, drawings and confusion matrices, which are not in metrics.jsonl, to TensorBoard."""
        times = {
            "time/images_per_second": self.clock.images_per_second,
            "time/data_wait_share": self.clock.data_wait_share,
            "time/seconds": self.clock.seconds,
        }
        self.metrics_log.add_scalars(self.state.step, times)
        self.metrics_log.add_drawing(
            self.state.step, "val/found", lambda: self.learner.draw_samples(self.job, "val", VAL_IMAGES_TO_DRAW)
        )
        for name, matrix in measurement.matrices.items():
            self.metrics_log.add_confusion_matrix(self.state.step, f"val/{name}", matrix, self.job.facts.classes)

    def _record_improvement(self, value: float) -> bool:
        """Return whether `value` is the best so far; also counts evaluations without improvement."""
        job, state = self.job, self.state
        sign = 1 if monitorable_metrics(job.task.spec)[job.spec.monitor] == "max" else -1
        margin = job.spec.early_stop.min_delta if job.spec.early_stop else 0.0
        if state.mark is None or (value - state.mark) * sign > margin:
            state.mark, state.waited = value, 0
        else:
            state.waited += 1
        improves = state.best is None or (value - state.best) * sign > 0
        if improves:
            state.best, state.best_step = value, state.step
        return improves


def _show_progress(advance: Advance, state: TrainingState, losses: LossMonitor, clock: Clock) -> None:
    best = "" if state.best is None else f"  best {state.best:.4f}"
    if state.step % 5 == 0:
        advance(5, f"loss {losses.last_loss:.4f}{best}  {clock}")


def _write_result(job: Job, state: TrainingState, clock: Clock) -> dict[str, Any]:
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
