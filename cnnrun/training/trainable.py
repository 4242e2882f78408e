"""Tensors of a network that change in training and must stay finite: parameters, statistics and averages."""

from __future__ import annotations

from torch import Tensor, nn

from cnnrun.training.ema import Ema
from cnnrun.training.settings import BATCH_NORMS


def trainable_parameters(network_and_criterion: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that require gradients, by the names of `cnnrun summary`; the criterion's begin with `criterion.`."""
    return [
        (name.removeprefix("network."), parameter)
        for name, parameter in network_and_criterion.named_parameters()
        if parameter.requires_grad
    ]


def rank_statistics(network: nn.Module) -> list[Tensor]:
    """Running statistics that batch norms in training mode measure on this rank's images alone."""
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS) and module.training]
    return [value for norm in norms for value in norm.buffers() if value.is_floating_point()]


def changing_tensors(network: nn.Module, network_and_criterion: nn.Module, ema: Ema | None) -> dict[str, Tensor]:
    """Tensors that steps change and that must stay finite, by name: weights, statistics and averages."""
    tensors: dict[str, Tensor] = {
        name: parameter.detach() for name, parameter in trainable_parameters(network_and_criterion)
    }
    updated = {id(buffer) for module in network.modules() if module.training for buffer in module.buffers()}
    tensors |= {
        name: buffer
        for name, buffer in network.named_buffers()
        if id(buffer) in updated and name.rsplit(".", 1)[-1] in ("running_mean", "running_var")
    }
    average = ema.average if ema else {}
    return tensors | {f"{name} (ema)": average[name] for name in tensors if name in average}
