"""What learns, and what its state is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from cnnrun.base.atomic_files import Folder
from cnnrun.base.randomness import derive_key
from cnnrun.base.ranks import Ranks
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Measurement, Results
from cnnrun.contracts.task import TaskSpec
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.training_batches import TrainingBatches, batches_in_order, default_prefetch
from cnnrun.model.network import Network
from cnnrun.training import checkpoints
from cnnrun.training.determinism import use_deterministic_layers
from cnnrun.training.ema import Ema
from cnnrun.training.evaluation import measure_split
from cnnrun.training.frozen_layers import compute_features, feature_bytes, separate_trunk, set_training_mode
from cnnrun.training.optimizers import OptimizerSpec, check_state_tensors, load_state_tensors, state_tensors
from cnnrun.training.settings import BATCH_NORMS, Train
from cnnrun.training.sync_batch_norm import synchronize_batch_norms

# Task, data facts, a batch, its results and the images' names -> one image of all, uint8 [H, W, 3], or None.
DrawFunction = Callable[[TaskSpec, Facts, Batch, Results, list[str]], NDArray[np.uint8] | None]

_CRITERION = 1  # apart from the network's seed


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
    should_stop: Callable[[int, float], bool] | None = None
    """Asked after each epoch, with its number and the monitored number: whether the training may end there."""
    draw: DrawFunction | None = None
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
            blend=partial(self.task.blend_targets, facts=self.facts),
            prefetch=ahead,
            timeout=self.reading_timeout,
            micro_batch_count=accumulate,
            ranks=self.ranks,
        )


class Learner:
    """What learns: network, criterion, optimizer, scaler, average; and how their state is saved and restored."""

    def __init__(self, job: Job) -> None:
        spec, device = job.spec, job.device
        self.network = job.network.to(device).to(memory_format=torch.channels_last)
        if device.type == "cuda" and spec.deterministic:
            use_deterministic_layers(self.network)
        if job.ranks.world_size > 1 and spec.sync_batch_norm:
            synchronize_batch_norms(self.network, job.ranks, device)
        torch.manual_seed(derive_key(job.seed, _CRITERION))  # its own weights, such as the centres of classes
        self.criterion = job.task.criterion(job.facts).to(device)
        self.network_and_criterion = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        set_training_mode(self.network, spec.freeze)
        groups = spec.optimizer.parameter_groups(trainable_parameters(self.network_and_criterion))
        self.parameter_names = [name for group in groups for name in group.pop("names")]
        self.optimizer = spec.optimizer.build(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = Ema(self.network, spec.ema.decay) if spec.ema else None
        self.active_network, self.forward = self.network, compile_network(self.network, spec)
        self.buffers = list(self.network_and_criterion.buffers())
        self.batch_norm_statistics = [value for module in self.network.modules() for value in _own_statistics(module)]
        self.parameters = [parameter for _, parameter in trainable_parameters(self.network_and_criterion)]
        self.changing_tensors = self._moving()
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[spec.precision]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def checkpoint_parts(self) -> checkpoints.CheckpointParts:
        parts = {"model": self.network.state_dict(), "optimizer": state_tensors(self.optimizer, self.parameter_names)}
        if self.ema:
            parts["ema"] = self.ema.average
        if criterion := self.criterion.state_dict():
            parts["criterion"] = criterion
        return parts

    def restore(self, saved: checkpoints.Checkpoint, optimizer: OptimizerSpec, step: int) -> None:
        """Put everything back as it was saved after `step`. Raises an error of any kind where it does not fit."""
        check_state_tensors(optimizer, saved.parts["optimizer"], step)
        self.network.load_state_dict(saved.parts["model"])
        self.criterion.load_state_dict(saved.parts.get("criterion", {}))
        load_state_tensors(self.optimizer, self.parameter_names, saved.parts["optimizer"])
        self.scaler.load_state_dict(saved.state["scaler"])
        if self.ema:
            for name, value in saved.parts["ema"].items():
                self.ema.average[name].copy_(value)

    def precompute_frozen_features(self, job: Job) -> Job:
        """The job over features of the frozen layers, computed once, where the pictures never change.

        From then on `forward` takes features. Where that cannot be, the job as it is, aloud.
        """
        from cnnrun.base.progress import progress_bar, say  # rich, which checking a config does not need

        if job.spec.freeze is None:
            return job
        parts = separate_trunk(self.network, job.spec.freeze)
        if why := self._changing(job, parts[0] if parts else None):
            say(f"the features of the frozen layers are computed anew at each step: {why}")
            return job
        assert parts is not None
        trunk, tail = parts
        with self.autocast(job.device):
            data = compute_features(trunk, job.dataset, job.spec.batch, job.device, progress_bar)
        self.active_network, self.forward = tail, compile_network(tail, job.spec)
        return replace(job, dataset=data)

    def _changing(self, job: Job, trunk: nn.Module | None) -> str | None:
        """Why the frozen layers' features cannot be computed once and kept."""
        if trunk is None:
            return "a later layer takes an earlier one of them by name"
        if job.augment.has_changes:
            return "augmentation changes the pictures"
        needed = feature_bytes(trunk, job.dataset, job.device) / 2**30
        return f"they would take {needed:.1f} GiB (data.memory_gib)" if needed > job.memory_gib else None

    def _moving(self) -> dict[str, Tensor]:
        """All that changes from step to step and must stay finite, by name: weights, statistics, their average."""
        found: dict[str, Tensor] = {
            name: parameter.detach() for name, parameter in trainable_parameters(self.network_and_criterion)
        }
        measuring = {id(buffer) for module in self.network.modules() if module.training for buffer in module.buffers()}
        found |= {
            name: buffer
            for name, buffer in self.network.named_buffers()
            if id(buffer) in measuring and name.rsplit(".", 1)[-1] in ("running_mean", "running_var")
        }
        average = self.ema.average if self.ema else {}
        return found | {f"{name} (ema)": average[name] for name in found if name in average}

    def draw_samples(self, job: Job, split: str, count: int) -> NDArray[np.uint8] | None:
        """The first samples of a split with what is in them and what is found; None where that has no place."""
        if job.draw is None or self.active_network is not self.network:
            return None  # or features of the frozen layers have taken the pictures' place
        batch = next(iter(batches_in_order(job.dataset.splits[split], count, job.device)))
        if job.task.target_marks(batch.targets, job.facts) is None:
            return None
        self.network.eval()
        decoder = job.task.decoder(job.facts).to(job.device)
        try:
            with torch.inference_mode():
                results = decoder(self._averaged(job)(batch.images).float())
        finally:  # a drawing that fails must not leave the network as it is evaluated
            set_training_mode(self.network, job.spec.freeze)
        names = [Path(job.dataset.splits[split].sample_name(number)).name for number in range(len(batch))]
        return job.draw(job.task, job.facts, batch, results, names)

    def evaluate(
        self, job: Job, split: str, batch: int, before_batch: Callable[[], None] = lambda: None
    ) -> Measurement:
        """Measure the averaged weights, where there are any, on a split, without touching what learns.

        `between` is called before each batch and may end the evaluation by raising.
        """
        self.network.eval()
        examples, forward = job.dataset.splits[split], self._averaged(job)
        criterion = None if job.task.is_open_set else self.criterion
        try:
            return measure_split(
                forward,
                criterion,
                job.task,
                job.facts,
                examples,
                batch,
                job.device,
                job.ranks,
                tables=False,
                before_batch=before_batch,
            )
        finally:
            set_training_mode(self.network, job.spec.freeze)

    def _averaged(self, job: Job) -> Callable[[Tensor], Tensor]:
        """The network as it is evaluated: with the averaged weights where there are any, in float32, as it is used."""
        average = self.ema.average if self.ema else {}
        weights = {name: average[name] for name in self.active_network.state_dict() if name in average}

        def forward(inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self.active_network, weights, (inputs,))
            return out

        return forward


def _own_statistics(module: nn.Module) -> list[Tensor]:
    """What a batch norm that learns has measured of this rank's pictures alone."""
    if not isinstance(module, BATCH_NORMS) or not module.training:
        return []
    return [value for value in module.buffers() if value.is_floating_point()]


def trainable_parameters(both: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, named as `cnnrun summary` names their layers; the criterion's after `criterion.`."""
    return [
        (name.removeprefix("network."), parameter)
        for name, parameter in both.named_parameters()
        if parameter.requires_grad
    ]


def compile_network(network: nn.Module, spec: Train) -> nn.Module:
    """The network, compiled by torch where the config says so."""
    if not spec.compile:
        return network
    # Of many trainings in one process PyTorch would compile the first eight alone, and say so in its log only.
    torch.compiler.reset()
    made: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return made
