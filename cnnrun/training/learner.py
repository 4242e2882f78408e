"""What learns, and what its state is. The `train` section of the YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.randomness import key
from cnnrun.base.ranks import Ranks
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.layer import Facts
from cnnrun.contracts.task import Better, Measured, Results, TaskSpec
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.epoch_order import Sampler, Uniform
from cnnrun.data.training_batches import TrainingBatches, default_prefetch, in_order
from cnnrun.model.network import Network
from cnnrun.training import checkpoints
from cnnrun.training.determinism import use_deterministic_layers
from cnnrun.training.evaluate import evaluate
from cnnrun.training.frozen_layers import cut, feature_bytes, features, held, hold
from cnnrun.training.optimizers import (
    Ema,
    EmaSpec,
    Optimizer,
    OptimizerSpec,
    Sgd,
    check_state,
    load_state_tensors,
    state_tensors,
)
from cnnrun.training.schedules import OneCycle, Schedule
from cnnrun.training.sync_batch_norm import synchronized

# Task, data facts, a batch, its results and the images' names -> one image of all, uint8 [H, W, 3], or None.
Draw = Callable[[TaskSpec, Facts, Batch, Results, list[str]], NDArray[np.uint8] | None]

_CRITERION = 1  # apart from the network's seed
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class EarlyStop(Spec):
    """Stop when the monitored number has not improved for a while."""

    patience: int = Field(5, ge=1)
    """Evaluations without improvement before stopping."""
    min_delta: float = Field(0.0, ge=0)
    """What counts as an improvement."""


class Train(Spec):
    """How the network learns."""

    epochs: int = Field(10, ge=1, le=1_000_000)
    batch: int = Field(128, ge=1, le=1_000_000)
    """Pictures per optimizer step, all devices and micro-batches together."""
    accumulate: int = Field(1, ge=1, le=10_000)
    """Micro-batches that each batch is split into, to save memory. Twice as many from the step on for which it does \
not suffice."""
    optimizer: Annotated[Optimizer, Kinds()] = Sgd(lr=0.05, momentum=0.9, nesterov=True)
    schedule: Annotated[Schedule, Kinds()] = OneCycle()
    freeze: str | None = None
    """Layers up to the one of this name do not learn; their batch norms keep their statistics."""
    clip: float | None = Field(None, gt=0)
    """Scales gradients down to this norm where they exceed it."""
    ema: EmaSpec | None = None
    monitor: str = "val/loss"
    """The number that chooses the best checkpoint and stops early: val/loss or val/ and one of the task's."""
    early_stop: EarlyStop | None = None
    sampler: Annotated[Sampler, Kinds()] = Uniform()
    """Which pictures an epoch shows, and which of them make a batch."""
    drop_last: bool = True
    """Leave out an epoch's last, smaller batch (other pictures each epoch)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = True
    """On a GPU: kernels that give the same bits each time. Without, a training may be faster, and neither repeats nor \
resumes to the bit. On a CPU it does either way."""
    sync_batch_norm: bool = False
    """Of several ranks: batch norm over the pictures of all of them, not of each on its own."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept besides the best."""
    save_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, for long epochs; there is always one at an epoch's end."""
    timeout: float = Field(120.0, gt=0)
    """Seconds without an answer from another rank after which the run ends."""

    def steps_per_epoch(self, pictures: int) -> int:
        """Optimizer steps in an epoch of so many pictures."""
        return pictures // self.batch if self.drop_last else -(-pictures // self.batch)

    def smallest(self, pictures: int) -> int:
        """The smallest batch of an epoch of so many pictures."""
        return self.batch if self.drop_last else (pictures % self.batch or self.batch)

    def saves_at(self, step: int) -> bool:
        """Whether there is to be a checkpoint after so many steps, wherever in the epoch."""
        return self.save_every is not None and step % self.save_every == 0

    def stops_early(self, waited: int) -> bool:
        """Whether so many evaluations without improvement are enough."""
        return self.early_stop is not None and waited >= self.early_stop.patience


def monitored_numbers(task: TaskSpec) -> dict[str, Better]:
    """What `train.monitor` may name, and which way is better."""
    loss: dict[str, Better] = {} if task.open_set else {"val/loss": "min"}
    return loss | {f"val/{name}": way for name, way in task.numbers().items()}


def check(spec: Train, count: int, network: Network, ranks: int = 1, together: bool = False) -> None:
    """What only shows once the number of training pictures is known. Raises ConfigError."""
    if spec.drop_last and spec.batch > count:
        raise ConfigError(f"train.batch: {spec.batch} is more than the {count} training pictures: no step an epoch")
    if problem := too_small(spec, count, network, ranks, spec.accumulate, together):
        raise ConfigError(f"train.batch: {problem}: change batch, accumulate or drop_last")


