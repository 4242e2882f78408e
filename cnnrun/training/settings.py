"""The `train` section of the YAML, and what it asks of the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.task import Direction, TaskSpec
from cnnrun.data.epoch_order import Sampler, Uniform
from cnnrun.model.network import Network
from cnnrun.training.ema import EmaSpec
from cnnrun.training.frozen_layers import layers_until
from cnnrun.training.optimizers import Optimizer, Sgd
from cnnrun.training.schedules import OneCycle, Schedule

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


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

    def smallest_batch(self, pictures: int) -> int:
        """The smallest batch of an epoch of so many pictures."""
        return self.batch if self.drop_last else (pictures % self.batch or self.batch)

    def should_save(self, step: int) -> bool:
        """Whether there is to be a checkpoint after so many steps, wherever in the epoch."""
        return self.save_every is not None and step % self.save_every == 0

    def should_stop_early(self, waited: int) -> bool:
        """Whether so many evaluations without improvement are enough."""
        return self.early_stop is not None and waited >= self.early_stop.patience


def monitorable_metrics(task: TaskSpec) -> dict[str, Direction]:
    """What `train.monitor` may name, and which way is better."""
    loss: dict[str, Direction] = {} if task.is_open_set else {"val/loss": "min"}
    return loss | {f"val/{name}": way for name, way in task.metrics().items()}


def check_batch_size(spec: Train, count: int, network: Network, ranks: int = 1, together: bool = False) -> None:
    """What only shows once the number of training pictures is known. Raises ConfigError."""
    if spec.drop_last and spec.batch > count:
        raise ConfigError(f"train.batch: {spec.batch} is more than the {count} training pictures: no step an epoch")
    if problem := batch_problem(spec, count, network, ranks, spec.accumulate, together):
        raise ConfigError(f"train.batch: {problem}: change batch, accumulate or drop_last")


def refuse_undefined_monitor(task: TaskSpec, targets: dict[str, Tensor], monitor: str) -> None:
    """Raises DataError where val, with all these targets, cannot give the number that chooses the best weights."""
    undefined = task.undefined_metrics(targets)
    if why := undefined.get(monitor.removeprefix("val/")):
        known = ", ".join(name for name in monitorable_metrics(task) if name.removeprefix("val/") not in undefined)
        raise DataError(f"train.monitor: {monitor} is not defined: the val split {why}; name another ({known})")


def batch_problem(spec: Train, count: int, network: Network, ranks: int, accumulate: int, together: bool) -> str | None:
    """Why batches cannot be split so far, or None: batch norm needs two pictures, a rank of several needs one.

    What learns from pictures `together` needs two classes of them.
    """
    micro = spec.smallest_batch(count) // accumulate
    smallest = micro // ranks
    still = {id(module) for each in layers_until(network, spec.freeze).values() for module in each.modules()}
    learning = [module for module in network.modules() if id(module) not in still]
    split = f"{count} pictures in batches of {spec.batch} / {accumulate}" + (f" / {ranks} ranks" if ranks > 1 else "")
    if ranks > 1 and smallest < 1:
        return f"each rank needs a picture of each micro-batch; {split}"
    if together and smallest < 2 * spec.sampler.images_per_class:
        return f"each part needs {spec.sampler.images_per_class} pictures of two classes to compare; {split}"
    if spec.sync_batch_norm:
        smallest = micro
    if smallest < 2 and any(isinstance(module, BATCH_NORMS) for module in learning):
        return f"batch norm needs (micro-)batches of two pictures or more; {split}"
    return None
