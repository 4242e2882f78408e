"""The training loop, and the `train` section of the YAML."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from cnnrun import checkpoint
from cnnrun.augment import Augment
from cnnrun.batch import Batch
from cnnrun.batches import TrainingBatches
from cnnrun.contracts import Better, Facts, Measured, TaskSpec
from cnnrun.dataset import Dataset
from cnnrun.errors import ConfigError, Interrupted, NonFiniteError, ResourceError, printable
from cnnrun.evaluate import evaluate
from cnnrun.network import Network
from cnnrun.optim import Ema, EmaSpec, Optimizer, Sgd, load_state_tensors, state_tensors
from cnnrun.progress import Advance, bar, say
from cnnrun.randomness import seed_step
from cnnrun.runs import RESULT, write_json
from cnnrun.schedule import OneCycle, Schedule
from cnnrun.spec import Kinds, Spec
from cnnrun.tracker import Tracker

SHOW_EVERY = 50  # steps between two points of TensorBoard's training curves
_READ_EVERY = {"cpu": 1, "cuda": 20}  # steps between two looks at the losses; a look waits for the device


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
    """Micro-batches that each batch is split into, to save memory."""
    optimizer: Annotated[Optimizer, Kinds()] = Sgd(lr=0.05, momentum=0.9, nesterov=True)
    schedule: Annotated[Schedule, Kinds()] = OneCycle()
    clip: float | None = Field(None, gt=0)
    """Scales gradients down to this norm where they exceed it."""
    ema: EmaSpec | None = None
    monitor: str = "val/loss"
    """The number that chooses the best checkpoint and stops early: val/loss or val/ and one of the task's."""
    early_stop: EarlyStop | None = None
    drop_last: bool = True
    """Leave out an epoch's last, smaller batch (other pictures each epoch)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    """Compile the network with torch.compile."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept besides the best."""

    def stops_early(self, waited: int) -> bool:
        """Whether so many evaluations without improvement are enough."""
        return self.early_stop is not None and waited >= self.early_stop.patience


