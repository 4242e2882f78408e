"""The learner: network, criterion, optimizer and everything else that a checkpoint saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.results import Measurement, Results
from cnnrun.contracts.task import Task
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

# Draws a batch's images with their targets and results: (task, batch, results, names) -> uint8 [H, W, 3].
DrawFunction = Callable[[Task, Batch, Results, list[str]], NDArray[np.uint8]]

_CRITERION_SEED = 1  # differs from the key of the network's seed


@dataclass(frozen=True)
class Job:
    """Everything that `fit` needs for one training."""

    spec: Train
    network: Network
    task: Task
    dataset: Dataset
    augment: Augment
    seed: int
    device: torch.device
    run: Folder | None
    """The run's folder; None on ranks that write nothing."""
    memory_gib: float = 4.0
    prefetch: int | None = None
    reading_timeout: float = 120.0
    ranks: Ranks = field(default_factory=Ranks)
    should_stop: Callable[[int, float], bool] | None = None
    """Called after each epoch with the epoch and the monitored metric; the training ends if it returns True."""
    draw: DrawFunction | None = None
    """Draws images with their targets and results for TensorBoard; None draws nothing."""

    @property
    def facts(self) -> DataFacts:
        return self.dataset.facts

    def batches(self, examples: Examples, accumulate: int) -> TrainingBatches:
        """The run's training batches; `examples` is the training split, or its features."""
        order = self.spec.sampler.order(examples.targets, self.spec.batch)
        prefetch = default_prefetch(examples, self.device) if self.prefetch is None else self.prefetch
        return TrainingBatches(
            examples,
            self.augment,
            self.spec.batch,
            self.spec.steps_per_epoch(len(examples)),
            self.seed,
            self.device,
            order=order,
            blend=self.task.learning.mix_targets,
            prefetch=prefetch,
            timeout=self.reading_timeout,
            micro_batch_count=accumulate,
            ranks=self.ranks,
        )


