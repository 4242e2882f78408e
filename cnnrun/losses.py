"""The losses of a run's steps: read without making the device wait, and the search for what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.batches import TrainingBatches
from cnnrun.errors import NonFiniteError, printable
from cnnrun.learner import Job, Learner

_READ_EVERY = {"cpu": 1, "cuda": 20}  # steps between two looks at the losses; a look waits for the device


@dataclass
class State:
    """Everything that changes during a run and is not a tensor; `checkpoint` saves it as it is."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    mark: float | None = None  # what an evaluation must beat by early_stop.min_delta for the waiting to start anew
    loss_sum: float = 0.0  # of this epoch's steps so far
    loss_count: int = 0
    metrics_offset: int = 0


class Losses:
    """The steps' losses: kept on the device, read now and then, refused when not finite."""

    def __init__(self, state: State, batches: TrainingBatches, job: Job) -> None:
        self._state, self._batches, self._job = state, batches, job
        self._pending: list[tuple[int, Tensor]] = []
        self._every = _READ_EVERY.get(job.device.type, 1)
        self.last = math.nan

    def add(self, loss: Tensor, learner: Learner) -> None:
        """The loss of the step under way."""
        self._pending.append((self._state.step, loss))
        if len(self._pending) >= self._every:
            self.read(learner)

    def read(self, learner: Learner) -> None:
        """Bring what is pending to the host. Raises NonFiniteError that names the files and the first layer."""
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        values = torch.stack([loss for _, loss in self._pending]).tolist()
        self._pending.clear()
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(*self._diagnosis(step, value, learner))
            self._state.loss_sum += value
            self._state.loss_count += 1
            self.last = value

    def _diagnosis(self, step: int, value: float, learner: Learner) -> list[str]:
        examples = self._job.dataset.splits["train"]
        names = [printable(examples.name(int(i))) for i in self._batches.indices(step)]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return [
            f"the loss became {value} at step {step}; nothing of it was saved, the last checkpoint stands",
            f"first layer that is not finite: {first_nonfinite(learner.body, self._batches.at(step).pictures)}",
            f"pictures of the batch: {shown}",
            "a lower train.optimizer.*.lr, a longer schedule warmup or train.clip: 1.0 usually helps",
        ]


def first_nonfinite(network: nn.Module, pictures: Tensor) -> str:
    """The name of the first module whose weights or output are not finite, or `none` (then it is the loss itself)."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output, *module.parameters(recurse=False)]
            if any(isinstance(tensor, Tensor) and not tensor.isfinite().all() for tensor in tensors):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    with torch.no_grad():
        network(pictures)
    for handle in handles:
        handle.remove()
    return found[0] if found else "none (the loss itself)"
