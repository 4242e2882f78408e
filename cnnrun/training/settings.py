"""The `train` section of the YAML, and checks of it against the data, the network and the task."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import nn

from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.task import Task, TaskSpec
from cnnrun.contracts.task_parts import Direction, Targets
from cnnrun.data.epoch_order import Sampler, Uniform
from cnnrun.model.network import Network
from cnnrun.training.dtypes import Precision
from cnnrun.training.ema import EmaSpec
from cnnrun.training.frozen_layers import layers_until
from cnnrun.training.optimizers import Optimizer, Sgd
from cnnrun.training.schedules import OneCycle, Schedule

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class EarlyStop(Spec):
    """Stop when the monitored metric has not improved for some evaluations."""

    patience: int = Field(5, ge=1)
    """Evaluations without improvement before stopping."""
    min_delta: float = Field(0.0, ge=0)
    """An improvement must be larger than this."""


class Train(Spec):
    """Settings of the training."""

    epochs: int = Field(10, ge=1, le=1_000_000)
    batch: int = Field(128, ge=1, le=1_000_000)
    """Images per optimizer step, over all devices and micro-batches."""
    accumulate: int = Field(1, ge=1, le=10_000)
    """Micro-batches that each batch is split into, to save memory. The count doubles for the rest of the run when \
memory runs out."""
    optimizer: Annotated[Optimizer, Kinds()] = Sgd(lr=0.05, momentum=0.9, nesterov=True)
    schedule: Annotated[Schedule, Kinds()] = OneCycle()
    freeze: str | None = None
    """Layers up to and including the one of this name do not learn; their batch norms keep their statistics."""
    freeze_epochs: int | None = Field(None, ge=1)
    """Epochs for which `freeze` holds, after which these layers learn too; by default all."""
    clip: float | None = Field(None, gt=0)
    """Scale gradients down to this norm if they exceed it."""
    ema: EmaSpec | None = None
    monitor: str = "val/loss"
    """The metric that chooses the best checkpoint and stops early: val/loss or val/ and one of the task's metrics."""
    early_stop: EarlyStop | None = None
    sampler: Annotated[Sampler, Kinds()] = Uniform()
    """Which images an epoch contains, and how they form batches."""
    drop_last: bool = True
    """Leave out an epoch's last batch if it is smaller; each epoch leaves out other images."""
    precision: Precision = "auto"
    """`auto`: bfloat16 where the device computes in it and it is at least 1.15 times as fast for this network, else \
float32. Losses, the optimizer, averages and evaluation are always in float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = True
    """On a GPU: use kernels that give the same bits each time. `false` may be faster, but repeated and resumed \
