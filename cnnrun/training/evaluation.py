"""Evaluation of a network on a split: its loss and its task's metrics. Each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnnrun.base.ranks import Ranks
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.results import Measurement, Results
from cnnrun.contracts.task import Task
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.trained_network import MeasuredNetwork


def measure_split(
    measured: MeasuredNetwork,
    examples: Examples,
    batch: int,
    ranks: Ranks | None = None,
    tables: bool = True,
    before_batch: Callable[[], None] = lambda: None,
) -> Measurement:
    """Measure a network's metrics on `examples` and, if it has a criterion, the mean `loss`.

    `before_batch` is called before each batch, on all ranks at once; an exception from it ends the evaluation.

    The ranks take turns with the batches and exchange all results, in the order of the samples. The metrics therefore
    equal those of one process to the bit.
    """
    ranks = ranks or Ranks()
    task, device = measured.task, measured.device
    meter, total = task.measuring.build_meter(measured.choices), torch.zeros((), dtype=torch.float64)
    decoder = task.predicting.build_decoder(measured.choices).to(device)
    rank_batches = batches_in_order(examples, batch, device, ranks)
    batch_indices = torch.arange(len(examples)).split(batch)
    with torch.inference_mode():
        for first in range(0, len(batch_indices), ranks.world_size):
            before_batch()
            gathered = ranks.all_gather(_batch_results(measured, decoder, next(rank_batches, None)))
            for index, results in zip(batch_indices[first:], gathered, strict=False):
                total = total + results.pop("loss", torch.zeros(())).double() * len(index)
                meter.update(results, examples.batch_targets(index, next(iter(results.values())).device))
    measurement = meter.compute(tables)
    loss = {} if measured.criterion is None else {"loss": float(total) / len(examples)}
    return replace(measurement, metrics={**loss, **measurement.metrics})


def _batch_results(measured: MeasuredNetwork, decoder: nn.Module, batch: Batch | None) -> dict[str, Tensor]:
    """Compute a batch's results and its `loss`; empty for a rank that has no batch left."""
    if batch is None:
        return {}
    outputs = measured.forward(batch.images).float()
    results: dict[str, Tensor] = decoder(outputs)
    if measured.criterion is None:
        return results
    losses: dict[str, Tensor] = measured.criterion(outputs, batch.targets)
    return {**results, "loss": torch.stack(list(losses.values())).sum()}


def measure_metrics(
    predict: Callable[[Tensor], Results], task: Task, choices: Choices, batches: Iterable[Batch]
) -> Mapping[str, float | None]:
    """Measure the task's metrics of anything that turns images into results, such as an exported file."""
    meter = task.measuring.build_meter(choices)
    for batch in batches:
        meter.update(predict(batch.images), batch.targets)
    return meter.compute(tables=False).metrics
