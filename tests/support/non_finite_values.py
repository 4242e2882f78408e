"""Faults that make one training step non-finite, each in another place."""

from __future__ import annotations

import torch

from cnnrun.data.training_batches import TrainingBatches
from cnnrun.tasks.classification import CrossEntropy
from cnnrun.training.learner import Learner


def poison_input(monkeypatch, at: int, value: float) -> None:
    real = TrainingBatches.at

    def replacement(self, step):
        batch = real(self, step)
        if step == at:
            batch.images[7, 0, 3, 3] = value
            self._ready[step] = batch  # as it would be found again
        return batch

    monkeypatch.setattr(TrainingBatches, "at", replacement)


def poison_loss(monkeypatch, at: int, value: float) -> None:
    real, calls = CrossEntropy.forward, []

    def replacement(self, outputs, targets):
        losses = real(self, outputs, targets)
        if torch.is_grad_enabled():
            calls.append(1)
        return {name: loss * (value if len(calls) == at + 1 else 1) for name, loss in losses.items()}

    monkeypatch.setattr(CrossEntropy, "forward", replacement)


def poison_after_backward(monkeypatch, at: int, spoil) -> None:
    real = Learner.backward

    def replacement(self, batch, step):
        loss = real(self, batch, step)
        if step == at:
            with torch.no_grad():
                spoil(self)
        return loss

    monkeypatch.setattr(Learner, "backward", replacement)


def poison_gradient(monkeypatch, at: int, value: float) -> None:
    def spoil(learner):
        learner.network.get_parameter("layers.linear1.linear.bias").grad[2] = value

    poison_after_backward(monkeypatch, at, spoil)


def poison_weight(monkeypatch, at: int, value: float) -> None:
    real = Learner.update_weights

    def replacement(self, step, factor):
        real(self, step, factor)
        if step == at - 1:
            with torch.no_grad():
                self.network.get_parameter("layers.linear1.linear.weight")[0, 0] = value

    monkeypatch.setattr(Learner, "update_weights", replacement)


def poison_statistic(monkeypatch, at: int, value: float) -> None:
    poison_after_backward(monkeypatch, at, lambda learner: learner.network.layers.conv1.norm.running_var.fill_(value))


def poison_average(monkeypatch, at: int, value: float) -> None:
    poison_after_backward(monkeypatch, at, lambda learner: learner.ema.average["head.weight"].fill_(value))


PLACES = {
    "input": (poison_input, "the image digits["),
    "loss": (poison_loss, "none (the loss itself)"),
    "gradient": (poison_gradient, "the gradient of layers.linear1.linear.bias"),
    "weight": (poison_weight, "model layers.linear1.linear.weight"),  # found when it is to be saved
    "statistic": (poison_statistic, "layers.conv1.norm (its running_var)"),
    "average": (poison_average, "head.weight (ema)"),
}