trainings then differ slightly. Training on a CPU is always reproducible."""
    sync_batch_norm: bool = False
    """With several ranks: compute batch norm over the images of all ranks, not of each rank alone."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept besides the best."""
    save_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints within an epoch; each epoch also ends with one."""
    timeout: float = Field(120.0, gt=0)
    """Seconds to wait for another rank before the run ends with an error."""

    @model_validator(mode="after")
    def _check_freeze_epochs(self) -> Self:
        if self.freeze_epochs is not None and self.freeze is None:
            raise ValueError("freeze_epochs says how long `freeze` holds; add `freeze` or remove it")
        if self.freeze_epochs is not None and self.freeze_epochs >= self.epochs:
            raise ValueError(f"freeze_epochs: {self.freeze_epochs} leaves none of {self.epochs} epochs; remove it")
        return self

    @property
    def always_frozen(self) -> str | None:
        """The last layer that never learns, as `freeze` names it, or None."""
        return self.freeze if self.freeze_epochs is None else None

    def frozen_at(self, step: int, steps_per_epoch: int) -> str | None:
        """The last layer that does not learn at `step`, or None."""
        has_ended = self.freeze_epochs is not None and step >= self.freeze_epochs * steps_per_epoch
        return None if has_ended else self.freeze

    def steps_per_epoch(self, images: int) -> int:
        """Number of optimizer steps in an epoch of `images`."""
        return images // self.batch if self.drop_last else -(-images // self.batch)

    def smallest_batch(self, images: int) -> int:
        """Size of the smallest batch in an epoch of `images`."""
        return self.batch if self.drop_last else (images % self.batch or self.batch)

    def should_save(self, step: int) -> bool:
        """Return whether to save a checkpoint after `step`, besides those at the ends of epochs."""
        return self.save_every is not None and step % self.save_every == 0

    def should_stop_early(self, evaluations: int) -> bool:
        """Return whether to stop after this number of evaluations without improvement."""
        return self.early_stop is not None and evaluations >= self.early_stop.patience


def monitorable_metrics(task: TaskSpec) -> dict[str, Direction]:
    """Metrics that `train.monitor` may name, with their better direction."""
    loss: dict[str, Direction] = {} if task.requirements().has_unseen_classes else {"val/loss": "min"}
    return loss | {f"val/{name}": direction for name, direction in task.metrics().items()}


def check_batch_size(spec: Train, count: int, network: Network, ranks: int = 1, needs_pairs: bool = False) -> None:
    """Raise ConfigError if batches do not fit `count` training images; `needs_pairs` as in `batch_problem`."""
    if spec.drop_last and spec.batch > count:
        images = format_count(count, "training image")
        raise ConfigError(f"train.batch: {spec.batch} is more than the {images}: use {count:,} or less")
    if problem := batch_problem(spec, count, network, ranks, spec.accumulate, needs_pairs):
        raise ConfigError(f"train.batch: {problem}; change batch, accumulate or drop_last")


def check_schedule(spec: Train, count: int) -> None:
    """Raise ConfigError if the schedule does not fit the steps of a training on `count` images."""
    if problem := spec.schedule.problem(spec.epochs * spec.steps_per_epoch(count)):
        raise ConfigError(f"train.schedule: {problem}")


def refuse_undefined_monitor(task: Task, targets: Targets, monitor: str) -> None:
    """Raise DataError, which lists the defined metrics, if the monitored one is undefined for the targets of val."""
    undefined = task.measuring.undefined_metrics(targets)
    if reason := undefined.get(monitor.removeprefix("val/")):
        known = ", ".join(name for name in monitorable_metrics(task.spec) if name.removeprefix("val/") not in undefined)
        raise DataError(f"train.monitor: {monitor} is not defined: the val split {reason}; use another ({known})")


def batch_problem(
    spec: Train, count: int, network: Network, ranks: int, accumulate: int, needs_pairs: bool
) -> str | None:
    """Reason that batches of `count` images cannot be split into `accumulate` micro-batches on `ranks` ranks, or None.

    Batch norm needs two images, and each rank needs one. With `needs_pairs`, for losses that compare images, each
    micro-batch of a rank needs images of two classes.
    """
    micro = spec.smallest_batch(count) // accumulate
    smallest = micro // ranks
    frozen = {id(module) for layer in layers_until(network, spec.always_frozen).values() for module in layer.modules()}
    trainable = [module for module in network.modules() if id(module) not in frozen]
    split = f"the smallest batch has {format_count(spec.smallest_batch(count), 'image')}, in "
    split += format_count(accumulate, "micro-batch", "micro-batches") + (f" on {ranks} ranks" if ranks > 1 else "")
    if ranks > 1 and smallest < 1:
        return f"each rank needs an image of each micro-batch; {split}"
    if needs_pairs and smallest < 2 * spec.sampler.images_per_class:
        return f"each micro-batch of a rank needs two classes with {spec.sampler.images_per_class} images each; {split}"
    if spec.sync_batch_norm:
        smallest = micro
    if smallest < 2 and any(isinstance(module, BATCH_NORMS) for module in trainable):
        return f"batch norm needs (micro-)batches of two images or more; {split}"
    return None
