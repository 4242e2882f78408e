"""What the steps say of themselves: read without making the device wait, and the search for what is not finite."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from cnnrun.base.errors import CheckpointError, NonFiniteError, printable
from cnnrun.base.labelling import listed
from cnnrun.contracts.batch import Batch
from cnnrun.data.training_batches import TrainingBatches
from cnnrun.training.checkpoints import Parts
from cnnrun.training.learner import Job, Learner

# Steps between a step and the look at its numbers. A GPU is given one step's work before the last one's is looked at,
# so that it never waits.
_LAG = {"cpu": 0, "cuda": 1}
_WHAT = ("the loss", "a gradient", "a weight or statistic")
# Of a network whose weights were changed by the step before its numbers were looked at.
_UNKNOWN = "not known on a GPU, whose weights the step has changed; --resume --device cpu would name the layer"


@dataclass
class State:
    """Everything that changes during a run and is not a tensor; `checkpoint` saves it as it is."""

    step: int = 0
    accumulate: int = 0  # micro-batches a batch: the config's, or more where memory did not suffice
    evaluated: int = 0  # the step after which val was measured last
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    mark: float | None = None  # what an evaluation must beat by early_stop.min_delta for the waiting to start anew
    loss_sum: float = 0.0  # of this epoch's steps so far
    loss_count: int = 0
    metrics_offset: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_json(cls, data: Any, where: str) -> State:
        """The state that a checkpoint holds. Raises CheckpointError."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(printable(str(each)) for each in first["loc"])
            raise CheckpointError(f"{where}: damaged (training.{place}: {first['msg']})") from None
        if missing := [each.name for each in fields(cls) if each.name not in data]:
            raise CheckpointError(f"{where}: damaged (training.{missing[0]} is missing)")
        counters = (state.step, state.evaluated, state.best_step, state.waited, state.loss_count, state.metrics_offset)
        ahead = max(state.evaluated, state.best_step) > state.step or (state.best is None) != (state.best_step == 0)
        if min(counters) < 0 or state.accumulate < 1 or ahead:
            raise CheckpointError(f"{where}: damaged (its counters are of no training)")
        return state


class Losses:
    """The steps' losses, kept on the device until they are read; what is not finite ends the run."""

    def __init__(self, state: State, batches: TrainingBatches, job: Job) -> None:
        self._state, self._batches, self._job = state, batches, job
        self._pending: deque[tuple[int, Callable[[], list[float]]]] = deque()
        self._lag = _LAG.get(job.device.type, 0)
        self.last = math.nan

    def add(self, health: Tensor, learner: Learner) -> None:
        """`step.health` of the step under way. On a CPU, what is not finite stops here, before the weights change."""
        self._pending.append((self._state.step, _on_host(health)))
        self._read(learner, self._lag)

    def read(self, learner: Learner) -> None:
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
            self.last = values[0]

    def _diagnosis(self, step: int, what: str, values: list[float], learner: Learner) -> list[str]:
        examples = self._job.dataset.splits["train"]
        batch = self._batches.at(step)
        bad = [printable(examples.name(int(i))) for i in batch.index_B[~_finite_rows(batch.pictures)]]
        spread = self._lag > 0 and not all(map(math.isfinite, values[:2]))  # by the step's update, to every weight
        if spread and not bad:
            place, found = 4, _UNKNOWN
        else:
            place, found = first_nonfinite(learner, batch, bad, math.isfinite(values[0]))
        told = torch.tensor(list(json.dumps([place, self._job.ranks.rank, found]).encode()), dtype=torch.uint8)
        told_by_all = [json.loads(bytes(each["told"].tolist())) for each in self._job.ranks.gather({"told": told})]
        return self._lines(step, what, min(told_by_all)[2])

    def refuse(self, parts: Parts) -> None:
        """Raises NonFiniteError where what is to be saved after the last step is not finite."""
        for part, values in parts.items():
            for name, value in values.items():
                if not value.isfinite().all():
                    lines = self._lines(self._state.step - 1, "what was learned became wrong", f"{part} {name}")
                    raise NonFiniteError(*lines)

    def _lines(self, step: int, what: str, first: str) -> list[str]:
        examples = self._job.dataset.splits["train"]
        names = [printable(examples.name(int(i))) for i in self._batches.indices(step)]
        shown = listed(names, 8)
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


def _finite_rows(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).isfinite().all(1).cpu()


def first_nonfinite(learner: Learner, batch: Batch, bad: list[str], loss_is_finite: bool) -> tuple[int, str]:
    """What was not finite first, for people, and how early that is: lower is earlier.

    `bad` are the names of pictures that are not finite themselves.
    """
    layer = _first_layer(learner.body, batch)  # on all ranks, for synchronised norms
    if bad:
        return 0, f"the picture {listed(bad, 8)}"
    if layer:
        return 1, layer
    for name, value in learner.moving.items():
        if not value.isfinite().all():
            return 2, name
    gradients = {name: parameter.grad for name, parameter in learner.both.named_parameters()}
    for name, gradient in gradients.items() if loss_is_finite else ():
        if gradient is not None and not gradient.isfinite().all():
            return 3, f"the gradient of {name.removeprefix('network.')}"
    return 4, "none (the loss itself)"


def _first_layer(network: nn.Module, batch: Batch) -> str | None:
    """The first module whose weights, statistics or output are not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            bad = [key for key, tensor in own.items() if not tensor.isfinite().all()]
            if bad:
                found.append(f"{name} (its {bad[0]})")
            elif isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"{name} (its output)")

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    with torch.no_grad():
        for part in batch.micro():
            network(part.pictures)
    for handle in handles:
        handle.remove()
    return found[0] if found else None