@dataclass
class State:
    """Everything that changes during a run and is not a tensor; `checkpoint` saves it as it is."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    loss_sum: float = 0.0  # of this epoch's steps so far
    loss_count: int = 0
    metrics_offset: int = 0


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
    run: Path

    @property
    def facts(self) -> Facts:
        return self.dataset.facts


class Learner:
    """What learns: network, criterion, optimizer, scaler, average; and how their state is saved and restored."""

    def __init__(self, job: Job) -> None:
        spec, device = job.spec, job.device
        self.network = job.network.to(device, memory_format=torch.channels_last)
        self.criterion = job.task.criterion(job.facts).to(device)
        self.both = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        self.names = [name for name, _ in self.both.named_parameters()]
        self.optimizer = spec.optimizer.build(self.both.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = Ema(self.network, spec.ema.decay) if spec.ema else None
        self.forward: nn.Module = torch.compile(self.network) if spec.compile else self.network  # type: ignore[assignment]
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[spec.precision]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def parts(self) -> checkpoint.Parts:
        parts = {"model": self.network.state_dict(), "optimizer": state_tensors(self.optimizer, self.names)}
        if self.ema:
            parts["ema"] = self.ema.average
        if criterion := self.criterion.state_dict():
            parts["criterion"] = criterion
        return parts

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.network.load_state_dict(saved.parts["model"])
        self.criterion.load_state_dict(saved.parts.get("criterion", {}))
        load_state_tensors(self.optimizer, self.names, saved.parts["optimizer"])
        self.scaler.load_state_dict(saved.state["scaler"])
        if self.ema:
            for name, value in saved.parts["ema"].items():
                self.ema.average[name].copy_(value)

    def evaluate(self, job: Job, split: str) -> Measured:
        """The averaged weights where there are any, on a split, without touching what learns."""
        self.network.eval()
        weights = self.ema.average if self.ema else {}

        def forward(pictures: Tensor) -> Tensor:
            with self.autocast(job.device):
                out: Tensor = functional_call(self.network, weights, (pictures,))
                return out

        return evaluate(
            forward, self.criterion, job.task, job.facts, job.dataset.splits[split], job.spec.batch, job.device
        )


def check(spec: Train, count: int, network: nn.Module) -> None:
    """What only shows once the number of training pictures is known. Raises ConfigError."""
    if spec.drop_last and spec.batch > count:
        raise ConfigError(f"train.batch: {spec.batch} is more than the {count} training pictures: no step an epoch")
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    smallest = spec.batch if spec.drop_last else (count % spec.batch or spec.batch)
    if smallest // spec.accumulate < 2 and any(isinstance(module, norms) for module in network.modules()):
        raise ConfigError(
            f"train.batch: a (micro-)batch of one picture has no variance for batch norm; "
            f"{count} pictures in batches of {spec.batch} / {spec.accumulate}: change batch, accumulate or drop_last"
        )


def fit(job: Job, saved: checkpoint.Checkpoint | None = None) -> dict[str, Any]:
    """Train to the end, from `saved` where given; returns what result.json says. Raises Interrupted, NonFiniteError."""
    check(job.spec, len(job.dataset.splits["train"]), job.network)
    learner, spec, folder = Learner(job), job.spec, job.run / "checkpoints"
    batches = TrainingBatches(
        job.dataset.splits["train"], job.augment, spec.batch, job.seed, job.device, spec.drop_last
    )
    state = State()
    if saved:
        learner.restore(saved)
        state = State(**saved.state["training"])
        if state.best is not None and (folder / f"step-{state.best_step:08d}").exists():
            checkpoint.point(folder, "best", f"step-{state.best_step:08d}")
    checkpoint.sweep(folder)
    tracker = Tracker(job.run, state.step, state.metrics_offset)
    total = spec.epochs * batches.steps_per_epoch
    losses = Losses(state, batches, job)
    clock = Clock()

    with stopping() as stop, bar("training", total, state.step) as advance:
        while state.step < total and not spec.stops_early(state.waited):
            with clock.waiting():
                batch = batches.at(state.step)
            if state.step == 0:
                tracker.show_pictures(0, "train/pictures", batch.pictures[:64])
            rate = spec.optimizer.lr * spec.schedule.factor(state.step, total)
            loss = train_step(learner, job, batch, state.step, rate)
            losses.add(loss, learner)
            state.step += 1
            clock.images += len(batch)
            epoch_ends = state.step % batches.steps_per_epoch == 0
            if state.step % SHOW_EVERY == 0 or epoch_ends:
                losses.read(learner)
                tracker.show(state.step, {"train/step_loss": losses.last, "train/lr": rate})
            _advance(advance, state, losses, clock)
            if epoch_ends:
                losses.read(learner)
                measured = learner.evaluate(job, "val")
                improved = _record(job, state, tracker, measured, clock, batches.steps_per_epoch)
                _save(job, learner, state, tracker)
                if improved:
                    checkpoint.point(folder, "best", f"step-{state.step:08d}")
                checkpoint.prune(folder, spec.keep)
            if stop.signal and not epoch_ends:
                losses.read(learner)
                _save(job, learner, state, tracker)
                checkpoint.prune(folder, spec.keep)
            if stop.signal and state.step < total:
                raise Interrupted(stop.signal, f"stopped at step {state.step} of {total} and saved; go on with --resume")
    tracker.close()
    return _finish(job, state, clock)


def train_step(learner: Learner, job: Job, batch: Batch, step: int, rate: float) -> Tensor:
    """One optimizer step on one batch; returns its loss, detached, on the device."""
    learner.network.train()
    seed_step(job.seed, step)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=job.device)
    for part in batch.split(job.spec.accumulate):
        pictures = part.pictures.contiguous(memory_format=torch.channels_last)
        with learner.autocast(job.device):
            outputs = learner.forward(pictures)
        losses: dict[str, Tensor] = learner.criterion(outputs.float(), part.targets)
        loss = sum(losses.values(), torch.zeros((), device=job.device)) * (len(part) / len(batch))
        learner.scaler.scale(loss).backward()
        total += loss.detach()
    if job.spec.clip is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.both.parameters(), job.spec.clip)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad()
    if learner.ema:
        learner.ema.update(step)
    return total


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
            f"first layer that is not finite: {first_nonfinite(learner.network, self._batches.at(step).pictures)}",
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


class Clock:
    """Seconds, pictures and waiting since the start, for people; nothing that is computed depends on it."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.images = 0
        self.waited = 0.0
        self.evaluating = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def numbers(self) -> dict[str, float]:
        return {
            "time/images_per_second": self.images / self.seconds,
            "time/data_wait_share": self.waited / self.seconds,
            "time/seconds": self.seconds,
        }


