"""The training loop: steps, epochs, checkpoints and evaluation, until the last step or a signal."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.atomic_files import json_bytes, storage_errors
from cnnrun.base.device import is_out_of_memory, peak_memory_mib
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import InterruptionError, NonFiniteError, OtherRankError, ResourceError, UserError, first_line
from cnnrun.base.progress import Advance, Clock, progress_bar, say
from cnnrun.base.signals import StopRequest, stop_on_signals
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.results import Measurement
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.training import checkpoints
from cnnrun.training.checkpoint_writer import CheckpointWriter
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.hooks import NO_HOOKS, TrainingHooks
from cnnrun.training.learner import Learner
from cnnrun.training.loss_monitor import LossMonitor
from cnnrun.training.metrics_log import MetricsLog, NoMetricsLog
from cnnrun.training.pace import Pace
from cnnrun.training.restore import restore_training
from cnnrun.training.run_records import RESULT
from cnnrun.training.settings import monitorable_metrics
from cnnrun.training.setup import TrainingSetup
from cnnrun.training.state import TrainingState

TENSORBOARD_EVERY_STEPS = 50  # steps between two points of TensorBoard's training curves
VAL_IMAGES_TO_DRAW = 6  # images of val that are drawn with their predictions
_PROGRESS_EVERY_STEPS = 5


def fit(
    setup: TrainingSetup, checkpoint: checkpoints.Checkpoint | None = None, hooks: TrainingHooks = NO_HOOKS
) -> dict[str, Any]:
    """Train to the end, from `checkpoint` if there is one; returns the contents of result.json.

    Raises InterruptionError after a signal, NonFiniteError if a loss or weight is not finite.
    """
    setup.check_batch_size()
    with deterministic_kernels(setup.device, setup.spec.deterministic):
        learner = Learner(setup)
        writer = CheckpointWriter(setup.run, setup.spec.keep) if setup.run else None
        state = TrainingState(accumulate=setup.spec.accumulate)
        if checkpoint:
            state = restore_training(learner, checkpoint)
            if writer:
                writer.repair(checkpoint, None if state.best is None else state.best_step)
        learner.precompute_frozen_features()
        with (
            closing(_open_metrics_log(setup, state)) as log,
            closing(learner.setup.batches(state.accumulate)) as batches,
            stop_on_signals() as stop,
            progress_bar("training", setup.spec.epochs * setup.steps_per_epoch, state.step) as advance,
        ):
            loop = TrainingLoop(learner, batches, state, log, hooks)
            loop.run(writer, stop, advance)
        return loop.write_result()


def _open_metrics_log(setup: TrainingSetup, state: TrainingState) -> MetricsLog:
    return MetricsLog(setup.run, state.step, state.metrics_offset) if setup.run else NoMetricsLog()


class TrainingLoop:
    """A training in progress: steps, and the work at the end of each epoch."""

    def __init__(
        self, learner: Learner, batches: TrainingBatches, state: TrainingState, log: MetricsLog, hooks: TrainingHooks
    ) -> None:
        self.learner, self.batches, self.state, self.metrics_log, self._hooks = learner, batches, state, log, hooks
        self.loss_monitor, self.clock = LossMonitor(learner, state, batches), Clock(hooks.now)
        self.pace = Pace(self.clock)
        self.writer: CheckpointWriter | None = None  # None on ranks that write nothing
        self.stop = StopRequest()
        self._saved_step = state.step  # step of the newest checkpoint, 0 if there is none
        self._shown_step = state.step  # the last step that the progress bar has shown
        self._decay_start = self.setup.spec.schedule.decay_start(self.total_steps)
        self._should_end = False  # set if `hooks.should_stop` ended the training early

    @property
    def setup(self) -> TrainingSetup:
        """The inputs; after `Learner.precompute_frozen_features` their images may be features."""
        return self.learner.setup

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole training."""
        return self.setup.spec.epochs * self.setup.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """True if the last step is done, or the training was ended early."""
        stops_early = self.setup.spec.should_stop_early(self.state.evaluations_without_improvement)
        return self.state.step >= self.total_steps or stops_early or self._should_end

    def run(self, writer: CheckpointWriter | None, stop: StopRequest, advance: Advance) -> None:
        """Train to the end. Raises InterruptionError after a signal, once everything is saved."""
        self.writer, self.stop = writer, stop
        state, per_epoch = self.state, self.setup.steps_per_epoch
        if state.step > state.evaluated_step and state.step % per_epoch == 0:
            self.end_epoch()  # the earlier process stopped before it measured this epoch
        while not self.is_finished:
            if self.writer and state.step == self._decay_start:
                self.writer.keep_for_extension(state.step, state.best_step)
            with self.pace.time_step():
                self.run_step()
            epoch_ends = state.step % per_epoch == 0
            self._log_step(epoch_ends)
            self._show_progress(advance, epoch_ends)
            (signal,) = self.setup.ranks.all_reduce_max([self.stop.signal])
            if epoch_ends or signal or self.setup.spec.should_save(state.step) or state.step == self._decay_start:
                with self.clock.exclude_time():
                    self.save()
                    if epoch_ends:
                        self.end_epoch()
                    self.setup.ranks.barrier()
            if signal and state.step < self.total_steps:
                line = f"stopped at step {state.step:,} of {self.total_steps:,} and saved; continue with --resume"
                raise InterruptionError(signal, line)

    def run_step(self) -> None:
        """Do one optimizer step."""
        state = self.state
        self.learner.criterion.set_progress(state.step / self.total_steps)
        self.learner.freeze_for_step(state.step)
        batch = self.compute_gradients()
        self.update_weights()
        if state.step == 0:
            self.metrics_log.add_images(0, "train/images", batch.images[:64])
        state.step += 1
        self.clock.images += batch.global_size

    def compute_gradients(self) -> Batch:
        """Compute the step's gradients over all ranks; returns the step's batch.

        If memory runs out, the step starts again, and this and all later steps use micro-batches half as large. If
        they cannot be smaller, or the step fails otherwise, a checkpoint is saved before the run ends.
        """
        learner, ranks, step = self.learner, self.setup.ranks, self.state.step
        buffers = [value.clone() for value in learner.buffers]
        while True:
            batch = loss = probes = failure = memory_error = None
            try:
                with self.clock.record_wait():
                    batch = self.batches.at(step)
                loss = learner.backward(batch, step)
                probes = learner.finiteness_probes(loss) if ranks.world_size == 1 else None
            except Exception as error:
                if ranks.world_size > 1 and self._may_block_ranks(error):
                    raise
                memory_error = first_line(error) if is_out_of_memory(error) else None
                failure = None if memory_error else error
            failed, out_of_memory = ranks.all_reduce_max([failure is not None, memory_error is not None])
            if batch and loss is not None and not failed and not out_of_memory:
                loss = learner.all_reduce_gradients(loss)
                # On a CPU a value that is not finite raises an error here, before the weights change.
                self.loss_monitor.add(learner.finiteness_probes(loss) if probes is None else probes)
                return batch
            del batch, loss
            learner.undo_step(buffers)
            if failed:
                self._save_before_failure()
                raise failure or OtherRankError()
            self._halve_micro_batches(f"at step {step:,}", memory_error or "memory ran out on another rank")

    def _may_block_ranks(self, error: Exception) -> bool:
        """Return whether other ranks may be waiting inside the network, where they cannot agree on an error."""
        return self.setup.spec.sync_batch_norm or not (isinstance(error, UserError) or is_out_of_memory(error))

    def update_weights(self) -> None:
        """Update the weights with the current gradients. Raises ResourceError if memory runs out meanwhile."""
        try:
            self.learner.update_weights(self.state.step, self._schedule_factor(self.state.step))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Some weights may have changed and others not: this state must not be saved.
            line = f"memory ran out in the optimizer's step {self.state.step:,}: {first_line(error)}"
            raise ResourceError(f"{line}; continue from the last checkpoint with --resume") from None

    def _schedule_factor(self, step: int) -> float:
        return self.setup.spec.schedule.factor(step, self.total_steps)

    def end_epoch(self) -> None:
        """Measure val, log it, add it to the checkpoint of these weights, update `best`, and show it.

        The weights are saved already, so an error here loses no step.
        """
        spec, state = self.setup.spec, self.state
        measurement = self._measure_val()
        state.evaluated_step = state.step
        epoch = state.step // self.setup.steps_per_epoch
        metrics = {"train/loss": self.loss_monitor.end_epoch()}
        metrics |= {f"val/{name}": value for name, value in measurement.metrics.items() if value is not None}
        self.metrics_log.record(state.step, {"epoch": epoch, **metrics})
        value = metrics[spec.monitor]
        if not math.isfinite(value):
            raise NonFiniteError(f"{spec.monitor} became {value} after epoch {epoch}; the last checkpoint is kept")
        improved = self._record_improvement(value)
        self._should_end = self._hooks.should_stop is not None and self._hooks.should_stop(epoch, value)
        self._save_evaluation(measurement.choices, improved)
        names = [name for name in dict.fromkeys(["train/loss", "val/loss", spec.monitor]) if name in metrics]
        text = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
        time = f"{format_duration(self.clock.seconds)}  {self.clock}"
        say(f"epoch {epoch:3d}/{spec.epochs}  {text}{'  best' if improved else ''}  {time}")
        self._add_to_tensorboard(measurement)

    def save(self) -> None:
        """Write a checkpoint. Raises NonFiniteError, and writes nothing, if a weight is not finite."""
        self.loss_monitor.read_pending()
        parts = self.learner.checkpoint_parts()
        self.loss_monitor.refuse_nonfinite(parts)
        if not self.writer:
            return
        self.state.metrics_offset = self.metrics_log.sync()
        state_json = {"scaler": self.learner.scaler.state_dict(), **self._state_json(Choices())}
        self.writer.save(self.state.step, parts, state_json)
        self._saved_step = self.state.step

    def _save_evaluation(self, choices: Choices, improved: bool) -> None:
        """Add what was measured on val to the newest checkpoint, and point `best` at it if it improved."""
        if self.writer:
            self.state.metrics_offset = self.metrics_log.sync()
            self.writer.add_evaluation(self.state.step, self._state_json(choices), improved)

    def _state_json(self, choices: Choices) -> dict[str, Any]:
        return {"training": self.state.to_json(), "facts": self.setup.facts.to_json(), "choices": choices.to_json()}

    def _save_before_failure(self) -> None:
        """Save a checkpoint before an error ends the run, unless this step is saved already.

        If saving fails too, that is printed, and the first error still ends the run.
        """
        if self.state.step == self._saved_step:
            return
        try:
            self.save()
        except UserError as error:
            for line in error.lines:
                say(line)

    def _measure_val(self) -> Measurement:
        """Measure val, in smaller batches if memory runs out. Raises InterruptionError if a signal arrives."""
        setup, state = self.setup, self.state
        while True:
            try:
                return self.learner.evaluate("val", max(1, setup.spec.batch // state.accumulate), self._check_signal)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error) or setup.ranks.world_size > 1:
                    raise
                reason = first_line(error)
            self._halve_micro_batches(f"while evaluating after step {state.step:,}", reason)

    def _check_signal(self) -> None:
        """Raise InterruptionError after a signal. The weights are saved, and a resumed run measures val again."""
        (signal,) = self.setup.ranks.all_reduce_max([self.stop.signal])
        if signal:
            line = f"stopped while measuring val after step {self.state.step:,}, which is saved; continue with --resume"
            raise InterruptionError(signal, line)

    def _halve_micro_batches(self, when: str, reason: str) -> None:
        """Halve the micro-batches, for the rest of the training; `when` and `reason` say what failed."""
        try:
            self.state.accumulate = self.setup.double_micro_batches(self.state.accumulate, reason)
        except ResourceError:
            self._save_before_failure()
            raise
        line = f"memory ran out {when}: continuing with {self.state.accumulate} micro-batches per batch"
        say(f"{line}; the batch size is unchanged")
        self.batches.set_micro_batches(self.state.accumulate)

    def _log_step(self, epoch_ends: bool) -> None:
        """Add the step's loss and learning rate to TensorBoard, now and then and at the end of an epoch."""
        step, spec = self.state.step, self.setup.spec
        if step % TENSORBOARD_EVERY_STEPS == 0 or epoch_ends:
            self.loss_monitor.read_pending()
            rate = spec.optimizer.lr * self._schedule_factor(step - 1)
            self.metrics_log.add_scalars(step, {"train/step_loss": self.loss_monitor.last_loss, "train/lr": rate})

    def _show_progress(self, advance: Advance, epoch_ends: bool) -> None:
        state = self.state
        if state.step % _PROGRESS_EVERY_STEPS == 0 or epoch_ends:
            best = "" if state.best is None else f"  best {state.best:.4f}"
            advance(state.step - self._shown_step, f"loss {self.loss_monitor.last_loss:.4f}{best}  {self.clock}")
            self._shown_step = state.step

    def _add_to_tensorboard(self, measurement: Measurement) -> None:
        """Add times, drawings and confusion matrices, which are not in metrics.jsonl, to TensorBoard."""
        times = {
            "time/images_per_second": self.clock.images_per_second,
            "time/data_wait_share": self.clock.data_wait_share,
            "time/seconds": self.clock.seconds,
        }
        self.metrics_log.add_scalars(self.state.step, times)
        self.metrics_log.add_drawing(self.state.step, "val/predictions", self._draw_val)
        for name, matrix in measurement.matrices.items():
            self.metrics_log.add_confusion_matrix(self.state.step, f"val/{name}", matrix, self.setup.facts.classes)

    def _draw_val(self) -> NDArray[np.uint8] | None:
        """Draw the first images of val with their targets and predictions, if the task has something to draw."""
        if self._hooks.draw is None or not self.setup.task.showing.has_overlays:
            return None
        if (predicted := self.learner.predict_samples("val", VAL_IMAGES_TO_DRAW)) is None:
            return None
        batch, results = predicted
        val = self.setup.dataset.splits["val"]
        names = [Path(val.sample_name(index)).name for index in range(len(batch))]
        return self._hooks.draw(self.setup.task, batch, results, names)

    def _record_improvement(self, value: float) -> bool:
        """Return whether `value` is the best so far; also counts evaluations without improvement."""
        spec, state = self.setup.spec, self.state
        sign = 1 if monitorable_metrics(self.setup.task.spec)[spec.monitor] == "max" else -1
        margin = spec.early_stop.min_delta if spec.early_stop else 0.0
        if state.patience_reference is None or (value - state.patience_reference) * sign > margin:
            state.patience_reference, state.evaluations_without_improvement = value, 0
        else:
            state.evaluations_without_improvement += 1
        improves = state.best is None or (value - state.best) * sign > 0
        if improves:
            state.best, state.best_step = value, state.step
        return improves

    def write_result(self) -> dict[str, Any]:
        """Write result.json and return its contents."""
        state, clock, run = self.state, self.clock, self.setup.run
        result = {
            "steps": state.step,
            "best_step": state.best_step,
            "best": {self.setup.spec.monitor: state.best},
            "seconds": round(clock.seconds, 2),
            "images_per_second": round(clock.images_per_second, 1),
            "data_wait_share": round(clock.data_wait_share, 4),
            "peak_memory_mib": peak_memory_mib(self.setup.device),
        }
        if run:
            with storage_errors(run.path / RESULT, 1024):
                run.replace(RESULT, json_bytes(result))
        return result
