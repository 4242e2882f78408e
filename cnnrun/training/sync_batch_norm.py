"""Batch norm over the pictures of all ranks, as if one process had the whole (micro-)batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnnrun.base.ranks import Ranks


class _Total(torch.autograd.Function):
    """The sum over the ranks. Each rank's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, value: Tensor, ranks: Ranks) -> Tensor:
        context.ranks = ranks
        return _summed(value, ranks)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], context.ranks), None


def _summed(value: Tensor, ranks: Ranks) -> Tensor:
    total = value.clone()
    ranks.all_reduce_sum([total])
    return total


class SyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm works on GPUs alone; this is the same for processors, over any backend.

    Mean and variance are those of Ioffe and Szegedy 2015, algorithm 1, with the sums taken over all ranks. Summed in
    float64: between ranks only rounding differs from one process, and it should stay there.
    """

    ranks: Ranks

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # of one or two dimensions alike

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        wide = input.double()
        axes = [0, *range(2, input.dim())]
        ones = wide.new_full((1,), input.numel() / input.shape[1])
        totals = self._total(torch.cat([wide.sum(axes), ones]))
        count = totals[-1].detach()
        shape = [1, -1] + [1] * (input.dim() - 2)
        centred = wide - (totals[:-1] / count).view(shape)
        variance = self._total(centred.square().sum(axes)) / count
        out: Tensor = (centred * torch.rsqrt(variance + self.eps).view(shape)).to(input.dtype)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_((totals[:-1] / count).float(), self.momentum or 0.0)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum or 0.0)
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out

    def _total(self, value: Tensor) -> Tensor:
        total: Tensor = _Total.apply(value, self.ranks)
        return total


def synchronize_batch_norms(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The network with its batch norms over all ranks: torch's own on a GPU. Parameters and names stay."""
    if device.type == "cuda":
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return made
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(module, name, _converted(child, ranks))
    return network


def _converted(norm: _BatchNorm, ranks: Ranks) -> SyncBatchNorm:
    made = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
    made.ranks = ranks
    made.load_state_dict(norm.state_dict())
    if norm.affine:
        made.weight, made.bias = norm.weight, norm.bias
    return made.train(norm.training)
