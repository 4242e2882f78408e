"""One step of learning: gradients of a batch, over all ranks, and what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnnrun.base.errors import ResourceError
from cnnrun.base.randomness import seed_step
from cnnrun.contracts.batch import Batch
from cnnrun.training.learner import Job, Learner
from cnnrun.training.settings import batch_problem


def backward(learner: Learner, job: Job, batch: Batch, step: int) -> Tensor:
    """Compute the gradients of this rank's share of a batch, micro-batch by micro-batch; returns its part of the loss.

    The loss stays on the device.
    """
    seed_step(job.seed, step, job.ranks.rank, job.device)
    total = torch.zeros((), device=job.device)
    for part in batch.micro_batches():
        inputs = part.images
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with learner.autocast(job.device):
            outputs = learner.forward(inputs)
        losses: dict[str, Tensor] = learner.criterion(outputs.float(), part.targets)
        loss = sum(losses.values(), torch.zeros((), device=job.device)) * (len(part) / part.global_size)
        learner.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def undo_step(learner: Learner, buffers: list[Tensor], device: torch.device) -> None:
    """Forget a step's gradients and what batch norms measured in it: `buffers` are as they were before."""
    learner.optimizer.zero_grad()
    with torch.no_grad():
        for value, old in zip(learner.buffers, buffers, strict=True):
            value.copy_(old)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def double_micro_batches(job: Job, accumulate: int, reason: str) -> int:
    """Twice as many micro-batches. Raises ResourceError, which says the `reason`, where they cannot be smaller."""
    count, twice = len(job.dataset.splits["train"]), 2 * accumulate
    why = batch_problem(job.spec, count, job.network, job.ranks.world_size, twice, job.task.needs_class_batches())
    if why or job.spec.smallest_batch(count) < twice:
        line = f"memory ran out with micro-batches as small as they can be ({why or 'one picture'}): {reason}"
        raise ResourceError(line)
    return twice


def all_reduce_gradients(learner: Learner, job: Job, loss: Tensor) -> Tensor:
    """Gradients summed and batch norms' statistics averaged over the ranks, in place; returns the batch's loss.

    Not DistributedDataParallel, whose buckets are laid out anew after a process's first step: with three ranks or more
    the sums of a resumed run are then rounded otherwise than an uninterrupted one's.
    """
    if job.ranks.world_size > 1:
        gradients = [value.grad for value in learner.parameters if value.grad is not None]
        job.ranks.all_reduce_sum([*gradients, *learner.batch_norm_statistics, loss])
        for value in learner.batch_norm_statistics:
            value /= job.ranks.world_size
    return loss


def finiteness_sums(learner: Learner, loss: Tensor) -> Tensor:
    """Three numbers that are finite if all is well, on the device: the loss, sums of the gradients and of the state."""
    gradients = [value.grad for value in learner.parameters if value.grad is not None]
    if learner.scaler.is_enabled():  # it looks at the gradients itself, and leaves out steps of bad ones
        gradients = []
    return torch.stack([loss.float(), _sum(gradients, loss), _sum(list(learner.changing_tensors.values()), loss)])


def _sum(tensors: list[Tensor], like: Tensor) -> Tensor:
    if not tensors:
        return torch.zeros_like(like)
    with torch.no_grad():
        if like.device.type == "cuda":  # in one kernel
            return torch.stack(torch._foreach_norm(tensors, float("inf"))).float().max()
        return torch.stack([value.sum() for value in tensors]).sum()


def update_weights(learner: Learner, job: Job, step: int, factor: float) -> None:
    """One optimizer step with the gradients at hand and `factor` of the peak rates, and the average of the weights."""
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    if job.spec.clip is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.parameters, job.spec.clip)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad()
    if learner.ema:
        learner.ema.update(step)
