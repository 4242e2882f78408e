"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from cnnrun.config.spec import Spec


class EmaSpec(Spec):
    """An exponential moving average of the weights, which is then what is evaluated and exported."""

    decay: float = Field(0.999, gt=0, lt=1)
    """How much of the average each step keeps; less during the first steps: (1 + step) / (10 + step)."""


class Ema:
    """The averaged copy of a module's state. Its only state is the average: the decay follows from the step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._source = module.state_dict(keep_vars=True)
        self.average = {name: value.detach().clone() for name, value in self._source.items()}
        self._moving = [name for name, value in self._source.items() if value.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights after optimizer step `step` (from 0) in; counters and the like are copied."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = [self.average[name] for name in self._moving]
        values = [self._source[name] for name in self._moving]
        torch._foreach_lerp_(averages, values, weight)
        for name, value in self._source.items():
            if not value.is_floating_point():
                self.average[name].copy_(value)
