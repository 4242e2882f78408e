"""What the steps say of themselves: read without making the device wait, and the search for what is not finite."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import NonFiniteError, escape
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.training.checkpoints import CheckpointParts
from cnnrun.training.learner import Job, Learner
from cnnrun.training.nonfinite import finite_image_mask, first_nonfinite
from cnnrun.training.state import TrainingState

# Steps between a step and the look at its numbers. A GPU is given one step's work before the last one's is looked at,
# so that it never waits.
_LAG = {"cpu": 0, "cuda": 1}
_WHAT = ("the loss", "a gradient", "a weight or statistic")
# Of a network whose weights were changed by the step before its numbers were looked at.
_UNKNOWN = "not known on a GPU, whose weights the step has changed; --resume --device cpu would name the layer"


class LossMonitor:
    """The steps' losses, kept on the device until they are read; what is not finite ends the run."""

    def __init__(self, state: TrainingState, batches: TrainingBatches, job: Job) -> None:
        self._state, self._batches, self._job = state, batches, job
        self._pending: deque[tuple[int, Callable[[], list[float]]]] = deque()
        self._lag = _LAG.get(job.device.type, 0)
        self.last_loss = math.nan

    def add(self, health: Tensor, learner: Learner) -> None:
        """Add a step's `finiteness_sums`. On a CPU, values that are not finite end it before the weights change."""
        self._pending.append((self._state.step, _on_host(health)))
        self._read(learner, self._lag)

    def read_pending(self, learner: Learner) -> None:
        """Look at all that is pending. Raises NonFiniteError that names the files and the first layer."""
        self._read(learner, 0)

    def _read(self, learner: Learner, left: int) -> None:
        while len(self._pending) > left:
            step, numbers = self._pending.popleft()
            values = numbers()
            for what, value in zip(_WHAT, values, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(*self._diagnosis(step, f"{what} became {value}", values, learner))
            self._state.loss_sum += values[0]
            self._state.loss_count += 1
            self.last_loss = values[0]

    def _diagnosis(self, step: int, what: str, values: list[float], learner: Learner) -> list[str]:
        examples = self._job.dataset.splits["train"]
        batch = self._batches.at(step)
        bad = [escape(examples.sample_name(int(i))) for i in batch.index_B[~finite_image_mask(batch.images)]]
        spread = self._lag > 0 and not all(map(math.isfinite, values[:2]))  # by the step's update, to every weight
        if spread and not bad:
            place, found = 4, _UNKNOWN
        else:
            place, found = first_nonfinite(learner, batch, bad, math.isfinite(values[0]))
        told = torch.tensor(list(json.dumps([place, self._job.ranks.rank, found]).encode()), dtype=torch.uint8)
        told_by_all = [json.loads(bytes(each["told"].tolist())) for each in self._job.ranks.all_gather({"told": told})]
        return self._lines(step, what, min(told_by_all)[2])

    def refuse_nonfinite(self, parts: CheckpointParts) -> None:
        """Raises NonFiniteError where what is to be saved after the last step is not finite."""
        for part, values in parts.items():
            for name, value in values.items():
                if not value.isfinite().all():
                    lines = self._lines(self._state.step - 1, "what was learned became wrong", f"{part} {name}")
                    raise NonFiniteError(*lines)

    def _lines(self, step: int, what: str, first: str) -> list[str]:
        examples = self._job.dataset.splits["train"]
        names = [escape(examples.sample_name(int(i))) for i in self._batches.sample_indices(step)]
        shown = join_names(names, 8)
        return [
            f"{what} at step {step}; nothing of it was saved, the last checkpoint stands",
            f"first that is not finite: {first}",
            f"pictures of the batch: {shown}",
            "a lower train.optimizer.*.lr, a longer schedule warmup or train.clip: 1.0 usually helps",
        ]


def _on_host(values: Tensor) -> Callable[[], list[float]]:
    """The values once they are asked for; a copy to the host is under way and nothing waits for it before."""
    if values.device.type != "cuda":
        return values.tolist
    there = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return there.tolist()

    return read
