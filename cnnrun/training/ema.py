"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from cnnrun.config.spec import Spec


class EmaSpec(Spec):
    """An exponential moving average of the weights, which is evaluated and exported instead of them."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Fraction of the average that each step keeps; at most (1 + step) / (10 + step), so less in the first steps."""


class Ema:
    """The averaged copy of a module's state. Only `average` needs saving: the decay follows from the step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._source = module.state_dict(keep_vars=True)
        self.average = {name: value.detach().clone() for name, value in self._source.items()}
        self._averaged_names = [name for name, value in self._source.items() if value.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step `step` (from 0); integer state, such as counters, is copied."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = [self.average[name] for name in self._averaged_names]
        values = [self._source[name] for name in self._averaged_names]
        torch._foreach_lerp_(averages, values, weight)
        for name, value in self._source.items():
            if not value.is_floating_point():
                self.average[name].copy_(value)
