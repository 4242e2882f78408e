"""A network over a split: its losses and what its task's meter says. Each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cnnrun.batch import Batch
from cnnrun.batches import in_order
from cnnrun.contracts import Facts, Measured, Results, TaskSpec
from cnnrun.dataset import Examples


def evaluate(
    forward: Callable[[Tensor], Tensor],
    criterion: nn.Module,
    task: TaskSpec,
    facts: Facts,
    examples: Examples,
    batch: int,
    device: torch.device,
) -> Measured:
    """The task's numbers on `examples`, and `loss`, its criterion's mean. `forward` gives raw outputs."""
    meter = task.meter(facts)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for part in in_order(examples, batch, device):
            outputs = forward(part.pictures).float()
            losses: dict[str, Tensor] = criterion(outputs, part.targets)
            total += torch.stack(list(losses.values())).sum() * len(part)
            meter.update(task.decode(outputs), part.targets)
    measured = meter.compute()
    numbers = {"loss": float(total) / len(examples), **measured.numbers}
    return Measured(numbers, measured.tables, measured.matrices)


def measure(results: Callable[[Tensor], Results], task: TaskSpec, facts: Facts, batches: Iterable[Batch]) -> Measured:
    """The task's numbers for anything that turns pictures into results, such as an exported file."""
    meter = task.meter(facts)
    for part in batches:
        meter.update(results(part.pictures), part.targets)
    return meter.compute()
