"""Batch norm over the images of all ranks, as if one process had the whole (micro-)batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnnrun.base.ranks import Ranks


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks. Each rank's loss depends on it, so the gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor, ranks: Ranks) -> Tensor:
        context.ranks = ranks
        return _sum_over_ranks(value, ranks)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(gradients[0], context.ranks), None


def _sum_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    total = value.clone()
    ranks.all_reduce_sum([total])
    return total


class SyncBatchNorm(_BatchNorm):
    """Synchronised batch norm on CPUs, over any backend; torch's own works on GPUs only.

    Mean and variance are those of Ioffe and Szegedy 2015, algorithm 1, with sums over all ranks. The sums are in
    float64, so that the rounding of several ranks hardly differs from that of one process.
    """

    ranks: Ranks

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # inputs of BatchNorm1d and BatchNorm2d are both accepted

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
        total: Tensor = _SumOverRanks.apply(value, self.ranks)
        return total


def synchronize_batch_norms(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Replace the network's batch norms by synchronised ones, on a GPU by torch's; parameters and names stay."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(module, name, _convert(child, ranks))
    return network


def _convert(norm: _BatchNorm, ranks: Ranks) -> SyncBatchNorm:
    synchronized = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
    synchronized.ranks = ranks
    synchronized.load_state_dict(norm.state_dict())
    if norm.affine:
        synchronized.weight, synchronized.bias = norm.weight, norm.bias
    return synchronized.train(norm.training)
