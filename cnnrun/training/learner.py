"""The learner: network, criterion, optimizer and everything else that a checkpoint saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnnrun.base.randomness import derive_key, seed_step
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.results import Measurement, Results
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.network import Network
from cnnrun.model.trained_network import MeasuredNetwork
from cnnrun.training import checkpoints
from cnnrun.training.determinism import use_deterministic_layers
from cnnrun.training.dtypes import autocast
from cnnrun.training.ema import Ema
from cnnrun.training.evaluation import measure_split
from cnnrun.training.frozen_layers import (
    compute_features,
    layers_until,
    recompute_reason,
    separate_trunk,
    set_training_mode,
)
from cnnrun.training.optimizers import check_state_tensors, load_state_tensors, state_tensors
from cnnrun.training.settings import Train
from cnnrun.training.setup import TrainingSetup
from cnnrun.training.sync_batch_norm import synchronize_batch_norms
from cnnrun.training.trainable import changing_tensors, rank_statistics, trainable_parameters

_CRITERION_SEED = 1  # differs from the key of the network's seed


class Learner:
    """Network, criterion, optimizer, loss scaler and average of the weights: gradients, updates, evaluation, state."""

    def __init__(self, setup: TrainingSetup) -> None:
        spec, device = setup.spec, setup.device
        self.setup = setup
        self.network = setup.network.to(device).to(memory_format=torch.channels_last)
        if device.type == "cuda" and spec.deterministic:
            use_deterministic_layers(self.network)
        if setup.ranks.world_size > 1 and spec.sync_batch_norm:
            synchronize_batch_norms(self.network, setup.ranks, device)
        torch.manual_seed(derive_key(setup.seed, _CRITERION_SEED))  # criteria may have weights, such as class centres
        self.criterion = setup.task.learning.build_criterion().to(device)
        self.network_and_criterion = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        set_training_mode(self.network, spec.always_frozen)
        groups = _parameter_groups(spec, self.network, trainable_parameters(self.network_and_criterion))
        self.parameter_names = [name for group in groups for name in group.pop("names")]
        self.optimizer = spec.optimizer.build(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "float16")
        self.ema = Ema(self.network, spec.ema.decay) if spec.ema else None
        self.active_network, self.forward = self.network, compile_network(self.network, spec)
        self.buffers = list(self.network_and_criterion.buffers())
        self.parameters = [parameter for _, parameter in trainable_parameters(self.network_and_criterion)]
        self._freeze_until(spec.freeze)

    def freeze_for_step(self, step: int) -> None:
        """Freeze the layers that do not learn at `step`, and no others."""
        frozen = self.setup.spec.frozen_at(step, self.setup.steps_per_epoch)
        if frozen != self._frozen_until:
            self._freeze_until(frozen)

    def _freeze_until(self, layer: str | None) -> None:
        self._frozen_until = layer
        set_training_mode(self.network, layer)
        self.batch_norm_statistics = rank_statistics(self.network)
        self.changing_tensors = changing_tensors(self.network, self.network_and_criterion, self.ema)

    def autocast(self) -> torch.autocast:
        """Context that computes in the config's precision."""
        return autocast(self.setup.device, self.setup.spec.precision)

    def backward(self, batch: Batch, step: int) -> Tensor:
        """Compute the gradients of this rank's part of a batch, one micro-batch at a time.

        Returns this part's contribution to the batch's loss, as a scalar on the device.
        """
        device = self.setup.device
        seed_step(self.setup.seed, step, self.setup.ranks.rank, device)
        total = torch.zeros((), device=device)
        for micro_batch in batch.micro_batches():
            inputs = micro_batch.images
            if inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                outputs = self.forward(inputs)
            losses: dict[str, Tensor] = self.criterion(outputs.float(), micro_batch.targets)
            loss = sum(losses.values(), torch.zeros((), device=device)) * (len(micro_batch) / micro_batch.global_size)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def all_reduce_gradients(self, loss: Tensor) -> Tensor:
        """Sum gradients, and average batch norms' statistics, over the ranks, in place; returns the whole batch's loss.

        DistributedDataParallel would not resume to the bit: it rearranges its buckets after a process's first step.
        With three ranks or more, the sums of a resumed run would then be rounded differently.
        """
        ranks = self.setup.ranks
        if ranks.world_size > 1:
            ranks.all_reduce_sum([*self._gradients(), *self.batch_norm_statistics, loss])
            for value in self.batch_norm_statistics:
                value /= ranks.world_size
        return loss

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self.parameters if value.grad is not None]

    def finiteness_probes(self, loss: Tensor) -> Tensor:
        """The loss, a probe of the gradients and one of the changing tensors, on the device.

        Each is finite if all the values that it probes are.
        """
        # The scaler itself skips steps whose gradients are not finite.
        gradients = [] if self.scaler.is_enabled() else self._gradients()
        changing = list(self.changing_tensors.values())
        return torch.stack([loss.float(), _finiteness_probe(gradients, loss), _finiteness_probe(changing, loss)])

    def undo_step(self, buffers: list[Tensor]) -> None:
        """Clear a failed step's gradients and restore the modules' buffers to `buffers`, their values before it."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for value, previous in zip(self.buffers, buffers, strict=True):
                value.copy_(previous)
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()

    def update_weights(self, step: int, factor: float) -> None:
        """Do an optimizer step with `factor` of the peak learning rates, and update the average of the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.setup.spec.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.setup.spec.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(step)

    def checkpoint_parts(self) -> checkpoints.CheckpointParts:
        """Tensors to save, by checkpoint part."""
        parts = {"model": self.network.state_dict(), "optimizer": state_tensors(self.optimizer, self.parameter_names)}
        if self.ema:
            parts["ema"] = self.ema.average
        if criterion := self.criterion.state_dict():
            parts["criterion"] = criterion
        return parts

    def restore(self, checkpoint: checkpoints.Checkpoint, step: int) -> None:
        """Restore the state that `checkpoint` holds after `step`.

        Raises KeyError, TypeError, ValueError, RuntimeError or AttributeError if the checkpoint does not fit.
        """
        check_state_tensors(self.setup.spec.optimizer, checkpoint.parts["optimizer"], step)
        self.network.load_state_dict(checkpoint.parts["model"])
        self.criterion.load_state_dict(checkpoint.parts.get("criterion", {}))
        load_state_tensors(self.optimizer, self.parameter_names, checkpoint.parts["optimizer"])
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        if self.ema:
            for name, value in checkpoint.parts["ema"].items():
                self.ema.average[name].copy_(value)

    def precompute_frozen_features(self) -> None:
        """Compute the frozen layers' features once, if the images never change.

        Then the setup's dataset holds features, and `forward` takes features. If the features cannot be computed once,
        the reason is printed and nothing changes.
        """
        from cnnrun.base.progress import progress_bar, say  # imports rich, which checking a config does not need

        setup, spec, device = self.setup, self.setup.spec, self.setup.device
        if spec.freeze is None:
            return
        if spec.freeze_epochs is not None:
            say("the features of the frozen layers are computed again at each step: these layers learn later")
            return
        parts = separate_trunk(self.network, spec.freeze)
        if reason := recompute_reason(parts[0] if parts else None, setup.facts, setup.augment, setup.memory_gib):
            say(f"the features of the frozen layers are computed again at each step: {reason}")
            return
        assert parts is not None
        trunk, tail = parts
        features = compute_features(trunk, setup.dataset, spec.batch, device, self.autocast, progress_bar)
        self.active_network, self.forward = tail, compile_network(tail, spec)
        self.setup = replace(setup, dataset=features)

    def predict_samples(self, split: str, count: int) -> tuple[Batch, Results] | None:
        """Predict the first `count` samples of a split; None if the network takes features instead of images."""
        if self.active_network is not self.network:
            return None
        batch = next(iter(batches_in_order(self.setup.dataset.splits[split], count, self.setup.device)))
        self.network.eval()
        decoder = self.setup.task.predicting.build_decoder(Choices()).to(self.setup.device)
        try:
            with torch.inference_mode():
                results: Results = decoder(self._evaluated_network()(batch.images).float())
        finally:  # a failure must not leave the network in evaluation mode
            set_training_mode(self.network, self._frozen_until)
        return batch, results

    def evaluate(self, split: str, batch: int, before_batch: Callable[[], None] = lambda: None) -> Measurement:
        """Measure the averaged weights, or the weights if there is no average, on a split; training state is unchanged.

        `before_batch` is called before each batch and may end the evaluation by raising an exception.
        """
        setup = self.setup
        self.network.eval()
        criterion = None if setup.task.requirements.has_unseen_classes else self.criterion
        measured = MeasuredNetwork(self._evaluated_network(), criterion, setup.task, Choices(), setup.device)
        try:
            return measure_split(measured, setup.dataset.splits[split], batch, setup.ranks, False, before_batch)
        finally:
            set_training_mode(self.network, self._frozen_until)

    def _evaluated_network(self) -> Callable[[Tensor], Tensor]:
        """The network in float32, with the averaged weights if there are any."""
        average = self.ema.average if self.ema else {}
        weights = {name: average[name] for name in self.active_network.state_dict() if name in average}

        def forward(inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(self.active_network, weights, (inputs,))
            return out

        return forward


def _parameter_groups(spec: Train, network: Network, named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """The optimizer's groups; parameters that learn later are in groups of their own.

    Fused kernels refuse a group of which only some parameters have a state.
    """
    later = {id(parameter) for layer in layers_until(network, spec.freeze).values() for parameter in layer.parameters()}
    parts = [[pair for pair in named if (id(pair[1]) in later) == is_later] for is_later in (False, True)]
    return [group for part in parts for group in spec.optimizer.parameter_groups(part)]


def _finiteness_probe(tensors: list[Tensor], like: Tensor) -> Tensor:
    """A scalar that is finite if `tensors` are: their sum, on a GPU their maximum norm."""
    if not tensors:
        return torch.zeros_like(like)
    with torch.no_grad():
        if like.device.type == "cuda":  # a single kernel
            return torch.stack(torch._foreach_norm(tensors, float("inf"))).float().max()
        return torch.stack([value.sum() for value in tensors]).sum()


def compile_network(network: nn.Module, spec: Train) -> nn.Module:
    """Compile the network with torch if the config asks for it; otherwise return it as it is."""
    if not spec.compile:
        return network
    # After eight trainings in one process PyTorch stops compiling, and reports it only in its log.
    torch.compiler.reset()
    compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return compiled
