"""Losses of the steps, read without making the device wait, and the diagnosis of values that are not finite."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import NonFiniteError, escape
from cnnrun.base.progress import say
from cnnrun.data.epoch_order import Uniform
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.training.checkpoints import CheckpointParts
from cnnrun.training.learner import Learner
from cnnrun.training.nonfinite import finite_image_mask, first_nonfinite
from cnnrun.training.state import TrainingState

# Steps that are queued before the values of an earlier one are read, so that a GPU never waits for the next step.
_LAG = {"cpu": 0, "cuda": 1}
_EPOCHS_ABOVE = 3  # epochs in a row with a loss above that of guessing, after which the user is told
_FALLEN = 0.98  # of the last epoch's loss: below this it has fallen
_ADVICE = "a lower train.optimizer.*.lr, a longer schedule warmup or train.clip: 1.0 usually helps"
_VALUE_NAMES = ("the loss", "a gradient", "a weight or statistic")
# The diagnosis if the step changed the weights before its values were read.
_UNKNOWN = (
    "unknown, because the GPU had already updated the weights; continue with --resume --device cpu to find the layer"
)


class LossMonitor:
    """Losses of the steps, on the device until they are read. A value that is not finite ends the run."""

    def __init__(self, learner: Learner, state: TrainingState, batches: TrainingBatches) -> None:
        self._learner, self._state, self._batches = learner, state, batches
        self._pending: deque[tuple[int, Callable[[], list[float]]]] = deque()
        self._lag = _LAG.get(learner.setup.device.type, 0)
        self.last_loss = math.nan
        spec = learner.setup.spec
        # A sampler that changes how often each class occurs changes the loss of guessing too.
        self._guess_loss = learner.setup.task.learning.guess_loss() if spec.sampler.kind == Uniform.kind else None
        # Epochs in a row whose loss is above that of guessing and does not fall, and the last such loss.
        self._epochs_above, self._mean_above = 0, 0.0

    def add(self, probes: Tensor) -> None:
        """Add a step's `Learner.finiteness_probes`. On a CPU they are read at once, before the weights change.

        Raises NonFiniteError if a value that is read is not finite.
        """
        self._pending.append((self._state.step, _copy_to_host(probes)))
        self._read(self._lag)

    def read_pending(self) -> None:
        """Read all pending values. Raises NonFiniteError, which names files and a layer, if one is not finite."""
        self._read(0)

    def end_epoch(self) -> float:
        """Return the mean loss of the epoch's steps, and start the next epoch.

        Says once if the loss has not fallen for three epochs and is above that of a network that knows nothing.
        """
        state = self._state
        mean = state.loss_sum / max(1, state.loss_count)
        state.loss_sum, state.loss_count = 0.0, 0
        if self._guess_loss is not None:
            is_above = mean > self._guess_loss and mean > _FALLEN * self._mean_above
            self._epochs_above, self._mean_above = (self._epochs_above + 1, mean) if is_above else (0, 0.0)
            if self._epochs_above == _EPOCHS_ABOVE:
                loss = f"the loss has not fallen for {_EPOCHS_ABOVE} epochs and is above {self._guess_loss:.4g}"
                say(f"{loss}, that of a network that knows nothing: {_ADVICE}")
        return mean

    def _read(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            step, read_values = self._pending.popleft()
            values = read_values()
            for name, value in zip(_VALUE_NAMES, values, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(*self._diagnose(step, f"{name} became {value}", values))
            self._state.loss_sum += values[0]
            self._state.loss_count += 1
            self.last_loss = values[0]

    def _diagnose(self, step: int, problem: str, values: list[float]) -> list[str]:
        """Repeat the step's forward pass to find the first value that is not finite; returns the error's lines."""
        examples = self._learner.setup.dataset.splits["train"]
        batch = self._batches.at(step)
        bad_images = [escape(examples.sample_name(int(i))) for i in batch.index_B[~finite_image_mask(batch.images)]]
        # On a GPU the step has already used this loss and these gradients.
        has_updated_weights = self._lag > 0 and not all(map(math.isfinite, values[:2]))
        if has_updated_weights and not bad_images:
            order, description = 4, _UNKNOWN
        else:
            order, description = first_nonfinite(self._learner, batch, bad_images, math.isfinite(values[0]))
        # The ranks exchange their findings as JSON in tensors; the earliest one is reported.
        message = json.dumps([order, self._learner.setup.ranks.rank, description]).encode()
        gathered = self._learner.setup.ranks.all_gather({"message": torch.tensor(list(message), dtype=torch.uint8)})
        findings = [json.loads(bytes(tensors["message"].tolist())) for tensors in gathered]
        return self._lines(step, problem, min(findings)[2])

    def refuse_nonfinite(self, parts: CheckpointParts) -> None:
        """Raise NonFiniteError if a tensor to be saved after the last step is not finite."""
        for part, values in parts.items():
            for name, value in values.items():
                if not value.isfinite().all():
                    lines = self._lines(self._state.step - 1, "a saved value became nan or infinite", f"{part} {name}")
                    raise NonFiniteError(*lines)

    def _lines(self, step: int, problem: str, first: str) -> list[str]:
        examples = self._learner.setup.dataset.splits["train"]
        names = [escape(examples.sample_name(int(i))) for i in self._batches.sample_indices(step)]
        return [
            f"{problem} at step {step:,}; this step is not saved, the last checkpoint is kept",
            f"first value that is not finite: {first}",
            f"images of the batch: {join_names(names, 8)}",
            _ADVICE,
        ]


def _copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying `values` to the host; the returned function waits for the copy and returns them."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read