def refuse_undefined(task: TaskSpec, targets: dict[str, Tensor], monitor: str) -> None:
    """Raises DataError where val, with all these targets, cannot give the number that chooses the best weights."""
    undefined = task.undefined(targets)
    if why := undefined.get(monitor.removeprefix("val/")):
        known = ", ".join(name for name in monitored_numbers(task) if name.removeprefix("val/") not in undefined)
        raise DataError(f"train.monitor: {monitor} is not defined: the val split {why}; name another ({known})")


def too_small(spec: Train, count: int, network: Network, ranks: int, accumulate: int, together: bool) -> str | None:
    """Why batches cannot be split so far, or None: batch norm needs two pictures, a rank of several needs one.

    What learns from pictures `together` needs two classes of them.
    """
    micro = spec.smallest(count) // accumulate
    smallest = micro // ranks
    still = {id(module) for each in held(network, spec.freeze).values() for module in each.modules()}
    learning = [module for module in network.modules() if id(module) not in still]
    split = f"{count} pictures in batches of {spec.batch} / {accumulate}" + (f" / {ranks} ranks" if ranks > 1 else "")
    if ranks > 1 and smallest < 1:
        return f"each rank needs a picture of each micro-batch; {split}"
    if together and smallest < 2 * spec.sampler.together:
        return f"each part needs {spec.sampler.together} pictures of two classes to compare; {split}"
    if spec.sync_batch_norm:
        smallest = micro
    if smallest < 2 and any(isinstance(module, _NORMS) for module in learning):
        return f"batch norm needs (micro-)batches of two pictures or more; {split}"
    return None


@dataclass(frozen=True)
class Job:
    """What `fit` works on."""

    spec: Train
    network: Network
    task: TaskSpec
    dataset: Dataset
    augment: Augment
    seed: int
    device: torch.device
    run: Folder | None
    """The run's folder, on the rank that writes."""
    memory_gib: float = 4.0
    prefetch: int | None = None
    reading_timeout: float = 120.0
    ranks: Ranks = field(default_factory=Ranks)
    enough: Callable[[int, float], bool] | None = None
    """Asked after each epoch, with its number and the monitored number: whether the training may end there."""
    draw: Draw | None = None
    """Draws what is in images and what was found in them, for TensorBoard; without it nothing is drawn."""

    @property
    def facts(self) -> Facts:
        return self.dataset.facts

    def batches(self, examples: Examples, accumulate: int) -> TrainingBatches:
        """The run's training batches; `examples` may be the training split's features."""
        order = self.spec.sampler.order(examples.targets, self.spec.batch)
        ahead = default_prefetch(examples, self.device) if self.prefetch is None else self.prefetch
        return TrainingBatches(
            examples,
            self.augment,
            self.spec.batch,
            self.spec.steps_per_epoch(len(examples)),
            self.seed,
            self.device,
            order=order,
            blend=partial(self.task.blend, facts=self.facts),
            prefetch=ahead,
            timeout=self.reading_timeout,
            parts=accumulate,
            ranks=self.ranks,
        )


