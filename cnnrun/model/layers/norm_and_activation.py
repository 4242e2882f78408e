"""The norm and activation that follow a convolution or a fully connected layer."""

from __future__ import annotations

from torch import nn

from cnnrun.contracts.layer import Shape
from cnnrun.model.layers.activation import Activation, make_in_place
from cnnrun.model.layers.norm import Norm


def add_norm_and_activation(
    name: str, module: nn.Module, out_shape: Shape, norm: Norm | None, activation: Activation | None
) -> nn.Module:
    """Chain `module`, norm and activation, or return `module` if it has neither. Only `out_shape`'s channels matter."""
    if norm is None and activation is None:
        return module
    chain = nn.Sequential()
    chain.add_module(name, module)
    if norm is not None:
        chain.add_module("norm", norm.build(out_shape))
    if activation is not None:
        chain.add_module("activation", make_in_place(activation.build(out_shape)))
    return chain


def module_before_norm(module: nn.Module) -> nn.Module:
    """Return what `add_norm_and_activation` was given; norm and activation do not change the shape of its output."""
    return module[0] if isinstance(module, nn.Sequential) else module
