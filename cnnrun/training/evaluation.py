"""A network over a split: its losses and what its task's meter says. Each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnnrun.base.ranks import Ranks
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Measurement, Results
from cnnrun.contracts.task import TaskSpec
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order


def measure_split(
    forward: Callable[[Tensor], Tensor],
    criterion: nn.Module | None,
    task: TaskSpec,
    facts: Facts,
    examples: Examples,
    batch: int,
    device: torch.device,
    ranks: Ranks | None = None,
    tables: bool = True,
    before_batch: Callable[[], None] = lambda: None,
) -> Measurement:
    """The task's numbers on `examples`, and `loss`, its criterion's mean if given. `forward` gives raw outputs.

    `between` is called before each batch, by all ranks at once; what it raises ends the evaluation.

    Of several ranks each runs every so-many-th batch, and each hears what all found, in the samples' order: the numbers
    are those of one process, to the bit.
    """
    ranks = ranks or Ranks()
    meter, total = task.meter(facts), torch.zeros((), dtype=torch.float64)
    decoder = task.decoder(facts).to(device)
    own = batches_in_order(examples, batch, device, ranks)
    places = torch.arange(len(examples)).split(batch)
    with torch.inference_mode():
        for first in range(0, len(places), ranks.world_size):
            before_batch()
            found = ranks.all_gather(_outcome(forward, criterion, decoder, next(own, None)))
            for index, results in zip(places[first:], found, strict=False):
                total = total + results.pop("loss", torch.zeros(())).double() * len(index)
                meter.update(results, examples.batch_targets(index, next(iter(results.values())).device))
    measured = meter.compute(tables)
    loss = {} if criterion is None else {"loss": float(total) / len(examples)}
    return replace(measured, metrics={**loss, **measured.metrics})


def _outcome(
    forward: Callable[[Tensor], Tensor], criterion: nn.Module | None, decoder: nn.Module, part: Batch | None
) -> dict[str, Tensor]:
    """A batch's results and its `loss`; nothing for a rank that has none left."""
    if part is None:
        return {}
    outputs = forward(part.images).float()
    results: dict[str, Tensor] = decoder(outputs)
    if criterion is None:
        return results
    losses: dict[str, Tensor] = criterion(outputs, part.targets)
    return {**results, "loss": torch.stack(list(losses.values())).sum()}


def measure_metrics(
    results: Callable[[Tensor], Results], task: TaskSpec, facts: Facts, batches: Iterable[Batch]
) -> Mapping[str, float | None]:
    """The task's numbers for anything that turns pictures into results, such as an exported file."""
    meter = task.meter(facts)
    for part in batches:
        meter.update(results(part.images), part.targets)
    return meter.compute(tables=False).metrics