class Learner:
    """What learns: network, criterion, optimizer, scaler, average; and how their state is saved and restored."""

    def __init__(self, job: Job) -> None:
        spec, device = job.spec, job.device
        self.network = job.network.to(device).to(memory_format=torch.channels_last)
        if device.type == "cuda" and spec.deterministic:
            use_deterministic_layers(self.network)
        if job.ranks.size > 1 and spec.sync_batch_norm:
            synchronized(self.network, job.ranks, device)
        torch.manual_seed(key(job.seed, _CRITERION))  # its own weights, such as the centres of classes
        self.criterion = job.task.criterion(job.facts).to(device)
        self.both = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        hold(self.network, spec.freeze)
        groups = spec.optimizer.grouped(learning(self.both))
        self.names = [name for group in groups for name in group.pop("names")]
        self.optimizer = spec.optimizer.build(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = Ema(self.network, spec.ema.decay) if spec.ema else None
        self.body, self.forward = self.network, compiled(self.network, spec)
        self.buffers = list(self.both.buffers())
        self.statistics = [value for module in self.network.modules() for value in _own_statistics(module)]
        self.parameters = [parameter for _, parameter in learning(self.both)]
        self.moving = self._moving()
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[spec.precision]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def parts(self) -> checkpoints.Parts:
        parts = {"model": self.network.state_dict(), "optimizer": state_tensors(self.optimizer, self.names)}
        if self.ema:
            parts["ema"] = self.ema.average
        if criterion := self.criterion.state_dict():
            parts["criterion"] = criterion
        return parts

    def restore(self, saved: checkpoints.Checkpoint, optimizer: OptimizerSpec, step: int) -> None:
        """Put everything back as it was saved after `step`. Raises an error of any kind where it does not fit."""
        check_state(optimizer, saved.parts["optimizer"], step)
        self.network.load_state_dict(saved.parts["model"])
        self.criterion.load_state_dict(saved.parts.get("criterion", {}))
        load_state_tensors(self.optimizer, self.names, saved.parts["optimizer"])
        self.scaler.load_state_dict(saved.state["scaler"])
        if self.ema:
            for name, value in saved.parts["ema"].items():
                self.ema.average[name].copy_(value)

    def reuse_frozen(self, job: Job) -> Job:
        """The job over features of the frozen layers, computed once, where the pictures never change.

        From then on `forward` takes features. Where that cannot be, the job as it is, aloud.
        """
        from cnnrun.base.progress import bar, say  # rich, which checking a config does not need

        if job.spec.freeze is None:
            return job
        parts = cut(self.network, job.spec.freeze)
        if why := self._changing(job, parts[0] if parts else None):
            say(f"the features of the frozen layers are computed anew at each step: {why}")
            return job
        assert parts is not None
        trunk, tail = parts
        with self.autocast(job.device):
            data = features(trunk, job.dataset, job.spec.batch, job.device, bar)
        self.body, self.forward = tail, compiled(tail, job.spec)
        return replace(job, dataset=data)

    def _changing(self, job: Job, trunk: nn.Module | None) -> str | None:
        """Why the frozen layers' features cannot be computed once and kept."""
        if trunk is None:
            return "a later layer takes an earlier one of them by name"
        if job.augment.changes:
            return "augmentation changes the pictures"
        needed = feature_bytes(trunk, job.dataset, job.device) / 2**30
        return f"they would take {needed:.1f} GiB (data.memory_gib)" if needed > job.memory_gib else None

    def _moving(self) -> dict[str, Tensor]:
        """All that changes from step to step and must stay finite, by name: weights, statistics, their average."""
        found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in learning(self.both)}
        measuring = {id(buffer) for module in self.network.modules() if module.training for buffer in module.buffers()}
        found |= {
            name: buffer
            for name, buffer in self.network.named_buffers()
            if id(buffer) in measuring and name.rsplit(".", 1)[-1] in ("running_mean", "running_var")
        }
        average = self.ema.average if self.ema else {}
        return found | {f"{name} (ema)": average[name] for name in found if name in average}

    def shown(self, job: Job, split: str, count: int) -> NDArray[np.uint8] | None:
        """The first samples of a split with what is in them and what is found; None where that has no place."""
        if job.draw is None or self.body is not self.network:
            return None  # or features of the frozen layers have taken the pictures' place
        batch = next(iter(in_order(job.dataset.splits[split], count, job.device)))
        if job.task.true_marks(batch.targets, job.facts) is None:
            return None
        self.network.eval()
        decoder = job.task.decoder(job.facts).to(job.device)
        try:
            with torch.inference_mode():
                results = decoder(self._averaged(job)(batch.pictures).float())
        finally:  # a drawing that fails must not leave the network as it is evaluated
            hold(self.network, job.spec.freeze)
        names = [Path(job.dataset.splits[split].name(number)).name for number in range(len(batch))]
        return job.draw(job.task, job.facts, batch, results, names)

    def evaluate(self, job: Job, split: str, batch: int, between: Callable[[], None] = lambda: None) -> Measured:
        """Measure the averaged weights, where there are any, on a split, without touching what learns.

        `between` is called before each batch and may end the evaluation by raising.
        """
        self.network.eval()
        examples, forward = job.dataset.splits[split], self._averaged(job)
        criterion = None if job.task.open_set else self.criterion
        try:
            return evaluate(
                forward,
                criterion,
                job.task,
                job.facts,
                examples,
                batch,
                job.device,
                job.ranks,
                tables=False,
                between=between,
            )
        finally:
            hold(self.network, job.spec.freeze)

    def _averaged(self, job: Job) -> Callable[[Tensor], Tensor]:
        """The network as it is evaluated: with the averaged weights where there are any, in float32, as it is used."""
        average = self.ema.average if self.ema else {}
        weights = {name: average[name] for name in self.body.state_dict() if name in average}

        def forward(inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self.body, weights, (inputs,))
            return out

        return forward


def _own_statistics(module: nn.Module) -> list[Tensor]:
    """What a batch norm that learns has measured of this rank's pictures alone."""
    if not isinstance(module, _NORMS) or not module.training:
        return []
    return [value for value in module.buffers() if value.is_floating_point()]


def learning(both: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, named as `cnnrun summary` names their layers; the criterion's after `criterion.`."""
    return [
        (name.removeprefix("network."), parameter)
        for name, parameter in both.named_parameters()
        if parameter.requires_grad
    ]


def compiled(network: nn.Module, spec: Train) -> nn.Module:
    """The network, compiled by torch where the config says so."""
    if not spec.compile:
        return network
    # Of many trainings in one process PyTorch would compile the first eight alone, and say so in its log only.
    torch.compiler.reset()
    made: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return made