class Stop:
    """Which signal asked to stop, 0 while none has."""

    signal = 0


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second one leaves at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        say("stopping after this step (once more to leave at once) ...")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _advance(advance: Advance, state: State, losses: Losses, clock: Clock) -> None:
    if state.step % 5 == 0:
        note = f"loss {losses.last:.4f}"
        if state.best is not None:
            note += f"  best {state.best:.4f}"
        note += f"  {clock.images / clock.seconds:,.0f} images/s  data {clock.waited / clock.seconds:.0%}"
        advance(5, note)


def _record(job: Job, state: State, tracker: Tracker, measured: Measured, clock: Clock, per_epoch: int) -> bool:
    """Write an epoch down; returns whether the monitored number is the best so far."""
    epoch = state.step // per_epoch
    numbers = {"train/loss": state.loss_sum / max(1, state.loss_count)}
    numbers |= {f"val/{name}": value for name, value in measured.numbers.items()}
    state.loss_sum, state.loss_count = 0.0, 0
    tracker.record(state.step, {"epoch": epoch, **numbers})
    tracker.show(state.step, clock.numbers())
    for name, matrix in measured.matrices.items():
        tracker.show_matrix(state.step, f"val/{name}", matrix, job.facts.classes)
    value, improved = numbers[job.spec.monitor], False
    if not math.isfinite(value):
        raise NonFiniteError(f"{job.spec.monitor} became {value} after epoch {epoch}; the last checkpoint stands")
    delta = job.spec.early_stop.min_delta if job.spec.early_stop else 0.0
    gain = math.inf if state.best is None else (value - state.best) * (1 if better(job) == "max" else -1)
    if gain > delta:
        state.best, state.best_step, state.waited, improved = value, state.step, 0, True
    else:
        state.waited += 1
    monitored = "" if job.spec.monitor == "val/loss" else f"  {job.spec.monitor} {value:.4f}"
    say(
        f"epoch {epoch:3d}/{job.spec.epochs}  train/loss {numbers['train/loss']:.4f}  val/loss {numbers['val/loss']:.4f}"
        f"{monitored}{'  best' if improved else ''}  {clock.seconds:.0f} s  "
        f"{clock.images / clock.seconds:,.0f} images/s  data {clock.waited / clock.seconds:.0%}"
    )
    return improved


def better(job: Job) -> Better:
    """Which way the monitored number is better."""
    return monitored_numbers(job.task)[job.spec.monitor]


def monitored_numbers(task: TaskSpec) -> dict[str, Better]:
    """What `train.monitor` may name, and which way is better."""
    loss: Better = "min"
    return {"val/loss": loss} | {f"val/{name}": way for name, way in task.numbers().items()}


def _save(job: Job, learner: Learner, state: State, tracker: Tracker) -> None:
    """A checkpoint of everything. Raises NonFiniteError rather than save weights that are not finite."""
    state.metrics_offset = tracker.offset
    for name, parameter in learner.both.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"{name} is not finite after step {state.step}; it was not saved")
    saved = {"training": asdict(state), "scaler": learner.scaler.state_dict(), "facts": job.facts.to_json()}
    try:
        checkpoint.save(job.run / "checkpoints", state.step, learner.parts(), saved)
    except MemoryError:
        raise ResourceError("not enough memory to write a checkpoint") from None


def _finish(job: Job, state: State, clock: Clock) -> dict[str, Any]:
    result = {
        "steps": state.step,
        "best_step": state.best_step,
        "best": {job.spec.monitor: state.best},
        "seconds": round(clock.seconds, 2),
        "images_per_second": round(clock.images / clock.seconds, 1),
        "data_wait_share": round(clock.waited / clock.seconds, 4),
    }
    write_json(job.run / RESULT, result)
    return result
