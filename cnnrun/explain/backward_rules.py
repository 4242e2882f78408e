"""Rules by which ReLUs hand signals back: the gradient, guided backpropagation, the deconvnet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.explain.layer_names import LayerPlace, capture_outputs, run_upto
from cnnrun.explain.method_base import BackwardRule
from cnnrun.model.network import Network


@contextmanager
def use_backward_rule(network: nn.Module, rule: BackwardRule) -> Iterator[None]:
    """What ReLUs hand back inside: the slope (`plain`), that where it is above 0 (`guided`), or the signal from above
    where it is above 0, whatever came in (`deconv`).

    `guided`: Springenberg et al. 2015; `deconv`: Zeiler and Fergus 2014, section 2.1. Other activations hand their
    slope back.
    """
    changed = relu_modules(network) if rule != "plain" else []
    for module in changed:
        module.forward = _changed(module, rule)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def relu_modules(network: nn.Module) -> list[nn.Module]:
    """The activations that rules of handing back are about."""
    return [module for module in network.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]


def _changed(module: nn.Module, rule: BackwardRule) -> Any:
    forward, most = module.forward, 6.0 if isinstance(module, nn.ReLU6) else math.inf
    return lambda x: _Rectified.apply(x, forward, most if rule == "guided" else None)


class _Rectified(torch.autograd.Function):
    """An activation whose signal back is rectified as its signal forth is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Any, most: float | None) -> Tensor:
        """`most` is the value from which on it is flat, where its slope counts; None where that does not."""
        ctx.save_for_backward(*([] if most is None else [(x > 0) & (x < most)]))
        out: Tensor = activation(x.clone())  # it may write over its input
        return out

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None, None]:
        back = signals[0].clamp(min=0)
        return (back * ctx.saved_tensors[0] if ctx.saved_tensors else back), None, None


def project_to_pixels(network: Network, place: LayerPlace, pictures_BCHW: Tensor, cells_B3: Tensor) -> Tensor:
    """The part of each picture that one activation stands for, as the deconvnet has it: [B, C, H, W].

    The cell (channel, row, column) is put back alone, with its value, through the filters transposed, the positions
    that each max-pooling chose, and ReLUs (Zeiler and Fergus 2014, section 2.1). In units of the normalised input.
    Other poolings hand their part to each cell, sums of branches to each branch.
    """
    pictures = pictures_BCHW.detach().requires_grad_()
    picture = torch.arange(len(pictures), device=pictures.device)
    channel, row, column = cells_B3.to(pictures.device).unbind(1)
    with (
        torch.enable_grad(),
        use_backward_rule(network, "deconv"),
        capture_outputs(network, ["normalize", place.module_name]) as kept,
    ):
        run_upto(network, place.module_name, pictures)
        value_B = kept[place.module_name][picture, channel, row, column]
        (found,) = torch.autograd.grad(value_B, kept["normalize"], value_B.detach())
    return found
