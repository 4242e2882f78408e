"""One training step: the gradients of a batch over all ranks, and the update of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnnrun.base.errors import ResourceError
from cnnrun.base.randomness import seed_step
from cnnrun.contracts.batch import Batch
from cnnrun.training.learner import Job, Learner
from cnnrun.training.settings import batch_problem


def backward(learner: Learner, job: Job, batch: Batch, step: int) -> Tensor:
    """Compute the gradients of this rank's part of a batch, one micro-batch at a time.

    Returns this part's contribution to the batch's loss, as a scalar on the device.
    """
    seed_step(job.seed, step, job.ranks.rank, job.device)
    total = torch.zeros((), device=job.device)
    for micro_batch in batch.micro_batches():
        inputs = micro_batch.images
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with learner.autocast(job.device):
            outputs = learner.forward(inputs)
        losses: dict[str, Tensor] = learner.criterion(outputs.float(), micro_batch.targets)
        loss = sum(losses.values(), torch.zeros((), device=job.device)) * (len(micro_batch) / micro_batch.global_size)
        learner.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def undo_step(learner: Learner, buffers: list[Tensor], device: torch.device) -> None:
    """Clear a failed step's gradients and restore the modules' buffers to `buffers`, their values before the step."""
    learner.optimizer.zero_grad()
    with torch.no_grad():
        for value, previous in zip(learner.buffers, buffers, strict=True):
            value.copy_(previous)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def double_micro_batches(job: Job, accumulate: int, reason: str) -> int:
    """Return doubled as many micro-batches. Raises ResourceError, with `reason`, if they cannot be smaller."""
    count, doubled = len(job.dataset.splits["train"]), 2 * accumulate
    problem = batch_problem(
        job.spec, count, job.network, job.ranks.world_size, doubled, job.task.requirements.class_batches
    )
    if problem or job.spec.smallest_batch(count) < doubled:
        line = f"memory ran out with micro-batches as small as they can be ({problem or 'one picture'}): {reason}"
        raise ResourceError(line)
    return doubled


def all_reduce_gradients(learner: Learner, job: Job, loss: Tensor) -> Tensor:
    """Sum gradients, and average batch norms' statistics, over the ranks, in place; returns the whole batch's loss.

    DistributedDataParallel would not resume to the bit: it rearranges its buckets after a process's first step. With
    three ranks or more, the sums of a resumed run would then be rounded differently.
    """
    if job.ranks.world_size > 1:
        gradients = [value.grad for value in learner.parameters if value.grad is not None]
        job.ranks.all_reduce_sum([*gradients, *learner.batch_norm_statistics, loss])
        for value in learner.batch_norm_statistics:
            value /= job.ranks.world_size
    return loss


def finiteness_sums(learner: Learner, loss: Tensor) -> Tensor:
    """The loss, a sum over the gradients and one over the changing tensors, on the device.

    Each is finite if all the values in it are.
    """
    gradients = [value.grad for value in learner.parameters if value.grad is not None]
    if learner.scaler.is_enabled():  # the scaler itself skips steps whose gradients are not finite
        gradients = []
    return torch.stack([loss.float(), _sum(gradients, loss), _sum(list(learner.changing_tensors.values()), loss)])


def _sum(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Sum (on a GPU the maximum norm) of `tensors`: a scalar of the type and device of `like`."""
    if not tensors:
        return torch.zeros_like(like)
    with torch.no_grad():
        if like.device.type == "cuda":  # a single kernel
            return torch.stack(torch._foreach_norm(tensors, float("inf"))).float().max()
        return torch.stack([value.sum() for value in tensors]).sum()


def update_weights(learner: Learner, job: Job, step: int, factor: float) -> None:
    """Do an optimizer step with `factor` of the peak learning rates, and update the average of the weights."""
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
