"""Rules for the backward pass through ReLUs: the gradient, guided backpropagation, the deconvnet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.explain.layer_names import NamedLayer, capture_outputs, run_upto
from cnnrun.explain.method_base import BackwardRule
from cnnrun.model.network import Network


@contextmanager
def use_backward_rule(network: nn.Module, rule: BackwardRule) -> Iterator[None]:
    """Use a rule for the backward pass through ReLUs inside the context; other activations keep their gradient.

    `plain` is the gradient. `guided` is its positive part (Springenberg et al. 2015). `deconv` is the positive part of
    the incoming gradient, whatever the ReLU's input was (Zeiler and Fergus 2014, section 2.1).
    """
    modules = relu_modules(network) if rule != "plain" else []
    for module in modules:
        module.forward = _replacement_forward(module, rule)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def relu_modules(network: nn.Module) -> list[nn.Module]:
    """Activations to which the rules apply."""
    return [module for module in network.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]


def _replacement_forward(module: nn.Module, rule: BackwardRule) -> Any:
    forward, max_input = module.forward, 6.0 if isinstance(module, nn.ReLU6) else math.inf
    return lambda x: _RectifiedActivation.apply(x, forward, max_input if rule == "guided" else None)


class _RectifiedActivation(torch.autograd.Function):
    """An activation whose gradient is rectified, as its output is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Any, max_input: float | None) -> Tensor:
        """Apply the activation. Its gradient is zero outside 0..`max_input`; None ignores the input (`deconv`)."""
        ctx.save_for_backward(*([] if max_input is None else [(x > 0) & (x < max_input)]))
        output: Tensor = activation(x.clone())  # the activation may work in place
        return output

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None, None]:
        gradient = signals[0].clamp(min=0)
        return (gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient), None, None


def project_to_pixels(network: Network, place: NamedLayer, images_BCHW: Tensor, cells_B3: Tensor) -> Tensor:
    """Project one activation of each image back to its pixels, as the deconvnet does: [B, C, H, W].

    The value of the cell (channel, row, column) passes alone through the transposed filters, the positions that each
    max-pooling chose, and ReLUs (Zeiler and Fergus 2014, section 2.1). The result is in units of the normalized input.
    Other poolings spread a value over their cells; sums pass it to each branch.
    """
    images = images_BCHW.detach().requires_grad_()
    index_B = torch.arange(len(images), device=images.device)
    channel, row, column = cells_B3.to(images.device).unbind(1)
    with (
        torch.enable_grad(),
        use_backward_rule(network, "deconv"),
        capture_outputs(network, ["normalize", place.module_name]) as outputs,
    ):
        run_upto(network, place.module_name, images)
        values_B = outputs[place.module_name][index_B, channel, row, column]
        (gradient_BCHW,) = torch.autograd.grad(values_B, outputs["normalize"], values_B.detach())
    return gradient_BCHW