class Learner:
    """Network, criterion, optimizer, loss scaler and average of the weights; saves and restores their state."""

    def __init__(self, job: Job) -> None:
        spec, device = job.spec, job.device
        self.network = job.network.to(device).to(memory_format=torch.channels_last)
        if device.type == "cuda" and spec.deterministic:
            use_deterministic_layers(self.network)
        if job.ranks.world_size > 1 and spec.sync_batch_norm:
            synchronize_batch_norms(self.network, job.ranks, device)
        torch.manual_seed(derive_key(job.seed, _CRITERION_SEED))  # criteria may have weights, such as class centres
        self.criterion = job.task.learning.build_criterion().to(device)
        self.network_and_criterion = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        set_training_mode(self.network, spec.freeze)
        groups = spec.optimizer.parameter_groups(trainable_parameters(self.network_and_criterion))
        self.parameter_names = [name for group in groups for name in group.pop("names")]
        self.optimizer = spec.optimizer.build(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = Ema(self.network, spec.ema.decay) if spec.ema else None
        self.active_network, self.forward = self.network, compile_network(self.network, spec)
        self.buffers = list(self.network_and_criterion.buffers())
        self.batch_norm_statistics = [value for module in self.network.modules() for value in _rank_statistics(module)]
        self.parameters = [parameter for _, parameter in trainable_parameters(self.network_and_criterion)]
        self.changing_tensors = self._collect_changing_tensors()
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

    def restore(self, checkpoint: checkpoints.Checkpoint, optimizer: OptimizerSpec, step: int) -> None:
        """Restore the state that `checkpoint` holds after `step`.

        Raises KeyError, TypeError, ValueError, RuntimeError or AttributeError if the checkpoint does not fit.
        """
        check_state_tensors(optimizer, checkpoint.parts["optimizer"], step)
        self.network.load_state_dict(checkpoint.parts["model"])
        self.criterion.load_state_dict(checkpoint.parts.get("criterion", {}))
        load_state_tensors(self.optimizer, self.parameter_names, checkpoint.parts["optimizer"])
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        if self.ema:
            for name, value in checkpoint.parts["ema"].items():
                self.ema.average[name].copy_(value)

    def precompute_frozen_features(self, job: Job) -> Job:
        """Compute the frozen layers' features once, if the images never change; returns the job to train on.

        Its dataset then holds features, and `forward` takes features. If the features cannot be computed once,
        the reason is printed and the job returned unchanged.
        """
        from cnnrun.base.progress import progress_bar, say  # imports rich, which checking a config does not need

        if job.spec.freeze is None:
            return job
        parts = separate_trunk(self.network, job.spec.freeze)
        if reason := self._recompute_reason(job, parts[0] if parts else None):
            say(f"the features of the frozen layers are computed anew at each step: {reason}")
            return job
        assert parts is not None
        trunk, tail = parts
        with self.autocast(job.device):
            features = compute_features(trunk, job.dataset, job.spec.batch, job.device, progress_bar)
        self.active_network, self.forward = tail, compile_network(tail, job.spec)
        return replace(job, dataset=features)

    def _recompute_reason(self, job: Job, trunk: nn.Module | None) -> str | None:
        """Reason that the frozen layers' features cannot be computed once, or None."""
        if trunk is None:
            return "a later layer takes one of their inner layers by name"
        if job.augment.has_changes:
            return "augmentation changes the pictures"
        gib = feature_bytes(trunk, job.dataset, job.device) / 2**30
        return f"they would take {gib:.1f} GiB (data.memory_gib)" if gib > job.memory_gib else None

    def _collect_changing_tensors(self) -> dict[str, Tensor]:
        """Tensors that steps change and that must stay finite, by name: weights, statistics and averages."""
        tensors: dict[str, Tensor] = {
            name: parameter.detach() for name, parameter in trainable_parameters(self.network_and_criterion)
        }
        updated = {id(buffer) for module in self.network.modules() if module.training for buffer in module.buffers()}
        tensors |= {
            name: buffer
            for name, buffer in self.network.named_buffers()
            if id(buffer) in updated and name.rsplit(".", 1)[-1] in ("running_mean", "running_var")
        }
        average = self.ema.average if self.ema else {}
        return tensors | {f"{name} (ema)": average[name] for name in tensors if name in average}

    def draw_samples(self, job: Job, split: str, count: int) -> NDArray[np.uint8] | None:
        """Draw the first `count` samples of a split with their targets and predictions.

        Returns None if the task has no targets to draw, or if the network takes features instead of images.
        """
        can_draw = job.task.showing.has_overlays and self.active_network is self.network
        if job.draw is None or not can_draw:
            return None
        batch = next(iter(batches_in_order(job.dataset.splits[split], count, job.device)))
        self.network.eval()
        decoder = job.task.predicting.build_decoder(Choices()).to(job.device)
        try:
            with torch.inference_mode():
                results = decoder(self._evaluated_network(job)(batch.images).float())
        finally:  # a failed drawing must not leave the network in evaluation mode
            set_training_mode(self.network, job.spec.freeze)
        names = [Path(job.dataset.splits[split].sample_name(index)).name for index in range(len(batch))]
        return job.draw(job.task, batch, results, names)

    def evaluate(
        self, job: Job, split: str, batch: int, before_batch: Callable[[], None] = lambda: None
    ) -> Measurement:
        """Measure the averaged weights, or the weights if there is no average, on a split; training state is unchanged.

        `before_batch` is called before each batch and may end the evaluation by raising an exception.
        """
        self.network.eval()
        examples, forward = job.dataset.splits[split], self._evaluated_network(job)
        criterion = None if job.task.requirements.unseen_classes else self.criterion
        try:
            return measure_split(
                forward,
                criterion,
                job.task,
                Choices(),
                examples,
                batch,
                job.device,
                job.ranks,
                tables=False,
                before_batch=before_batch,
            )
        finally:
            set_training_mode(self.network, job.spec.freeze)

    def _evaluated_network(self, job: Job) -> Callable[[Tensor], Tensor]:
        """The network in float32, with the averaged weights if there are any."""
        average = self.ema.average if self.ema else {}
        weights = {name: average[name] for name in self.active_network.state_dict() if name in average}

        def forward(inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self.active_network, weights, (inputs,))
            return out

        return forward


def _rank_statistics(module: nn.Module) -> list[Tensor]:
    """Running statistics that a batch norm in training mode measures on this rank's images alone."""
    if not isinstance(module, BATCH_NORMS) or not module.training:
        return []
    return [value for value in module.buffers() if value.is_floating_point()]


def trainable_parameters(network_and_criterion: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that require gradients, by the names of `cnnrun summary`; the criterion's begin with `criterion.`."""
    return [
        (name.removeprefix("network."), parameter)
        for name, parameter in network_and_criterion.named_parameters()
        if parameter.requires_grad
    ]


def compile_network(network: nn.Module, spec: Train) -> nn.Module:
    """Compile the network with torch if the config asks for it; otherwise return it as it is."""
    if not spec.compile:
        return network
    # After eight trainings in one process PyTorch stops compiling, and reports it only in its log.
    torch.compiler.reset()
    compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return compiled
